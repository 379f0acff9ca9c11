// A bundle's tokenizer.json: text to token ids, and token ids to text, as Python's `tokenizers` does.
#pragma once

#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "text/added_tokens.hpp"
#include "text/decoder.hpp"
#include "text/model.hpp"
#include "text/normalizer.hpp"
#include "text/pre_tokenizer.hpp"

namespace megalodon::impl {

class Tokenizer {
 public:
  // Error MEGALODON_UNAVAILABLE, with the name of what is not supported, for a tokenizer of another kind.
  explicit Tokenizer(const nlohmann::json& file);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Any number of threads may call it. The text must be UTF-8.
  std::vector<std::int64_t> encode(std::string_view text) const;
  // Null: the token has no text, because it is special or not known.
  const std::string* text_of(std::int64_t token_id) const;
  const Decoder& decoder() const { return parts_.decoder; }

 private:
  struct Parts {
    std::unique_ptr<Normalizer> normalizer;
    PreTokenizers pre_tokenizers;
    std::unique_ptr<Model> model;
    std::unique_ptr<AddedTokens> added;
    TokenIds before, after;  // what the post-processor puts around a text
    Decoder decoder;
  };
  struct Memory;

  static Parts read(const nlohmann::json& file);
  void encode_plain(std::string_view text, bool is_start, Memory& memory, TokenIds& ids) const;
  std::unique_ptr<Memory> take_memory() const;

  const Parts parts_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Memory>> free_memories_;
};

}  // namespace megalodon::impl
