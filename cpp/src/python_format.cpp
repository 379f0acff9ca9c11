#include "python_format.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <string_view>

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
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
  const unsigned first = byte(0), second = byte(1);
  if (first < 0x80) return 1;
  const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4) return 0;
  // No sequence longer than needed, no surrogate, nothing beyond U+10FFFF.
  if ((first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F)) return 0;
  if ((first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F)) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  return length;
}

// Whether a UTF-8 sequence is a control character, and its code point if it is.
std::optional<unsigned> control_character(std::string_view sequence) {
  const unsigned first = static_cast<unsigned char>(sequence[0]);
  if (sequence.size() == 1 && (first < ' ' || first == 0x7F)) return first;
  if (sequence.size() == 2 && first == 0xC2 && static_cast<unsigned char>(sequence[1]) < 0xA0) {
    return static_cast<unsigned char>(sequence[1]);
  }
  return std::nullopt;
}

}  // namespace

bool has_control_characters(const std::string& text) {
  for (std::string_view rest = text; !rest.empty();) {
    const std::size_t length = std::max<std::size_t>(sequence_length(rest), 1);
    if (control_character(rest.substr(0, length))) return true;
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
      for (const char digit : {'\\', 'x', "0123456789abcdef"[*code >> 4], "0123456789abcdef"[*code & 15]}) {
        result += digit;
      }
    } else {
      result += sequence;
    }
    rest.remove_prefix(sequence.size());
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
