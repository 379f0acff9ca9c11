#include "utf8.hpp"

#include "error.hpp"

namespace megalodon::impl {

std::size_t utf8_length(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return 0;
  return lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

bool utf8_continues(unsigned char lead, std::size_t index, unsigned char byte) {
  const unsigned char low = index > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = index > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  return byte >= low && byte <= high;
}

namespace {

// The place of the first character that is not UTF-8; the size of the text if there is none.
std::size_t first_wrong(std::string_view text) {
  std::size_t start = 0;
  while (start < text.size()) {
    const auto lead = static_cast<unsigned char>(text[start]);
    const std::size_t length = utf8_length(lead);
    bool whole = length > 0 && length <= text.size() - start;
    for (std::size_t i = 1; whole && i < length; ++i) {
      whole = utf8_continues(lead, i, static_cast<unsigned char>(text[start + i]));
    }
    if (!whole) break;
    start += length;
  }
  return start;
}

}  // namespace

bool is_utf8(std::string_view text) { return first_wrong(text) == text.size(); }

void require_utf8(std::string_view text, const std::string& name) {
  const std::size_t wrong = first_wrong(text);
  if (wrong < text.size()) throw invalid(name + " is not UTF-8 at byte " + std::to_string(wrong));
}

}  // namespace megalodon::impl
