// Characters: their UTF-8, their categories, and sets of them. The tables are those of Python's `tokenizers`.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace megalodon::impl {

inline constexpr char32_t kLastCharacter = 0x10FFFF;

// The character at `position` of a text that is UTF-8. `position` moves behind it.
inline char32_t next_character(std::string_view text, std::size_t& position) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[position + i]); };
  const char32_t lead = byte(0);
  if (lead < 0x80) return ++position, lead;
  const std::size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  char32_t character = lead & (0x7FU >> length);
  for (std::size_t i = 1; i < length; ++i) character = (character << 6) | (byte(i) & 0x3FU);
  position += length;
  return character;
}

// The bytes of the character that begins with this byte, in a text that is UTF-8.
inline std::size_t character_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

// The last character of a text that is UTF-8 and not empty.
char32_t last_character(std::string_view text);

void append_character(std::string& text, char32_t character);
std::string to_utf8(char32_t character);

// A set of characters, as ranges in order that do not touch.
class CharacterSet {
 public:
  CharacterSet() = default;
  CharacterSet(char32_t first, char32_t last) : ranges_{{first, last}} {}

  void add(char32_t first, char32_t last);
  void add(const CharacterSet& other);
  CharacterSet complement() const;
  bool contains(char32_t character) const;
  const std::vector<std::pair<char32_t, char32_t>>& ranges() const { return ranges_; }

 private:
  std::vector<std::pair<char32_t, char32_t>> ranges_;
};

// A byte for every character, in blocks of 256 characters of which equal ones are stored once.
class CharacterTable {
 public:
  explicit CharacterTable(const std::vector<std::uint8_t>& bytes);
  std::uint8_t operator[](char32_t character) const {
    return blocks_[(static_cast<std::size_t>(block_of_[character >> 8]) << 8) | (character & 0xFF)];
  }

 private:
  std::vector<std::uint16_t> block_of_;
  std::vector<std::uint8_t> blocks_;
};

// Bits of `character_flags`.
enum CharacterFlag : std::uint8_t {
  kIsWord = 1,          // \w of Oniguruma
  kIsHan = 2,           // \p{Han}
  kIsNumeric = 4,       // Rust's char::is_numeric
  kIsRustWord = 8,      // \w of Rust's regex
  kIsPunctuation = 16,  // what the pre-tokenizer Punctuation splits at
  kIsMark = 32,         // what the normalizer StripAccents removes
  kIsSpace = 64,        // the Unicode property White_Space
};
const CharacterTable& character_flags();

// The characters of a category, e.g. "L" or "Lu". No ranges: there is no such category.
CharacterSet category_set(std::string_view name);
CharacterSet flag_set(CharacterFlag flag);

inline bool has_flag(char32_t character, CharacterFlag flag) { return (character_flags()[character] & flag) != 0; }

// The lower case of a text, by the characters alone.
std::string lowercase(std::string_view text);

// One entry of a table of changes.
struct CharacterChange {
  char32_t character;
  std::u32string replacement;
};
std::vector<CharacterChange> read_changes(const char* table);

// Reads a number in base 32 and moves behind it.
std::uint32_t read_number(const char*& text);

}  // namespace megalodon::impl
