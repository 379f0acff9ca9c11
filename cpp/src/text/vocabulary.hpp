// Tokens and their ids.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace megalodon::impl {

using TokenId = std::uint32_t;

// Lets a table of strings be asked for a part of a text.
struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
template <class Value>
using TextMap = std::unordered_map<std::string, Value, TextHash, std::equal_to<>>;

class Vocabulary {
 public:
  // Gives a token its id. A token's last id counts; each id keeps its token. Throws NotSupported for an id with two.
  void add(const std::string& token, TokenId id);

  std::optional<TokenId> id_of(std::string_view token) const {
    const auto found = ids_.find(token);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }
  // Null: no token has this id.
  const std::string* token_of(std::int64_t id) const {
    const auto found = id < 0 || id > kMostId ? tokens_.end() : tokens_.find(static_cast<TokenId>(id));
    return found == tokens_.end() ? nullptr : &found->second;
  }
  std::size_t size() const { return tokens_.size(); }

 private:
  static constexpr std::int64_t kMostId = 0xFFFFFFFF;

  TextMap<TokenId> ids_;
  std::unordered_map<TokenId, std::string> tokens_;
};

// The token of a byte that the vocabulary has no character for, e.g. "<0x0A>".
std::string byte_token(unsigned char byte);

}  // namespace megalodon::impl
