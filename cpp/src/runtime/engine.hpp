// An engine: the weights and programs of one bundle, for any number of threads.
#pragma once

#include <memory>
#include <optional>
#include <span>

#include "bundle/tokenizer.hpp"
#include "megalodon.h"
#include "runtime/cache.hpp"
#include "runtime/programs.hpp"

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
  CacheRow new_cache() const;
  // Memory for states, which are whatever they are. The engine must outlive it.
  std::shared_ptr<CacheBlock> new_block(std::int64_t rows) const;

  // Feeds tokens, any number from 1 on, to each row; logits (rows x V, or empty) after the last of each.
  void prefill(std::span<const std::span<const std::int64_t>> token_ids, const CacheView& cache,
               std::span<float> logits) const;
  // Feeds one token to each row; logits (rows x V, or empty), and the most probable token of each (or empty).
  // MEGALODON_FAILED if the logits have none.
  void decode(std::span<const std::int64_t> token_ids, const CacheView& cache, std::span<float> logits,
              std::span<std::int64_t> greedy = {}) const;

  // The decode step over these rows as the device has recorded it; null where it records none.
  RecordedStep* recorded(const CacheView& cache) const;
  // The program that feeds one token to each of so many rows.
  const Program& decode_program(std::int64_t rows) const;

  // Feeds one token to each row and samples the next; `indices` are the draws of the rows' samplers.
  void step(std::span<const std::int64_t> token_ids, const CacheView& cache,
            std::span<const megalodon_sampling> samplings, std::span<const std::uint64_t> indices,
            std::span<std::int64_t> next) const;

  // Error MEGALODON_INVALID_ARGUMENT unless there are ids, and all are the model's.
  void check_ids(std::span<const std::int64_t> token_ids) const;
  void check_batch(std::int64_t batch) const;

 private:
  // Logits (rows, V) of a call, in the device's memory.
  const float* values_of(const Tensor& logits, std::vector<std::int64_t> shape) const;

  std::unique_ptr<CacheBlock> take_spare(std::int64_t rows) const;  // null if there is none
  void keep_spare(std::unique_ptr<CacheBlock> block) const noexcept;
  void clear_spare() const;

  Manifest manifest_;
  std::unique_ptr<Device> device_;
  std::int64_t weight_bytes_ = 0;
  std::optional<Tokenizer> tokenizer_;
  std::string no_tokenizer_;
  std::optional<WeightStore> weights_;
  std::map<std::string, Program> programs_;
  // Blocks that nobody uses, with the steps recorded over them, one of each size: recording takes longer than a step.
  mutable std::mutex spare_mutex_;
  mutable std::map<std::int64_t, std::unique_ptr<CacheBlock>> spare_;
};

}  // namespace megalodon::impl
