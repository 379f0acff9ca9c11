#include "text/vocabulary.hpp"

#include "text/refusal.hpp"

namespace megalodon::impl {

void Vocabulary::add(const std::string& token, TokenId id) {
  ids_[token] = id;
  if (!tokens_.emplace(id, token).second) {
    throw NotSupported("two tokens of the id " + std::to_string(id));
  }
}

std::string byte_token(unsigned char byte) {
  constexpr const char* kHex = "0123456789ABCDEF";
  return std::string("<0x") + kHex[byte >> 4] + kHex[byte & 15] + '>';
}

}  // namespace megalodon::impl
