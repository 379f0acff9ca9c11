// An engine: the weights and programs of one bundle, for any number of threads.
#pragma once

#include <unistd.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>

#include "runtime/cache.hpp"
#include "runtime/program.hpp"
#include "text/tokenizer.hpp"

namespace megalodon::impl {

class Engine {
 public:
  // `concurrency`: calls of a program that may run at the same time; 0 is one for every processor.
  Engine(const std::filesystem::path& folder, bool check_hashes, int concurrency);

  const Manifest& manifest() const { return manifest_; }
  std::int64_t weight_bytes() const { return weight_bytes_; }
  std::int64_t state_bytes() const;  // of one stream
  bool has_tokenizer() const { return tokenizer_.has_value(); }
  const Tokenizer& tokenizer() const;  // Error MEGALODON_UNAVAILABLE, with the reason, if there is none

  // The row of a fresh stream.
  CacheRow new_cache() const;
  // Memory for the states of `rows` streams, not initialised. The engine must outlive it.
  std::shared_ptr<CacheBlock> new_block(std::int64_t rows) const;

  // Feeds each row tokens, one or more. Writes the logits (rows, V) after the last token of each, unless `logits` is
  // empty.
  void prefill(std::span<const std::span<const std::int64_t>> token_ids, const CacheView& cache,
               std::span<float> logits) const;
  // Feeds one token to each row. Writes the logits (rows, V) and the most probable next token of each row, or leaves
  // out what is given as empty. Error MEGALODON_FAILED if a row has no next token.
  void decode(std::span<const std::int64_t> token_ids, const CacheView& cache, std::span<float> logits,
              std::span<std::int64_t> next_tokens = {}) const;

  // The captured decode step over these rows. Null on devices that capture none.
  CapturedStep* captured_step(const CacheView& cache) const;
  // The program that feeds one token to each of `rows` rows.
  const Program& decode_program(std::int64_t rows) const;

  // Error MEGALODON_INVALID_ARGUMENT unless there are ids, and all are the model's. `whose` goes into the message.
  void check_ids(std::span<const std::int64_t> token_ids, const std::string& whose = "") const;
  void check_batch(std::size_t batch) const;
  // False in a child of a process that has opened a bundle. Threads of OpenMP and CUDA do not live on in a fork, and
  // the first operation that needs them would wait forever.
  bool is_same_process() const { return getpid() == process_; }
  void require_same_process() const;  // Error MEGALODON_UNAVAILABLE

 private:
  void load_tokenizer(const std::filesystem::path& folder);
  void load_programs(const std::filesystem::path& folder, int concurrency);
  void prefill_part(std::span<const std::span<const std::int64_t>> token_ids, std::size_t start, std::size_t longest,
                    const CacheView& cache, std::span<float> logits) const;
  // The address of logits in the device's memory, after checking their dtype and shape.
  const float* address_of(const Tensor& logits, std::vector<std::int64_t> shape) const;

  std::unique_ptr<CacheBlock> take_spare(std::int64_t rows) const;  // null if there is none
  void store_spare(std::unique_ptr<CacheBlock> block) const noexcept;
  void free_spares() const;

  const pid_t process_;  // the first that has opened a bundle, here or before this one was forked from it
  Manifest manifest_;
  std::unique_ptr<Device> device_;
  std::int64_t weight_bytes_ = 0;
  std::optional<Tokenizer> tokenizer_;
  std::string no_tokenizer_;  // why there is none
  std::optional<WeightStore> weights_;
  std::map<std::string, Program> programs_;
  // On a GPU: one unused block of each size, with the steps captured over it, since capturing takes longer than a step.
  mutable std::mutex spare_mutex_;
  mutable std::map<std::int64_t, std::unique_ptr<CacheBlock>> spares_;
};

}  // namespace megalodon::impl
