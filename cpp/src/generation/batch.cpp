// Calls that feed several sessions of one engine at once.
#include <algorithm>
#include <bit>

#include "generation/sampling.hpp"
#include "generation/session.hpp"
#include "runtime/logits.hpp"

namespace megalodon::impl {

// A program takes the rows of a batch from contiguous memory, so the states of the sessions must be consecutive rows of
// one block. Only states that are elsewhere move. When C joins A and B, which have stepped together before:
//
//     before   block 1: A B - -     block 2: C
//     after    block 1: A B C -
class Session::Batch {
 public:
  explicit Batch(std::span<Session* const> sessions) : sessions_(sessions) {
    for (Session* session : sessions) {
      uses_.push_back(std::make_unique<ExclusiveUse>(*session));
      session->require_usable();
      require(session->engine_ == sessions[0]->engine_, "the sessions are of different engines; batch those of one");
    }
  }

  // Calls `call` with the states of all sessions. If it fails, the states are unknown, so it poisons the sessions: all,
  // or those that have no token among `next_tokens`.
  template <typename Call>
  void run(Call call, std::span<const std::int64_t> next_tokens = {}) {
    const CacheView view = gather();
    try {
      call(view);
    } catch (...) {
      for (std::size_t i = 0; i < sessions_.size(); ++i) {
        if (next_tokens.empty() || next_tokens[i] == kNoToken) sessions_[i]->poisoned_ = true;
      }
      throw;
    }
  }

 private:
  std::int64_t size() const { return static_cast<std::int64_t>(sessions_.size()); }

  // Moves the states into consecutive rows, in the order of the sessions: behind the first session's row if the rows
  // there are free, else in a new block with room to grow.
  CacheView gather() {
    const CacheView& first = sessions_[0]->row_.view();
    if (!acquire_rows(first.block(), first.first())) {
      const std::int64_t most = sessions_[0]->engine_->manifest().max_batch;
      const auto roomy = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(size())));
      acquire_rows(sessions_[0]->engine_->new_block(std::min(roomy, most)), 0);
    }
    for (std::size_t i = 0; i < sessions_.size(); ++i) {
      if (!destinations_[i]) continue;
      destinations_[i]->view().copy_from(sessions_[i]->row_.view(), sessions_[i]->engine_->manifest().chunk);
      std::swap(sessions_[i]->row_, *destinations_[i]);
    }
    destinations_.clear();
    const CacheView& start = sessions_[0]->row_.view();
    return {start.block(), start.first(), size()};
  }

  // Acquires the rows from `first` on, for the sessions whose state is elsewhere. Returns whether all were free.
  bool acquire_rows(const std::shared_ptr<CacheBlock>& block, std::int64_t first) {
    destinations_.clear();
    if (first + size() > block->rows()) return false;
    destinations_.resize(sessions_.size());
    for (std::size_t i = 0; i < sessions_.size(); ++i) {
      const std::int64_t row = first + static_cast<std::int64_t>(i);
      const CacheView& now = sessions_[i]->row_.view();
      if (now.block() == block && now.first() == row) continue;
      std::optional<CacheRow> acquired = CacheRow::acquire(block, row);
      if (!acquired) return false;
      destinations_[i].emplace(std::move(*acquired));
    }
    return true;
  }

  std::span<Session* const> sessions_;
  std::vector<std::unique_ptr<ExclusiveUse>> uses_;
  std::vector<std::optional<CacheRow>> destinations_;  // empty for a session that stays
};

void Session::prefill_batch(std::span<Session* const> sessions,
                            std::span<const std::span<const std::int64_t>> token_ids, std::span<float> logits) {
  const Engine& engine = *sessions[0]->engine_;
  for (std::size_t i = 0; i < token_ids.size(); ++i) {
    engine.check_ids(token_ids[i], token_ids.size() > 1 ? " of prompt " + std::to_string(i) : "");
  }
  Batch batch(sessions);
  std::vector<std::vector<std::int64_t>> fed;
  for (std::size_t i = 0; i < sessions.size(); ++i) fed.push_back(sessions[i]->with_pending(token_ids[i]));
  const std::vector<std::span<const std::int64_t>> prompts(fed.begin(), fed.end());
  batch.run([&](const CacheView& view) { engine.prefill(prompts, view, logits); });
  for (Session* session : sessions) session->pending_.reset();
}

// Calls `call` with the engine and the states of all sessions, after it has checked the arguments and fed tokens that
// are pending.
template <typename Call>
void Session::feed_one_each(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids, Call call,
                            std::span<const std::int64_t> next_tokens) {
  const Engine& engine = *sessions[0]->engine_;
  for (std::size_t i = 0; i < token_ids.size(); ++i) {
    engine.check_ids(token_ids.subspan(i, 1), token_ids.size() > 1 ? " of row " + std::to_string(i) : "");
  }
  Batch batch(sessions);
  for (Session* session : sessions) {
    if (session->pending_) session->feed({}, {});
  }
  batch.run([&](const CacheView& view) { call(engine, view); }, next_tokens);
}

void Session::decode_batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids,
                           std::span<float> logits) {
  feed_one_each(
      sessions, token_ids,
      [&](const Engine& engine, const CacheView& view) { engine.decode(token_ids, view, logits); }, {});
}

void Session::step_batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids,
                         std::span<const megalodon_sampling> samplings, std::span<const std::uint64_t> indices,
                         std::span<std::int64_t> next_tokens) {
  for (const megalodon_sampling& one : samplings) check_sampling(one);
  const auto is_greedy = [](const megalodon_sampling& one) { return one.temperature == 0.0; };
  const bool all_greedy = std::ranges::all_of(samplings, is_greedy);
  const auto step = [&](const Engine& engine, const CacheView& view) {
    if (all_greedy) return engine.decode(token_ids, view, {}, next_tokens);
    const auto width = static_cast<std::size_t>(engine.manifest().logits_size);
    std::vector<float> logits(token_ids.size() * width);
    engine.decode(token_ids, view, logits);
    choose_tokens(next_tokens, [&](std::size_t row) {
      const auto its_logits = std::span(logits).subspan(row * width, width);
      return sample(its_logits, samplings[row], indices[row], MEGALODON_FAILED, row);
    });
  };
  std::ranges::fill(next_tokens, kNoToken);
  feed_one_each(sessions, token_ids, step, next_tokens);
}

}  // namespace megalodon::impl
