// A session: one stream of tokens over an engine, and the state that it owns.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "error.hpp"
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

// Gets each token, and returns a reason to end the generation or nothing.
using TokenCallback = std::function<std::optional<megalodon_finish>(std::int64_t token_id)>;
// Gets each piece of text, and returns whether to end the generation.
using PieceCallback = std::function<bool(const std::string& piece)>;

// One call at a time: a second one gets MEGALODON_BUSY. A call that fails half-way poisons the session: it refuses
// further calls until `reset` or `restore`.
class Session {
 public:
  explicit Session(std::shared_ptr<const Engine> engine) : engine_(std::move(engine)), row_(engine_->new_cache()) {}

  const std::shared_ptr<const Engine>& engine() const { return engine_; }

  void reset();
  std::unique_ptr<Session> fork();
  std::int64_t position();
  void prefill(std::span<const std::int64_t> token_ids, std::span<float> logits);
  void decode(std::int64_t token_id, std::span<float> logits);
  GenerateResult generate(std::span<const std::int64_t> prompt, const GenerateOptions& options,
                          const TokenCallback& callback);
  GenerateResult generate_text(const std::string& prompt, const GenerateOptions& options, std::vector<std::string> stop,
                               const PieceCallback& callback);
  void stop() { stop_ = true; }
  Snapshot snapshot();
  void restore(const Snapshot& snapshot);

  // One call of the program for several sessions of one engine, at most as many as the bundle's largest batch
  // (batch.cpp).
  static void prefill_batch(std::span<Session* const> sessions,
                            std::span<const std::span<const std::int64_t>> token_ids, std::span<float> logits);
  static void decode_batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids,
                           std::span<float> logits);
  // Also samples the next token of each session. `indices[i]` is the number of tokens that stream i sampled before.
  // A session whose logits cannot be sampled gets kNoToken and is poisoned alone; then the call throws.
  static void step_batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids,
                         std::span<const megalodon_sampling> samplings, std::span<const std::uint64_t> indices,
                         std::span<std::int64_t> next_tokens);

 private:
  class ExclusiveUse;  // held by the one call at a time that may use the session
  class Batch;         // sessions that one call feeds (batch.cpp)
  class TokenSource;   // the tokens of one generation (generate.cpp)

  template <typename Call>
  static void feed_one_each(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids, Call call,
                            std::span<const std::int64_t> next_tokens);
  void require_usable() const;
  void feed(std::span<const std::int64_t> token_ids, std::span<float> logits);
  GenerateResult run_generation(std::span<const std::int64_t> prompt, const GenerateOptions& options,
                                const TokenCallback& callback);
  std::vector<std::int64_t> with_pending(std::span<const std::int64_t> token_ids) const;
  std::vector<std::int64_t> prompt_or_bos(std::span<const std::int64_t> prompt) const;
  std::int64_t tokens_fed() const;
  template <typename Call>
  void poison_on_failure(Call call);

  std::shared_ptr<const Engine> engine_;
  CacheRow row_;
  std::optional<std::int64_t> pending_;  // the token that was generated last, if it is not fed yet
  bool poisoned_ = false;
  std::atomic<bool> busy_ = false, stop_ = false;
};

class Session::ExclusiveUse {
 public:
  explicit ExclusiveUse(Session& session) : session_(session) {
    if (session.busy_.exchange(true, std::memory_order_acquire)) {
      throw Error(MEGALODON_BUSY, "the session is in use by another call; use a fork for that, or wait");
    }
  }
  ~ExclusiveUse() { session_.busy_.store(false, std::memory_order_release); }
  ExclusiveUse(const ExclusiveUse&) = delete;
  ExclusiveUse& operator=(const ExclusiveUse&) = delete;

 private:
  Session& session_;
};

template <typename Call>
void Session::poison_on_failure(Call call) {
  try {
    call();
  } catch (const Error& error) {
    // An invalid argument is refused before anything runs.
    poisoned_ = poisoned_ || error.code != MEGALODON_INVALID_ARGUMENT;
    throw;
  } catch (...) {
    poisoned_ = true;
    throw;
  }
}

}  // namespace megalodon::impl
