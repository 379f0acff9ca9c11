#include "text/unicode.hpp"

#include <algorithm>
#include <map>
#include <unordered_map>

#include "text/unicode_tables.hpp"

namespace megalodon::impl {
namespace {

constexpr std::size_t kCharacters = kLastCharacter + 1;
constexpr std::string_view kCategoryLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ!#$";
constexpr std::string_view kCategoryNames = "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCoCn";
constexpr char32_t kFirstSurrogate = 0xD800, kAfterSurrogates = 0xE000;
constexpr std::array<std::pair<char32_t, char32_t>, 10> kSpaces{{{0x9, 0xD},
                                                                 {0x20, 0x20},
                                                                 {0x85, 0x85},
                                                                 {0xA0, 0xA0},
                                                                 {0x1680, 0x1680},
                                                                 {0x2000, 0x200A},
                                                                 {0x2028, 0x2029},
                                                                 {0x202F, 0x202F},
                                                                 {0x205F, 0x205F},
                                                                 {0x3000, 0x3000}}};

bool is_digit(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'v'); }

struct ClassRun {
  char32_t first, last;
  std::size_t category;  // the index of its name
  std::uint8_t flags;
};

std::vector<ClassRun> read_class_runs() {
  std::vector<ClassRun> runs;
  char32_t next = 0;
  for (const char* text = kClassRuns; *text != '\0';) {
    const std::size_t category = kCategoryLetters.find(*text++);
    const auto flags = static_cast<std::uint8_t>(*text++ - '@');
    char32_t count = is_digit(*text) ? read_number(text) : 1;
    if (next < kFirstSurrogate && next + count > kFirstSurrogate) {
      const char32_t before = kFirstSurrogate - next;
      runs.push_back({next, kFirstSurrogate - 1, category, flags});
      next = kAfterSurrogates;
      count -= before;
    } else if (next == kFirstSurrogate) {
      next = kAfterSurrogates;
    }
    if (count > 0) runs.push_back({next, next + count - 1, category, flags});
    next += count;
  }
  return runs;
}

const std::vector<ClassRun>& class_runs() {
  static const std::vector<ClassRun> runs = read_class_runs();
  return runs;
}

}  // namespace

// ---- UTF-8 ----------------------------------------------------------------------------------------------------------

char32_t last_character(std::string_view text) {
  std::size_t start = text.size() - 1;
  while ((static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
  return next_character(text, start);
}

void append_character(std::string& text, char32_t character) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(byte); };
  const auto tail = [&](int shift) { put(0x80 | ((character >> shift) & 0x3F)); };
  if (character < 0x80) return put(character);
  if (character < 0x800) return put(0xC0 | (character >> 6)), tail(0);
  if (character < 0x10000) return put(0xE0 | (character >> 12)), tail(6), tail(0);
  put(0xF0 | (character >> 18)), tail(12), tail(6), tail(0);
}

std::string to_utf8(char32_t character) {
  std::string text;
  append_character(text, character);
  return text;
}

// ---- sets -----------------------------------------------------------------------------------------------------------

void CharacterSet::add(char32_t first, char32_t last) {
  auto at = std::ranges::lower_bound(ranges_, first, {}, [](const auto& range) { return range.second + 1; });
  auto end = at;
  for (; end != ranges_.end() && end->first <= last + 1; ++end) {
    first = std::min(first, end->first);
    last = std::max(last, end->second);
  }
  at = ranges_.erase(at, end);
  ranges_.insert(at, {first, last});
}

void CharacterSet::add(const CharacterSet& other) {
  for (const auto& [first, last] : other.ranges_) add(first, last);
}

CharacterSet CharacterSet::complement() const {
  CharacterSet rest;
  char32_t next = 0;
  for (const auto& [first, last] : ranges_) {
    if (first > next) rest.ranges_.emplace_back(next, first - 1);
    next = last + 1;
  }
  if (next <= kLastCharacter) rest.ranges_.emplace_back(next, kLastCharacter);
  return rest;
}

bool CharacterSet::contains(char32_t character) const {
  const auto at = std::ranges::lower_bound(ranges_, character, {}, [](const auto& range) { return range.second; });
  return at != ranges_.end() && at->first <= character;
}

CharacterTable::CharacterTable(const std::vector<std::uint8_t>& bytes) {
  std::map<std::vector<std::uint8_t>, std::uint16_t> known;
  for (std::size_t start = 0; start < bytes.size(); start += 256) {
    const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(start);
    std::vector<std::uint8_t> block(begin, begin + 256);
    const auto number = static_cast<std::uint16_t>(known.size());
    const auto [at, is_new] = known.emplace(std::move(block), number);
    if (is_new) blocks_.insert(blocks_.end(), begin, begin + 256);
    block_of_.push_back(at->second);
  }
}

const CharacterTable& character_flags() {
  static const CharacterTable table = [] {
    std::vector<std::uint8_t> flags(kCharacters);
    for (const ClassRun& run : class_runs()) {
      std::fill(flags.begin() + static_cast<std::ptrdiff_t>(run.first),
                flags.begin() + static_cast<std::ptrdiff_t>(run.last) + 1, run.flags);
    }
    for (const auto& [first, last] : kSpaces) {
      for (char32_t c = first; c <= last; ++c) flags[c] |= kIsSpace;
    }
    return CharacterTable(flags);
  }();
  return table;
}

CharacterSet category_set(std::string_view name) {
  CharacterSet found;
  if (name.empty() || name.size() > 2) return found;
  for (const ClassRun& run : class_runs()) {
    if (kCategoryNames.substr(2 * run.category, name.size()) == name) found.add(run.first, run.last);
  }
  return found;
}

CharacterSet flag_set(CharacterFlag flag) {
  CharacterSet found;
  if (flag == kIsSpace) {
    for (const auto& [first, last] : kSpaces) found.add(first, last);
    return found;
  }
  for (const ClassRun& run : class_runs()) {
    if ((run.flags & flag) != 0) found.add(run.first, run.last);
  }
  return found;
}

// ---- changes --------------------------------------------------------------------------------------------------------

std::uint32_t read_number(const char*& text) {
  std::uint32_t number = 0;
  for (; is_digit(*text); ++text) {
    number = 32 * number + static_cast<std::uint32_t>(*text <= '9' ? *text - '0' : *text - 'a' + 10);
  }
  return number;
}

std::vector<CharacterChange> read_changes(const char* table) {
  std::vector<CharacterChange> changes;
  char32_t character = 0;
  while (*table != '\0') {
    character += read_number(table);
    std::u32string replacement;
    while (*table++ == ',') {
      const std::uint32_t code = read_number(table);
      replacement += code % 2 == 0 ? character + code / 2 : character - (code + 1) / 2;
    }
    changes.push_back({character, std::move(replacement)});
  }
  return changes;
}

std::string lowercase(std::string_view text) {
  static const std::unordered_map<char32_t, std::string> changes = [] {
    std::unordered_map<char32_t, std::string> map;
    for (const auto& [character, replacement] : read_changes(kLowercase)) {
      for (const char32_t one : replacement) append_character(map[character], one);
    }
    return map;
  }();
  std::string lower;
  lower.reserve(text.size());
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t start = position;
    const char32_t character = next_character(text, position);
    if (character < 0x80) {
      lower += static_cast<char>(character >= 'A' && character <= 'Z' ? character + 32 : character);
    } else if (const auto found = changes.find(character); found != changes.end()) {
      lower += found->second;
    } else {
      lower.append(text, start, position - start);
    }
  }
  return lower;
}

}  // namespace megalodon::impl
