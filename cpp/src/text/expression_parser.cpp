#include "text/expression_parser.hpp"

#include <algorithm>

#include "text/refusal.hpp"

namespace megalodon::impl {
namespace {

constexpr int kMostDepth = 100;
constexpr char kAfterGroup = '*';  // a value of `last_letter_`
// Pairs of letters that ignoring case also matches with one character, e.g. the ligature of "fi".
constexpr std::string_view kLigatures = "ss ff fi fl st";

bool is_letter(char32_t c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; }

// A letter in both cases, and the two other characters whose lower case is a letter of ASCII.
CharacterSet both_cases(char32_t letter) {
  CharacterSet set(letter, letter);
  set.add(letter ^ 32, letter ^ 32);
  if ((letter | 32) == 'k') set.add(0x212A, 0x212A);  // the sign of Kelvin
  if ((letter | 32) == 's') set.add(0x17F, 0x17F);    // the long s
  return set;
}

class Parser {
 public:
  explicit Parser(const std::string& pattern) : pattern_(pattern) {}

  ParsedExpression parse() {
    alternatives(false, 0);
    if (!at_end()) throw refused("an unmatched )");
    return std::move(parsed_);
  }

 private:
  NotSupported refused(const std::string& what) const {
    return NotSupported("the expression " + pattern_ + " with " + what);
  }

  bool at_end() const { return position_ == pattern_.size(); }
  char peek() const { return at_end() ? '\0' : pattern_[position_]; }
  bool take(std::string_view text) {
    if (!std::string_view(pattern_).substr(position_).starts_with(text)) return false;
    position_ += text.size();
    return true;
  }
  char32_t take_character() {
    if (at_end()) throw refused("an incomplete end");
    return next_character(pattern_, position_);
  }

  void alternatives(bool ignores_case, int depth) {
    if (depth > kMostDepth) throw refused("more than 100 groups inside each other");
    last_letter_ = 0;
    while (!at_end() && peek() != ')') {
      if (take("|")) {
        parsed_.text += '|';
        last_letter_ = 0;
        continue;
      }
      const std::size_t start = parsed_.text.size();
      atom(ignores_case, depth);
      quantifiers(start);
    }
  }

  void atom(bool ignores_case, int depth) {
    if (peek() == '(') return group(ignores_case, depth);
    if (peek() == '[') {
      last_letter_ = 0;
      return put(bracket(ignores_case));
    }
    if (take(".")) {
      last_letter_ = 0;
      return put(CharacterSet('\n', '\n').complement());
    }
    if (peek() == '\\') return escaped_atom(ignores_case);
    const char32_t c = take_character();
    if (c < 0x80 && std::string_view("^$*+?{").find(static_cast<char>(c)) != std::string_view::npos) {
      throw refused(std::string("a ") + static_cast<char>(c) + " in this place");
    }
    put_literal(c, ignores_case);
  }

  void escaped_atom(bool ignores_case) {
    CharacterSet set;
    char32_t literal = 0;
    if (escape(set, literal, ignores_case)) return put_literal(literal, ignores_case);
    last_letter_ = 0;
    put(set);
  }

  void put_literal(char32_t c, bool ignores_case) {
    if (!ignores_case) return put(CharacterSet(c, c));
    if (c >= 0x80) throw refused("a character outside ASCII whose case is ignored");
    const char lower = is_letter(c) ? static_cast<char>(c | 32) : '\0';
    if (lower != '\0' && last_letter_ == kAfterGroup) throw refused("a letter behind a group, whose case is ignored");
    const std::string pair{last_letter_, lower};
    if (lower != '\0' && last_letter_ != '\0' && kLigatures.find(pair) != std::string_view::npos) {
      throw refused("the letters " + pair + ", whose case is ignored");
    }
    last_letter_ = lower;
    put(lower == '\0' ? CharacterSet(c, c) : both_cases(c));
  }

  void put(const CharacterSet& set) {
    const auto same = std::ranges::find(parsed_.sets, set.ranges(), &CharacterSet::ranges);
    const auto index = static_cast<std::size_t>(same - parsed_.sets.begin());
    if (same == parsed_.sets.end()) parsed_.sets.push_back(set);
    if (index >= 26 * 26) throw refused("too many sets of characters");
    parsed_.text += {kSetMark, static_cast<char>('a' + index / 26), static_cast<char>('a' + index % 26)};
  }

  void group(bool ignores_case, int depth) {
    const char letter = last_letter_;
    ++position_;
    std::string opening = "(?:";
    if (take("?")) {
      for (const char* kind : {":", "=", "!", ">", "<=", "<!"}) {
        if (take(kind)) opening = std::string("(?") + kind;
      }
      if (opening == "(?:" && take("i:")) {
        ignores_case = true;
      } else if (opening == "(?:" && pattern_[position_ - 1] != ':') {
        throw refused(std::string("a group that begins with (?") + peek());
      }
    }
    parsed_.text += opening;
    alternatives(ignores_case, depth + 1);
    if (!take(")")) throw refused("an unmatched (");
    parsed_.text += ')';
    if (letter != 0) throw refused("a group behind a letter whose case is ignored");
    last_letter_ = ignores_case ? kAfterGroup : '\0';
  }

  // `X{1,3}+` repeats the repetition in Oniguruma, where PCRE2 would make it possessive.
  void quantifiers(std::size_t start) {
    bool first = true;
    for (;; first = false) {
      std::string quantifier;
      bool is_interval = false;
      if (take("?") || take("*") || take("+")) {
        quantifier = pattern_[position_ - 1];
      } else if (peek() == '{') {
        quantifier = interval();
        is_interval = true;
      } else {
        break;
      }
      last_letter_ = 0;
      if (!first) {
        parsed_.text.insert(start, "(?:");
        parsed_.text += ')';
      }
      if (is_interval && peek() == '?') throw refused("a lazy interval");
      if (!is_interval && (take("?") || take("+"))) quantifier += pattern_[position_ - 1];
      parsed_.text += quantifier;
    }
  }

  std::string interval() {
    const std::size_t end = pattern_.find('}', position_);
    if (end == std::string::npos) throw refused("an unmatched {");
    std::string text = pattern_.substr(position_, end + 1 - position_);
    const std::string inside = text.substr(1, text.size() - 2);
    const bool is_plain = !inside.empty() && inside.size() <= 7 && inside[0] != ',' &&
                          inside.find_first_not_of("0123456789,") == std::string::npos &&
                          std::ranges::count(inside, ',') <= 1;
    if (!is_plain) throw refused("the interval " + text);
    position_ = end + 1;
    return text;
  }

  // Reads an escape. True: it is a literal character; false: it is a set.
  bool escape(CharacterSet& set, char32_t& literal, bool ignores_case) {
    ++position_;
    const char32_t c = take_character();
    if (ignores_case && (c == 'w' || c == 'W')) throw refused("\\w where the case is ignored");
    switch (c) {
      case 's':
        return set = flag_set(kIsSpace), false;
      case 'S':
        return set = flag_set(kIsSpace).complement(), false;
      case 'd':
        return set = category_set("Nd"), false;
      case 'D':
        return set = category_set("Nd").complement(), false;
      case 'w':
        return set = flag_set(kIsWord), false;
      case 'W':
        return set = flag_set(kIsWord).complement(), false;
      case 'p':
      case 'P':
        return set = property(c == 'P', ignores_case), false;
      case 'n':
        return literal = '\n', true;
      case 'r':
        return literal = '\r', true;
      case 't':
        return literal = '\t', true;
      case 'f':
        return literal = '\f', true;
      case 'v':
        return literal = '\v', true;
      case 'x':
        return literal = hexadecimal(peek() == '{' ? 0 : 2), true;
      case 'u':
        return literal = hexadecimal(4), true;
      default:
        break;
    }
    if (c >= 0x80 || is_letter(c) || (c >= '0' && c <= '9')) throw refused("the escape \\" + to_utf8(c));
    literal = c;
    return true;
  }

  char32_t hexadecimal(std::size_t digits) {
    std::string text;
    if (digits == 0) {
      const std::size_t end = pattern_.find('}', position_);
      if (end != std::string::npos) text = pattern_.substr(position_ + 1, end - position_ - 1);
      position_ = end == std::string::npos ? position_ : end + 1;
    } else {
      text = pattern_.substr(position_, digits);
      position_ += text.size();
    }
    const bool is_number = !text.empty() && text.size() <= 6 && (digits == 0 || text.size() == digits) &&
                           text.find_first_not_of("0123456789abcdefABCDEF") == std::string::npos;
    const char32_t code = is_number ? static_cast<char32_t>(std::stoul(text, nullptr, 16)) : kLastCharacter + 1;
    if (code > kLastCharacter || (digits == 2 && code >= 0x80)) throw refused("the code " + text);
    return code;
  }

  CharacterSet property(bool is_negated, bool ignores_case) {
    const std::size_t end = pattern_.find('}', position_);
    if (peek() != '{' || end == std::string::npos) throw refused("\\p without a name in braces");
    std::string name = pattern_.substr(position_ + 1, end - position_ - 1);
    const std::string whole = name;
    position_ = end + 1;
    if (name.starts_with('^')) {
      is_negated = !is_negated;
      name.erase(0, 1);
    }
    CharacterSet set = name == "Han" ? flag_set(kIsHan) : category_set(name);
    if (set.ranges().empty()) throw refused("the property " + whole);
    if (ignores_case && name != "N" && name != "P") {
      throw refused("the property " + whole + " where the case is ignored");
    }
    return is_negated ? set.complement() : set;
  }

  CharacterSet bracket(bool ignores_case) {
    ++position_;
    const bool is_negated = take("^");
    CharacterSet set;
    for (bool first = true; !take("]"); first = false) {
      if (at_end()) throw refused("an unmatched [");
      if ((first && peek() == ']') || peek() == '[' || take("&&")) throw refused("a set inside a set");
      member(set, ignores_case);
    }
    if (set.ranges().empty()) throw refused("an empty set");
    return is_negated ? set.complement() : set;
  }

  // One character, range or class inside a set.
  void member(CharacterSet& set, bool ignores_case) {
    CharacterSet class_set;
    char32_t first = 0;
    if (!bracket_literal(class_set, first, ignores_case)) return set.add(class_set);
    char32_t last = first;
    const bool is_range = peek() == '-' && position_ + 1 < pattern_.size() && pattern_[position_ + 1] != ']';
    if (is_range) {
      ++position_;
      if (peek() == '[' || !bracket_literal(class_set, last, ignores_case) || last < first) {
        throw refused("a range that has no end");
      }
    }
    if (!ignores_case) return set.add(first, last);
    if (last >= 0x80) throw refused("a character outside ASCII whose case is ignored");
    for (char32_t c = first; c <= last; ++c) set.add(is_letter(c) ? both_cases(c) : CharacterSet(c, c));
  }

  bool bracket_literal(CharacterSet& set, char32_t& literal, bool ignores_case) {
    if (peek() == '\\') return escape(set, literal, ignores_case);
    literal = take_character();
    return true;
  }

  const std::string& pattern_;
  std::size_t position_ = 0;
  char last_letter_ = 0;  // the letter before this place, in lower case, where the case is ignored
  ParsedExpression parsed_;
};

}  // namespace

ParsedExpression parse_expression(const std::string& pattern) { return Parser(pattern).parse(); }

}  // namespace megalodon::impl
