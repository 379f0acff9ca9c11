#include "text/pre_tokenizer.hpp"

#include <algorithm>

#include "text/json_fields.hpp"
#include "text/unicode.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;
using Match = PreTokenizer::Match;

constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// How a splitter treats its matches: they are dropped, or become pieces alone or with their neighbours.
enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

Behavior behavior_of(const json& file, const char* otherwise = nullptr) {
  const auto name =
      otherwise == nullptr ? field<std::string>(file, "behavior") : field_or<std::string>(file, "behavior", otherwise);
  if (name == "Removed") return Behavior::removed;
  if (name == "Isolated") return Behavior::isolated;
  if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
  if (name == "MergedWithNext") return Behavior::merged_with_next;
  if (name == "Contiguous") return Behavior::contiguous;
  throw NotSupported("the behavior " + name);
}

void emit(const Piece& piece, Span span, const PieceSink& sink) {
  if (span.begin == span.end) return;
  const std::size_t at_start = span.begin < piece.at_start ? std::min(piece.at_start, span.end) - span.begin : 0;
  sink({piece.text.substr(span.begin, span.end - span.begin), at_start});
}

// Joins matches with what is beside them. Goes backwards for `merged_with_next`.
void join(std::vector<Match>& matches, Behavior behavior) {
  const bool is_backward = behavior == Behavior::merged_with_next;
  if (is_backward) std::ranges::reverse(matches);
  std::size_t written = 0;
  bool was_match = false;
  for (const Match one : matches) {
    const bool joins = behavior == Behavior::contiguous ? one.is_match == was_match : one.is_match && !was_match;
    was_match = one.is_match;
    if (joins && written > 0) {
      Span& last = matches[written - 1].span;
      (is_backward ? last.begin : last.end) = is_backward ? one.span.begin : one.span.end;
    } else {
      matches[written++] = one;
    }
  }
  matches.resize(written);
  if (is_backward) std::ranges::reverse(matches);
}

// Splits a piece at the matches that `next` gives one after the other.
template <class Next>
void split_at(const Piece& piece, Behavior behavior, bool inverted, std::vector<Match>& matches, const PieceSink& sink,
              Next next) {
  const bool is_simple = behavior == Behavior::isolated || behavior == Behavior::removed;
  const auto take = [&](Span span, bool is_match) {
    if (!is_simple) return matches.push_back({span, is_match != inverted});
    if (behavior == Behavior::isolated || is_match == inverted) emit(piece, span, sink);
  };
  matches.clear();
  std::size_t done = 0;
  while (const std::optional<Span> match = next()) {
    if (done != match->begin) take({done, match->begin}, false);
    take(*match, true);
    done = match->end;
  }
  if (done != piece.text.size()) take({done, piece.text.size()}, false);
  if (is_simple) return;
  join(matches, behavior);
  for (const Match& one : matches) emit(piece, one.span, sink);
}

Expression::Search& started(PreTokenizer::Memory& memory, const Expression& expression, std::string_view text) {
  if (!memory.search) memory.search.emplace(expression);
  memory.search->start(text);
  return *memory.search;
}

// ---- the kinds ------------------------------------------------------------------------------------------------------

class Split final : public PreTokenizer {
 public:
  explicit Split(const json& file)
      : pattern_(pattern_of(file)), behavior_(behavior_of(file)), inverted_(field<bool>(file, "invert")) {
    if (pattern_.is_expression) expression_.emplace(pattern_.text);
  }
  void split(const Piece& piece, Memory& memory, const PieceSink& sink) const override {
    if (expression_) {
      Expression::Search& search = started(memory, *expression_, piece.text);
      return split_at(piece, behavior_, inverted_, memory.matches, sink, [&] { return search.next(); });
    }
    std::size_t from = 0;
    split_at(piece, behavior_, inverted_, memory.matches, sink, [&]() -> std::optional<Span> {
      const std::size_t at = piece.text.find(pattern_.text, from);
      if (at == std::string_view::npos) return std::nullopt;
      return Span{at, from = at + pattern_.text.size()};
    });
  }

 private:
  PatternText pattern_;
  Behavior behavior_;
  bool inverted_;
  std::optional<Expression> expression_;
};

// Splits at single characters.
template <class IsMatch>
class CharacterSplit final : public PreTokenizer {
 public:
  CharacterSplit(IsMatch is_match, Behavior behavior) : is_match_(is_match), behavior_(behavior) {}
  void split(const Piece& piece, Memory& memory, const PieceSink& sink) const override {
    std::size_t position = 0;
    split_at(piece, behavior_, false, memory.matches, sink, [&]() -> std::optional<Span> {
      while (position < piece.text.size()) {
        const std::size_t start = position;
        if (is_match_(next_character(piece.text, position))) return Span{start, position};
      }
      return std::nullopt;
    });
  }

 private:
  IsMatch is_match_;
  Behavior behavior_;
};

template <class IsMatch>
std::unique_ptr<PreTokenizer> character_split(IsMatch is_match, Behavior behavior) {
  return std::make_unique<CharacterSplit<IsMatch>>(is_match, behavior);
}

std::unique_ptr<PreTokenizer> flag_split(CharacterFlag flag, Behavior behavior) {
  return character_split([flag](char32_t c) { return has_flag(c, flag); }, behavior);
}

// Runs of word characters, and runs of others that are no space.
class Whitespace final : public PreTokenizer {
 public:
  void split(const Piece& piece, Memory&, const PieceSink& sink) const override {
    Span run{0, 0};
    int kind = 0;  // 0: spaces
    for (std::size_t position = 0; position < piece.text.size();) {
      const std::size_t start = position;
      const std::uint8_t flags = character_flags()[next_character(piece.text, position)];
      const int own = (flags & kIsSpace) != 0 ? 0 : (flags & kIsRustWord) != 0 ? 1 : 2;
      if (own != kind) {
        if (kind != 0) emit(piece, run, sink);
        run.begin = start;
        kind = own;
      }
      run.end = position;
    }
    if (kind != 0) emit(piece, run, sink);
  }
};

class Metaspace final : public PreTokenizer {
 public:
  explicit Metaspace(const json& file)
      : replacement_(field<std::string>(file, "replacement")),
        scheme_(field_or<std::string>(file, "prepend_scheme", "always")),
        splits_(field_or<bool>(file, "split", true)) {
    if (!field_or<bool>(file, "add_prefix_space", true)) scheme_ = "never";
    if (replacement_.empty() || character_length(replacement_[0]) != replacement_.size()) {
      throw NotSupported("a Metaspace whose replacement is not one character");
    }
    if (scheme_ != "always" && scheme_ != "first" && scheme_ != "never") {
      throw NotSupported("a Metaspace with the scheme " + scheme_);
    }
  }

  void split(const Piece& piece, Memory& memory, const PieceSink& sink) const override {
    std::string& text = memory.text;
    const bool begins = piece.text.starts_with(replacement_) || piece.text[0] == ' ';
    text.clear();
    std::size_t at_start = 0;
    if (!begins && (scheme_ == "always" || (scheme_ == "first" && piece.at_start > 0))) text = replacement_;
    if (piece.at_start > 0) at_start = text.size();
    for (std::size_t position = 0; position < piece.text.size();) {
      std::size_t space = std::min(piece.text.find(' ', position), piece.text.size());
      text.append(piece.text, position, space - position);
      if (space < piece.text.size()) text += replacement_;
      if (position < piece.at_start) at_start += std::min(space, piece.at_start) - position;
      if (space < piece.at_start) at_start += replacement_.size();
      position = space + 1;
    }
    split_words({text, at_start}, sink);
  }

 private:
  // A word begins with each replacement.
  void split_words(const Piece& piece, const PieceSink& sink) const {
    std::size_t begin = 0;
    while (splits_ && begin < piece.text.size()) {
      const std::size_t next = piece.text.find(replacement_, begin + 1);
      if (next == std::string_view::npos) break;
      emit(piece, {begin, next}, sink);
      begin = next;
    }
    emit(piece, {begin, piece.text.size()}, sink);
  }

  std::string replacement_, scheme_;
  bool splits_;
};

class ByteLevel final : public PreTokenizer {
 public:
  explicit ByteLevel(const json& file) : adds_space_(field<bool>(file, "add_prefix_space")) {
    if (field_or<bool>(file, "use_regex", true)) expression_.emplace(kGpt2);
  }
  void split(const Piece& piece, Memory& memory, const PieceSink& sink) const override {
    Piece whole = piece;
    if (adds_space_ && piece.text[0] != ' ') {
      memory.text.assign(" ").append(piece.text);
      whole.text = memory.text;
    }
    if (!expression_) return sink(whole);
    Expression::Search& search = started(memory, *expression_, whole.text);
    split_at(whole, Behavior::isolated, false, memory.matches, sink, [&] { return search.next(); });
  }

 private:
  bool adds_space_;
  std::optional<Expression> expression_;
};

}  // namespace

// ---- reading them ---------------------------------------------------------------------------------------------------

PreTokenizers::PreTokenizers(const json& file) {
  if (!file.is_null()) add(file);
}

void PreTokenizers::add(const json& file) {
  const auto type = field<std::string>(file, "type");
  if (type == "Sequence") {
    for (const json& one : field<json>(file, "pretokenizers")) add(one);
    return;
  }
  if (is_byte_level_) throw NotSupported("the pre-tokenizer " + type + " behind ByteLevel");
  if (type == "ByteLevel") {
    is_byte_level_ = true;
    steps_.push_back(std::make_unique<ByteLevel>(file));
  } else if (type == "Split") {
    steps_.push_back(std::make_unique<Split>(file));
  } else if (type == "Metaspace") {
    steps_.push_back(std::make_unique<Metaspace>(file));
  } else if (type == "Whitespace") {
    steps_.push_back(std::make_unique<Whitespace>());
  } else if (type == "WhitespaceSplit") {
    steps_.push_back(flag_split(kIsSpace, Behavior::removed));
  } else if (type == "Punctuation") {
    steps_.push_back(flag_split(kIsPunctuation, behavior_of(file, "Isolated")));
  } else if (type == "Digits") {
    const bool each = field<bool>(file, "individual_digits");
    steps_.push_back(flag_split(kIsNumeric, each ? Behavior::isolated : Behavior::contiguous));
  } else if (type == "CharDelimiterSplit") {
    const auto delimiter = field<std::string>(file, "delimiter");
    std::size_t end = 0;
    if (delimiter.empty()) throw NotSupported("a CharDelimiterSplit without a delimiter");
    const char32_t character = next_character(delimiter, end);
    steps_.push_back(character_split([character](char32_t c) { return c == character; }, Behavior::removed));
  } else {
    throw NotSupported("the pre-tokenizer " + type);
  }
}

void PreTokenizers::run(std::size_t step, const Piece& piece, Memory& memory, const PieceSink& sink) const {
  if (piece.text.empty()) return;
  if (step == steps_.size()) return sink(piece);
  if (step + 1 == steps_.size()) return steps_[step]->split(piece, memory[step], sink);
  const auto next = [&](const Piece& part) { run(step + 1, part, memory, sink); };
  steps_[step]->split(piece, memory[step], PieceSink(next));
}

}  // namespace megalodon::impl
