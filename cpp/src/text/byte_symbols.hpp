// The printable characters that stand for bytes in byte-level vocabularies: GPT-2's `bytes_to_unicode`.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>

namespace megalodon::impl {

// The symbol of each byte, in UTF-8.
const std::array<std::string, 256>& byte_symbols();

// The bytes that a text of symbols stands for. Nothing if a character is no symbol.
std::optional<std::string> bytes_of_symbols(std::string_view text);

std::string symbols_of_bytes(std::string_view bytes);

}  // namespace megalodon::impl
