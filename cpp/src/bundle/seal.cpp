#include "bundle/seal.hpp"

#include <algorithm>
#include <string_view>

#include "bundle/file.hpp"

namespace megalodon::impl {

Seal check_seal(std::string text) {
  constexpr std::string_view kBefore = "\"seal\": \"", kAfter = "\"\n}\n";
  constexpr std::size_t kDigits = 64;
  const std::size_t size = kBefore.size() + kDigits + kAfter.size();
  if (text.size() < size) return Seal::none;
  const std::string_view end = std::string_view(text).substr(text.size() - size);
  const std::string seal(end.substr(kBefore.size(), kDigits));
  const auto is_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (!end.starts_with(kBefore) || !end.ends_with(kAfter) || !std::ranges::all_of(seal, is_digit)) return Seal::none;
  text.replace(text.size() - kAfter.size() - kDigits, kDigits, kDigits, '0');
  return sha256_of(std::string_view(text)) == seal ? Seal::intact : Seal::broken;
}

}  // namespace megalodon::impl
