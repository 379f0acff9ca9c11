// Regular expressions of tokenizers, which Oniguruma runs in Python.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/unicode.hpp"

struct pcre2_real_code_8;

namespace megalodon::impl {

// A place in a text, in bytes.
struct Span {
  std::size_t begin, end;
};

// An expression, compiled. PCRE2 and Oniguruma know different versions of Unicode, so PCRE2 sees no characters: all
// characters that no part of the expression tells apart are one letter. For `\s+|\p{L}+` there are three letters: one
// for spaces, one for letters, one for the rest. PCRE2 matches the text in these letters.
class Expression {
 public:
  // Throws NotSupported for a construct whose meaning differs between the two or is not known here.
  explicit Expression(const std::string& pattern);

  // Goes through the matches in a text. It keeps its memory from text to text.
  class Search {
   public:
    explicit Search(const Expression& expression);
    void start(std::string_view text);
    std::optional<Span> next();

   private:
    struct Deleter {
      void operator()(void* data) const;
    };
    bool match(std::size_t from);

    const Expression& expression_;
    std::unique_ptr<void, Deleter> data_;
    std::string_view text_;
    std::string letters_;              // of the text, one for each character
    bool is_ascii_ = true;             // a character is a byte
    std::size_t at_ = 0;               // the character from which to search
    std::size_t character_ = 0;        // a place in the text, in characters
    std::size_t byte_ = 0;             // and in bytes
    std::size_t first_ = 0, end_ = 0;  // of the match, in characters
    std::optional<std::size_t> last_end_;
    std::size_t byte_of(std::size_t character);
  };

 private:
  struct Deleter {
    void operator()(pcre2_real_code_8* code) const;
  };

  std::string pattern_;
  std::unique_ptr<pcre2_real_code_8, Deleter> code_;
  std::unique_ptr<CharacterTable> letters_;
  std::array<char, 128> ascii_letters_{};
};

}  // namespace megalodon::impl
