#include "text/normal_forms.hpp"

#include <algorithm>
#include <optional>
#include <unordered_map>

#include "text/unicode.hpp"
#include "text/unicode_tables.hpp"

namespace megalodon::impl {
namespace {

// Hangul syllables are composed by arithmetic: chapter 3.12 of the Unicode standard.
constexpr char32_t kSyllables = 0xAC00, kLeads = 0x1100, kVowels = 0x1161, kTails = 0x11A7;
constexpr char32_t kLeadCount = 19, kVowelCount = 21, kTailCount = 28;
constexpr char32_t kSyllableCount = kLeadCount * kVowelCount * kTailCount;

bool is_syllable(char32_t c) { return c - kSyllables < kSyllableCount; }

using Decompositions = std::unordered_map<char32_t, std::u32string>;

// Why a normal form may change a character or its neighbours, as bits. A character without a bit for a form stays as it
// is, and no character before it composes with it.
enum Role : std::uint8_t { kCanonicalChange = 1, kCompatibleChange = 2, kNotComposed = 4, kMark = 8, kSecond = 16 };

struct Tables {
  Decompositions canonical, compatible;
  std::unordered_map<std::uint64_t, char32_t> compositions;
  CharacterTable combining_classes{std::vector<std::uint8_t>(kLastCharacter + 1)};
  CharacterTable roles{std::vector<std::uint8_t>(kLastCharacter + 1)};

  Tables();
};

std::uint64_t pair_key(char32_t first, char32_t second) { return (std::uint64_t{first} << 32) | second; }

Tables::Tables() {
  std::vector<std::uint8_t> classes(kLastCharacter + 1), bits(kLastCharacter + 1);
  for (auto& [c, replacement] : read_changes(kCanonical)) {
    bits[c] |= kCanonicalChange | kNotComposed;
    canonical[c] = std::move(replacement);
  }
  for (auto& [c, replacement] : read_changes(kCompatible)) {
    bits[c] |= kCompatibleChange;
    compatible[c] = std::move(replacement);
  }
  for (const auto& [c, pair] : read_changes(kCompositions)) {
    compositions[pair_key(pair[0], pair[1])] = c;
    bits[c] &= static_cast<std::uint8_t>(~kNotComposed);
    bits[pair[1]] |= kSecond;
  }
  char32_t mark = 0;
  for (const char* text = kCombiningClasses; *text != '\0'; ++text) {
    mark += read_number(text);
    classes[mark] = static_cast<std::uint8_t>(read_number(++text));
    bits[mark] |= kMark;
  }
  for (char32_t c = kSyllables; c < kSyllables + kSyllableCount; ++c) bits[c] |= kCanonicalChange;
  for (char32_t c = kVowels; c < kVowels + kVowelCount; ++c) bits[c] |= kSecond;
  for (char32_t c = kTails + 1; c < kTails + kTailCount; ++c) bits[c] |= kSecond;
  combining_classes = CharacterTable(classes);
  roles = CharacterTable(bits);
}

const Tables& tables() {
  static const Tables all;
  return all;
}

std::optional<char32_t> compose(char32_t first, char32_t second) {
  if (first - kLeads < kLeadCount && second - kVowels < kVowelCount) {
    return kSyllables + ((first - kLeads) * kVowelCount + (second - kVowels)) * kTailCount;
  }
  if (is_syllable(first) && (first - kSyllables) % kTailCount == 0 && second > kTails && second < kTails + kTailCount) {
    return first + (second - kTails);
  }
  const auto found = tables().compositions.find(pair_key(first, second));
  return found == tables().compositions.end() ? std::nullopt : std::optional(found->second);
}

int combining_class(char32_t c) { return tables().combining_classes[c]; }

// ---- the steps ------------------------------------------------------------------------------------------------------

void decompose(char32_t c, bool is_compatible, std::vector<ChangedCharacter>& out) {
  const auto put = [&](const std::u32string& all) {
    for (std::size_t i = 0; i < all.size(); ++i) out.push_back({all[i], i == 0 ? 0 : 1});
  };
  if (is_syllable(c)) {
    const char32_t index = c - kSyllables, tail = index % kTailCount;
    std::u32string all{kLeads + index / (kVowelCount * kTailCount),
                       kVowels + index % (kVowelCount * kTailCount) / kTailCount};
    if (tail != 0) all += kTails + tail;
    return put(all);
  }
  const auto find = [&](const Decompositions& known) {
    const auto found = known.find(c);
    if (found != known.end()) put(found->second);
    return found != known.end();
  };
  if ((is_compatible && find(tables().compatible)) || find(tables().canonical)) return;
  out.push_back({c, 0});
}

// Marks that follow one another are sorted by their class.
void reorder(std::vector<ChangedCharacter>& text) {
  const auto class_of = [](const ChangedCharacter& one) { return combining_class(one.character); };
  for (auto first = text.begin(); first != text.end();) {
    first = std::find_if(first, text.end(), class_of);
    const auto end = std::find_if_not(first, text.end(), class_of);
    std::ranges::stable_sort(first, end, {}, class_of);
    first = end;
  }
}

// Joins each starter with the characters after it that it composes with and that nothing blocks.
void recompose(std::vector<ChangedCharacter>& text) {
  std::size_t written = 0;
  std::optional<std::size_t> starter;
  int last_class = -1;  // of the marks since the starter; -1: there are none
  for (const ChangedCharacter one : text) {
    const int own_class = combining_class(one.character);
    const bool is_free = starter && last_class < own_class;
    if (const auto joined = is_free ? compose(text[*starter].character, one.character) : std::nullopt) {
      text[*starter] = {*joined, text[*starter].change + one.change - 1};
      continue;
    }
    if (own_class == 0) {
      starter = written;
      last_class = -1;
    } else {
      last_class = own_class;
    }
    text[written++] = one;
  }
  text.resize(written);
}

void to_form(std::vector<ChangedCharacter>& text, NormalForm form) {
  reorder(text);
  if (form.is_composed) recompose(text);
}

std::uint8_t roles_for(NormalForm form) {
  return static_cast<std::uint8_t>((form.is_composed ? kNotComposed | kSecond : kCanonicalChange) | kMark |
                                   (form.is_compatible ? kCompatibleChange : 0));
}

}  // namespace

std::vector<ChangedCharacter> changes_to_normal_form(std::string_view text, NormalForm form) {
  std::vector<ChangedCharacter> all;
  for (std::size_t position = 0; position < text.size();) {
    decompose(next_character(text, position), form.is_compatible, all);
  }
  to_form(all, form);
  return all;
}

std::string normal_form(std::string_view text, NormalForm form) {
  const std::uint8_t active = roles_for(form);
  std::string out;
  std::vector<ChangedCharacter> part;
  std::size_t done = 0, boundary = 0;  // all before `done` is written; the text may be cut at `boundary`
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t start = position;
    if (static_cast<unsigned char>(text[position]) < 0x80 ||
        (tables().roles[next_character(text, position)] & active) == 0) {
      position = start + character_length(text[start]);
      boundary = start;
      continue;
    }
    while (position < text.size()) {  // on to the next character that stays as it is
      const std::size_t next = position;
      if ((tables().roles[next_character(text, position)] & active) == 0) {
        position = next;
        break;
      }
    }
    out.append(text, done, boundary - done);
    part = changes_to_normal_form(text.substr(boundary, position - boundary), form);
    for (const ChangedCharacter& one : part) append_character(out, one.character);
    done = boundary = position;
  }
  return out.append(text, done);
}

}  // namespace megalodon::impl
