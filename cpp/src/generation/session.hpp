// A session: one stream of tokens over an engine, in the state that it owns.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "generation/snapshot.hpp"
#include "megalodon.h"
#include "runtime/engine.hpp"

namespace megalodon::impl {

struct GenerateOptions {
  megalodon_sampling sampling = MEGALODON_GREEDY;
  std::int64_t max_new_tokens = 256;
  std::int64_t eos_token_id = MEGALODON_MODEL_EOS;
};

struct GenerateResult {
  megalodon_finish finish = MEGALODON_FINISH_LENGTH;
  std::int64_t prompt_tokens = 0, new_tokens = 0;
  double prefill_seconds = 0.0, decode_seconds = 0.0, sample_seconds = 0.0;
};

// What a callback wants: to go on, or to end for a reason.
using TokenCallback = std::function<std::optional<megalodon_finish>(std::int64_t token_id)>;
using PieceCallback = std::function<bool(const std::string& piece)>;  // true ends

class Session {
 public:
  explicit Session(std::shared_ptr<const Engine> engine) : engine_(std::move(engine)), row_(engine_->new_cache()) {}

  const std::shared_ptr<const Engine>& engine() const { return engine_; }

  void reset();
  std::unique_ptr<Session> fork();
  std::int64_t position();
  void prefill(std::span<const std::int64_t> token_ids, std::span<float> logits);
  void decode(std::int64_t token_id, std::span<float> logits);
  static void prefill_batch(std::span<Session* const> sessions,
                            std::span<const std::span<const std::int64_t>> token_ids, std::span<float> logits);
  static void decode_batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids,
                           std::span<float> logits);
  // Samples what follows each; `indices` are the draws of the streams' samplers.
  static void step_batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids,
                         std::span<const megalodon_sampling> samplings, std::span<const std::uint64_t> indices,
                         std::span<std::int64_t> next);
  GenerateResult generate(std::span<const std::int64_t> prompt, const GenerateOptions& options,
                          const TokenCallback& callback);
  GenerateResult generate_text(const std::string& prompt, const GenerateOptions& options, std::vector<std::string> stop,
                               const PieceCallback& callback);
  void stop() { stop_ = true; }
  Snapshot snapshot();
  void restore(const Snapshot& snapshot);

 private:
  class Use;    // the one call that may use a session at a time
  class Group;  // sessions that step together
  class RunAhead;

  template <typename Call>
  static void batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids, Call call);
  void require_usable() const;
  void feed(std::span<const std::int64_t> token_ids, std::span<float> logits);
  GenerateResult run(std::span<const std::int64_t> prompt, const GenerateOptions& options,
                     const TokenCallback& callback);
  std::vector<std::int64_t> with_pending(std::span<const std::int64_t> token_ids) const;
  std::vector<std::int64_t> opening(std::span<const std::int64_t> prompt) const;
  std::int64_t tokens_seen() const;
  template <typename Call>
  void poisoning(Call call);

  std::shared_ptr<const Engine> engine_;
  CacheRow row_;
  std::optional<std::int64_t> pending_;  // given out, not yet fed
  bool broken_ = false;
  std::atomic<bool> busy_ = false, stop_ = false;
};

}  // namespace megalodon::impl
