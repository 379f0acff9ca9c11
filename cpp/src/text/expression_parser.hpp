// Reads the expressions that tokenizers use, in the syntax of Oniguruma.
#pragma once

#include <string>
#include <vector>

#include "text/unicode.hpp"

namespace megalodon::impl {

// An expression in the syntax of PCRE2 whose sets of characters are placeholders: the byte 1, then the set's index as
// two letters. All other bytes are its syntax.
struct ParsedExpression {
  std::string text;
  std::vector<CharacterSet> sets;
};

inline constexpr char kSetMark = 1;

// Throws NotSupported for what is not known here.
ParsedExpression parse_expression(const std::string& pattern);

}  // namespace megalodon::impl
