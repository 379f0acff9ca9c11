// UTF-8, as table 3-7 of the Unicode standard defines it.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace megalodon::impl {

// The bytes of the character that begins with this byte; 0 if none does.
std::size_t utf8_length(unsigned char lead);

// Whether `byte` may be the byte number `index`, 1 or more, of the character that begins with `lead`.
bool utf8_continues(unsigned char lead, std::size_t index, unsigned char byte);

bool is_utf8(std::string_view text);

// Error MEGALODON_INVALID_ARGUMENT "NAME is not UTF-8 at byte N" unless the text is UTF-8. N counts from 0. It is the
// first byte of the character that is wrong.
void require_utf8(std::string_view text, const std::string& name);

}  // namespace megalodon::impl
