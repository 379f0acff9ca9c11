#include "text/expression.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <map>

#include "error.hpp"
#include "text/expression_parser.hpp"
#include "text/refusal.hpp"

namespace megalodon::impl {
namespace {

constexpr std::size_t kMostLetters = 256;

// The letter of every character. Characters have one letter if the same sets contain them.
std::vector<std::uint8_t> letters_of(const std::vector<CharacterSet>& sets, std::vector<std::vector<bool>>& members) {
  std::map<char32_t, std::vector<std::size_t>> changes{{0, {}}};  // the sets that begin or end at a character
  for (std::size_t i = 0; i < sets.size(); ++i) {
    for (const auto& [first, last] : sets[i].ranges()) {
      changes[first].push_back(i);
      changes[last + 1].push_back(i);
    }
  }
  std::map<std::vector<bool>, std::size_t> known;
  std::vector<bool> current(sets.size());
  std::vector<std::uint8_t> letters(kLastCharacter + 1);
  for (auto at = changes.begin(); at != changes.end() && at->first <= kLastCharacter; ++at) {
    for (const std::size_t i : at->second) current[i] = !current[i];
    const std::size_t letter = known.emplace(current, known.size()).first->second;
    if (letter == members.size()) members.push_back(current);
    if (letter >= kMostLetters) return {};
    const auto next = std::next(at);
    const std::size_t end = next == changes.end() ? letters.size() : std::min<std::size_t>(next->first, letters.size());
    std::fill(letters.begin() + at->first, letters.begin() + static_cast<std::ptrdiff_t>(end),
              static_cast<std::uint8_t>(letter));
  }
  return letters;
}

// The letters of a set, as a set of PCRE2: [\x01\x05], or what never matches.
std::string letters_set(std::size_t set, const std::vector<std::vector<bool>>& members) {
  constexpr const char* kHex = "0123456789abcdef";
  std::string text;
  for (std::size_t letter = 0; letter < members.size(); ++letter) {
    if (members[letter][set]) text += std::string("\\x") + kHex[letter >> 4] + kHex[letter & 15];
  }
  return text.empty() ? "(?!)" : "[" + text + "]";
}

}  // namespace

void Expression::Deleter::operator()(pcre2_code* code) const { pcre2_code_free(code); }

Expression::Expression(const std::string& pattern) : pattern_(pattern) {
  const ParsedExpression parsed = parse_expression(pattern);
  std::vector<std::vector<bool>> members;
  const std::vector<std::uint8_t> letters = letters_of(parsed.sets, members);
  if (letters.empty()) throw NotSupported("the expression " + pattern + " with more than 256 kinds of characters");
  letters_ = std::make_unique<CharacterTable>(letters);
  for (char32_t c = 0; c < ascii_letters_.size(); ++c) ascii_letters_[c] = static_cast<char>((*letters_)[c]);

  std::string text;
  for (std::size_t i = 0; i < parsed.text.size(); ++i) {
    if (parsed.text[i] != kSetMark) {
      text += parsed.text[i];
      continue;
    }
    const auto digit = [&](std::size_t place) { return static_cast<std::size_t>(parsed.text[i + place] - 'a'); };
    text += letters_set(26 * digit(1) + digit(2), members);
    i += 2;
  }
  int error = 0;
  std::size_t place = 0;
  code_.reset(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), PCRE2_NEVER_UTF, &error, &place, nullptr));
  if (!code_) throw NotSupported("the expression " + pattern);
  pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // without it, the interpreter matches
}

// ---- search ---------------------------------------------------------------------------------------------------------

void Expression::Search::Deleter::operator()(void* data) const {
  pcre2_match_data_free(static_cast<pcre2_match_data*>(data));
}

Expression::Search::Search(const Expression& expression)
    : expression_(expression), data_(pcre2_match_data_create(1, nullptr)) {}

void Expression::Search::start(std::string_view text) {
  text_ = text;
  letters_.resize(text.size());
  is_ascii_ = true;
  std::size_t count = 0;
  for (std::size_t position = 0; position < text.size(); ++count) {
    const auto byte = static_cast<unsigned char>(text[position]);
    if (byte < 0x80) {
      letters_[count] = expression_.ascii_letters_[byte];
      ++position;
    } else {
      letters_[count] = static_cast<char>((*expression_.letters_)[next_character(text, position)]);
      is_ascii_ = false;
    }
  }
  letters_.resize(count);
  at_ = character_ = byte_ = 0;
  last_end_.reset();
}

bool Expression::Search::match(std::size_t from) {
  auto* data = static_cast<pcre2_match_data*>(data_.get());
  const auto* letters = reinterpret_cast<PCRE2_SPTR>(letters_.data());
  int found = pcre2_match(expression_.code_.get(), letters, letters_.size(), from, 0, data, nullptr);
  if (found == PCRE2_ERROR_JIT_STACKLIMIT) {
    found = pcre2_match(expression_.code_.get(), letters, letters_.size(), from, PCRE2_NO_JIT, data, nullptr);
  }
  if (found == PCRE2_ERROR_NOMATCH) return false;
  if (found < 0) {
    throw invalid("the text needs too many steps of the tokenizer's expression " + expression_.pattern_ +
                  "; shorten it, or pass token ids");
  }
  const std::size_t* places = pcre2_get_ovector_pointer(data);
  first_ = places[0];
  end_ = places[1];
  return true;
}

std::size_t Expression::Search::byte_of(std::size_t character) {
  if (is_ascii_) return character;
  for (; character_ < character; ++character_) byte_ += character_length(text_[byte_]);
  return byte_;
}

// An empty match right behind a match does not count, as in the `onig` crate.
std::optional<Span> Expression::Search::next() {
  while (at_ <= letters_.size()) {
    if (!match(at_)) return std::nullopt;
    if (first_ == end_ && last_end_ == end_) {
      ++at_;
      continue;
    }
    at_ = end_;
    last_end_ = end_;
    const std::size_t begin = byte_of(first_);
    return Span{begin, byte_of(end_)};
  }
  return std::nullopt;
}

}  // namespace megalodon::impl
