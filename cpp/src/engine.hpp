// An engine: the weights and programs of one bundle, for any number of threads.
#pragma once

#include <memory>
#include <optional>
#include <span>

#include "cache.hpp"
#include "programs.hpp"
#include "tokenizer.hpp"

namespace megalodon::impl {

class Engine {
 public:
  Engine(const std::filesystem::path& folder, bool check_hashes, int concurrency);

  const Manifest& manifest() const { return manifest_; }
  std::int64_t weight_bytes() const { return weight_bytes_; }
  std::int64_t state_bytes() const;
  bool has_tokenizer() const { return tokenizer_.has_value(); }
  const Tokenizer& tokenizer() const;  // Error MEGALODON_UNAVAILABLE with the reason if there is none

  // Fresh streams.
  CacheView new_cache(std::int64_t rows = 1) const;

  // Feeds tokens, any number from 1 on, to a cache of one row; logits (V, or empty) after the last.
  void prefill(std::span<const std::int64_t> token_ids, const CacheView& cache, std::span<float> logits) const;
  // Feeds one token to each row; logits (rows x V, or empty).
  void decode(std::span<const std::int64_t> token_ids, const CacheView& cache, std::span<float> logits) const;

  // Error MEGALODON_INVALID_ARGUMENT unless all ids are the model's.
  void check_ids(std::span<const std::int64_t> token_ids) const;
  void check_batch(std::int64_t batch) const;

 private:
  Manifest manifest_;
  std::int64_t weight_bytes_ = 0;
  std::optional<Tokenizer> tokenizer_;
  std::string no_tokenizer_;
  std::optional<WeightStore> weights_;
  std::map<std::string, Program> programs_;
};

}  // namespace megalodon::impl
