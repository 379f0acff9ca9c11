#include "python_format.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <optional>
#include <string_view>
#include <utility>

#include "error.hpp"
#include "utf8.hpp"

namespace megalodon::impl {

std::string repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  const double magnitude = std::fabs(value);
  const bool plain = magnitude == 0.0 || (magnitude >= 1e-4 && magnitude < 1e16);
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value,
                                 plain ? std::chars_format::fixed : std::chars_format::scientific);
  std::string text(buffer, end.ptr);
  return plain && text.find('.') == std::string::npos ? text + ".0" : text;
}

std::string repr(const std::string& text) {
  const char quote = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
  std::string result(1, quote);
  for (const char c : text) {
    if (c == quote || c == '\\') result += '\\';
    result += c;
  }
  return result + quote;
}

std::string repr(const nlohmann::json& value) {
  if (value.is_null()) return "None";
  if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
  if (value.is_string()) return repr(value.get_ref<const std::string&>());
  if (value.is_number_float()) return repr(value.get<double>());
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string type_name(const nlohmann::json& value) {
  if (value.is_null()) return "NoneType";
  if (value.is_boolean()) return "bool";
  if (value.is_string()) return "str";
  if (value.is_array()) return "list";
  if (value.is_number_float()) return "float";
  return value.is_object() ? "dict" : "int";
}

namespace {

// The number of bytes of the UTF-8 sequence that a text begins with; 0 if it begins with none.
std::size_t sequence_length(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  const std::size_t length = utf8_length(lead);
  if (length > text.size()) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if (!utf8_continues(lead, i, static_cast<unsigned char>(text[i]))) return 0;
  }
  return length;
}

// Characters that a terminal obeys instead of showing them: control characters, and those that are invisible or change
// the order of the text around them. First and last code points.
constexpr std::array<std::pair<unsigned, unsigned>, 6> kControl{{{0x0, 0x1F},
                                                                 {0x7F, 0x9F},
                                                                 {0x200B, 0x200F},
                                                                 {0x2028, 0x202E},
                                                                 {0x2060, 0x206F},
                                                                 {0xFEFF, 0xFEFF}}};

// Whether a UTF-8 sequence is a control character, and its code point if it is.
std::optional<unsigned> control_character(std::string_view sequence) {
  unsigned code = static_cast<unsigned char>(sequence[0]);
  if (sequence.size() > 1) code &= 0x7FU >> sequence.size();
  for (const char byte : sequence.substr(1)) code = (code << 6) | (static_cast<unsigned char>(byte) & 0x3FU);
  const bool found = std::ranges::any_of(kControl, [&](const auto& range) {
    return code >= range.first && code <= range.second;
  });
  return found ? std::optional(code) : std::nullopt;
}

}  // namespace

bool has_control_characters(const std::string& text) {
  for (std::string_view rest = text; !rest.empty();) {
    const std::size_t length = std::max<std::size_t>(sequence_length(rest), 1);
    if (sequence_length(rest) > 0 && control_character(rest.substr(0, length))) return true;
    rest.remove_prefix(length);
  }
  return false;
}

std::string shown(const std::string& text) {
  std::string result;
  for (std::string_view rest = text; !rest.empty();) {
    const std::size_t length = sequence_length(rest);
    const std::string_view sequence = rest.substr(0, std::max<std::size_t>(length, 1));
    const auto code = length == 0 ? std::optional<unsigned>(static_cast<unsigned char>(rest[0]))
                                  : control_character(sequence);
    if (code) {
      result += *code < 0x100 ? "\\x" : "\\u";
      for (int shift = *code < 0x100 ? 4 : 12; shift >= 0; shift -= 4) result += "0123456789abcdef"[(*code >> shift) & 15];
    } else {
      result += sequence;
    }
    rest.remove_prefix(sequence.size());
  }
  return result;
}

std::string shown_lines(const std::string& text) {
  std::string result;
  for (std::size_t start = 0; start <= text.size();) {
    const std::size_t end = std::min(text.find('\n', start), text.size());
    if (start > 0) result += '\n';
    result += shown(text.substr(start, end - start));
    start = end + 1;
  }
  return result;
}

std::string list_text(const std::vector<int64_t>& values) {
  std::vector<std::string> items;
  for (const int64_t value : values) items.push_back(std::to_string(value));
  return std::string("[").append(with_commas(items)).append("]");
}

std::string with_commas(const std::vector<std::string>& items) {
  std::string text;
  for (std::size_t i = 0; i < items.size(); ++i) text.append(i == 0 ? "" : ", ").append(items[i]);
  return text;
}

}  // namespace megalodon::impl
