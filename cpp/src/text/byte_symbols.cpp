#include "text/byte_symbols.hpp"

#include "text/unicode.hpp"

namespace megalodon::impl {
namespace {

constexpr std::size_t kSymbolEnd = 0x144;  // behind the last symbol

std::array<char32_t, 256> symbol_characters() {
  std::array<char32_t, 256> symbols{};
  char32_t replacement = 256;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    symbols[byte] = printable ? byte : replacement++;
  }
  return symbols;
}

}  // namespace

const std::array<std::string, 256>& byte_symbols() {
  static const std::array<std::string, 256> symbols = [] {
    std::array<std::string, 256> texts;
    const auto characters = symbol_characters();
    for (std::size_t byte = 0; byte < 256; ++byte) texts[byte] = to_utf8(characters[byte]);
    return texts;
  }();
  return symbols;
}

std::optional<std::string> bytes_of_symbols(std::string_view text) {
  static const std::array<int, kSymbolEnd> bytes = [] {
    std::array<int, kSymbolEnd> table{};
    table.fill(-1);
    const auto characters = symbol_characters();
    for (int byte = 0; byte < 256; ++byte) table[characters[static_cast<std::size_t>(byte)]] = byte;
    return table;
  }();
  std::string found;
  for (std::size_t position = 0; position < text.size();) {
    const char32_t c = next_character(text, position);
    if (c >= kSymbolEnd || bytes[c] < 0) return std::nullopt;
    found += static_cast<char>(bytes[c]);
  }
  return found;
}

std::string symbols_of_bytes(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) text += byte_symbols()[static_cast<unsigned char>(byte)];
  return text;
}

}  // namespace megalodon::impl
