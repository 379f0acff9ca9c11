// Unicode's normal forms, with the tables of Python's `tokenizers`.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::impl {

struct NormalForm {
  bool is_compatible;  // NFKC and NFKD
  bool is_composed;    // NFC and NFKC
};

// A character of a changed text. `change` is 0 if it takes the place of one character, 1 if it is more than there was,
// and -n if n further characters are gone.
struct ChangedCharacter {
  char32_t character;
  int change;
};

// The normal form of a text that is UTF-8. The work and the memory are linear in the text.
std::string normal_form(std::string_view text, NormalForm form);

// The characters of `normal_form(text, form)`, each with its change.
std::vector<ChangedCharacter> changes_to_normal_form(std::string_view text, NormalForm form);

}  // namespace megalodon::impl
