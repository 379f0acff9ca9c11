#include "text/normalizer.hpp"

#include <algorithm>
#include <optional>
#include <vector>

#include "text/byte_symbols.hpp"
#include "text/expression.hpp"
#include "text/json_fields.hpp"
#include "text/normal_forms.hpp"
#include "text/unicode.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

// A normalizer that changes each character by itself.
template <std::string (*change)(std::string_view)>
class CharacterNormalizer final : public Normalizer {
 public:
  void apply(NormalizedText& text) const override {
    text.at_start = change(std::string_view(text.text).substr(0, text.at_start)).size();
    text.text = change(text.text);
  }
};

std::string without_marks(std::string_view text) {
  std::string kept;
  for (std::size_t position = 0; position < text.size();) {
    const char32_t c = next_character(text, position);
    if (!has_flag(c, kIsMark)) append_character(kept, c);
  }
  return kept;
}

// The normalizer Nmt, of machine translation: without control characters, and with one kind of space.
std::string without_controls(std::string_view text) {
  std::string kept;
  for (std::size_t position = 0; position < text.size();) {
    const char32_t c = next_character(text, position);
    const bool is_removed =
        (c >= 0x1 && c <= 0x8) || c == 0xB || (c >= 0xE && c <= 0x1F) || c == 0x7F || c == 0x8F || c == 0x9F;
    const bool is_space = c == 0x9 || c == 0xA || c == 0xC || c == 0xD || c == 0x1680 || (c >= 0x200B && c <= 0x200F) ||
                          c == 0x2028 || c == 0x2029 || c == 0x2581 || c == 0xFEFF || c == 0xFFFD;
    if (!is_removed) append_character(kept, is_space ? U' ' : c);
  }
  return kept;
}

class FormNormalizer final : public Normalizer {
 public:
  explicit FormNormalizer(NormalForm form) : form_(form) {}
  void apply(NormalizedText& text) const override {
    if (text.at_start > 0) text.at_start = start_after(text);
    text.text = normal_form(text.text, form_);
  }

 private:
  // The beginning of a text changes with what follows, e.g. a mark. No more than this is looked at.
  static constexpr std::size_t kLooked = 4096;

  std::size_t start_after(const NormalizedText& text) const {
    std::size_t end = std::min(text.text.size(), std::max(kLooked, text.at_start));
    while (end < text.text.size() && (static_cast<unsigned char>(text.text[end]) & 0xC0) == 0x80) ++end;
    const std::string_view whole = std::string_view(text.text).substr(0, end);
    std::size_t source = 0, start = 0;
    for (const auto& [character, change] : changes_to_normal_form(whole, form_)) {
      if (change > 0 ? source > text.at_start : source >= text.at_start) break;
      start += to_utf8(character).size();
      for (int i = change; i <= 0 && source < whole.size(); ++i) source += character_length(whole[source]);
    }
    return start;
  }

  NormalForm form_;
};

class Strip final : public Normalizer {
 public:
  explicit Strip(const json& file) : left_(field<bool>(file, "strip_left")), right_(field<bool>(file, "strip_right")) {}
  void apply(NormalizedText& text) const override {
    std::size_t begin = 0;
    std::string_view rest = text.text;
    while (left_ && begin < rest.size()) {
      std::size_t next = begin;
      if (!has_flag(next_character(rest, next), kIsSpace)) break;
      begin = next;
    }
    rest.remove_prefix(begin);
    while (right_ && !rest.empty()) {
      const char32_t last = last_character(rest);
      if (!has_flag(last, kIsSpace)) break;
      rest.remove_suffix(to_utf8(last).size());
    }
    text.at_start = std::min(text.at_start - std::min(text.at_start, begin), rest.size());
    text.text = std::string(rest);
  }

 private:
  bool left_, right_;
};

class Prepend final : public Normalizer {
 public:
  explicit Prepend(const json& file) : prefix_(field<std::string>(file, "prepend")) {}
  void apply(NormalizedText& text) const override {
    if (text.text.empty()) return;
    text.text.insert(0, prefix_);
    if (text.at_start > 0) text.at_start += prefix_.size();
  }

 private:
  std::string prefix_;
};

class Replace final : public Normalizer {
 public:
  explicit Replace(const json& file) : pattern_(pattern_of(file)), content_(field<std::string>(file, "content")) {
    if (pattern_.is_expression) expression_.emplace(pattern_.text);
  }

  void apply(NormalizedText& text) const override {
    NormalizedText changed;
    changed.text.reserve(text.text.size());
    std::size_t done = 0;
    const auto keep = [&](std::size_t end) {
      changed.text.append(text.text, done, end - done);
      if (done < text.at_start) changed.at_start += std::min(end, text.at_start) - done;
    };
    const auto replace = [&](std::size_t begin, std::size_t end) {
      keep(begin);
      changed.text += content_;
      if (end <= text.at_start || end == 0) changed.at_start += content_.size();
      done = end;
    };
    if (expression_) {
      Expression::Search search(*expression_);
      search.start(text.text);
      while (const auto match = search.next()) replace(match->begin, match->end);
    } else {
      for (std::size_t at = 0; (at = text.text.find(pattern_.text, done)) != std::string::npos;) {
        replace(at, at + pattern_.text.size());
      }
    }
    keep(text.text.size());
    text = std::move(changed);
  }

 private:
  PatternText pattern_;
  std::string content_;
  std::optional<Expression> expression_;
};

class Sequence final : public Normalizer {
 public:
  explicit Sequence(const json& file) {
    for (const json& one : field<json>(file, "normalizers")) parts_.push_back(read_normalizer(one));
  }
  void apply(NormalizedText& text) const override {
    for (const auto& part : parts_) part->apply(text);
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> parts_;
};

}  // namespace

std::unique_ptr<Normalizer> read_normalizer(const json& file) {
  if (file.is_null()) return nullptr;
  const auto type = field<std::string>(file, "type");
  if (type == "Sequence") return std::make_unique<Sequence>(file);
  if (type == "NFC") return std::make_unique<FormNormalizer>(NormalForm{false, true});
  if (type == "NFD") return std::make_unique<FormNormalizer>(NormalForm{false, false});
  if (type == "NFKC") return std::make_unique<FormNormalizer>(NormalForm{true, true});
  if (type == "NFKD") return std::make_unique<FormNormalizer>(NormalForm{true, false});
  if (type == "Lowercase") return std::make_unique<CharacterNormalizer<lowercase>>();
  if (type == "StripAccents") return std::make_unique<CharacterNormalizer<without_marks>>();
  if (type == "Nmt") return std::make_unique<CharacterNormalizer<without_controls>>();
  if (type == "ByteLevel") return std::make_unique<CharacterNormalizer<symbols_of_bytes>>();
  if (type == "Strip") return std::make_unique<Strip>(file);
  if (type == "Prepend") return std::make_unique<Prepend>(file);
  if (type == "Replace") return std::make_unique<Replace>(file);
  throw NotSupported("the normalizer " + type);
}

}  // namespace megalodon::impl
