// Byte-level tokenizers: text to token ids, and token ids to bytes.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::impl {

// A tokenizer.json whose tokens are the 256 bytes and special tokens.
class Tokenizer {
 public:
  // Error MEGALODON_UNAVAILABLE for every other kind of tokenizer.
  explicit Tokenizer(const nlohmann::json& file);

  std::vector<std::int64_t> encode(std::string_view text) const;
  // The byte of a token. -1 for special and unknown tokens: they have no text.
  int byte_of(std::int64_t token_id) const;

 private:
  std::array<std::int64_t, 256> ids_{};
  std::map<std::int64_t, int> bytes_;
  std::vector<std::pair<std::string, std::int64_t>> special_;  // the longest first
};

}  // namespace megalodon::impl
