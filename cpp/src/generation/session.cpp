#include "generation/session.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstring>

#include "error.hpp"
#include "generation/lookahead.hpp"
#include "generation/sampling.hpp"

namespace megalodon::impl {
namespace {

class Clock {
 public:
  // Adds the time since the last call.
  void lap(double& seconds) {
    const auto now = std::chrono::steady_clock::now();
    seconds += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  void lap() { last_ = std::chrono::steady_clock::now(); }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace

class Session::Use {
 public:
  explicit Use(Session& session) : session_(session) {
    if (session.busy_.exchange(true, std::memory_order_acquire)) {
      throw Error(MEGALODON_BUSY, "the session is in use by another call; use a fork for that, or wait");
    }
  }
  ~Use() { session_.busy_.store(false, std::memory_order_release); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  Session& session_;
};

// ---- one stream -----------------------------------------------------------------------------------------------------

template <typename Call>
void Session::poisoning(Call call) {
  try {
    call();
  } catch (const Error& error) {
    broken_ = broken_ || error.code != MEGALODON_INVALID_ARGUMENT;  // that one was refused before anything ran
    throw;
  } catch (...) {
    broken_ = true;
    throw;
  }
}

void Session::require_usable() const {
  if (broken_) {
    throw Error(MEGALODON_POISONED,
                "an earlier call failed half-way, so the stream's state is unknown; call reset or restore");
  }
}

std::int64_t Session::tokens_seen() const {
  const auto& layout = engine_->manifest().cache;
  const auto index = std::ranges::find(layout, kPosition, &CacheTensor::name) - layout.begin();
  const std::vector<std::byte> bytes = row_.view().read(static_cast<std::size_t>(index));
  std::int64_t position = 0;
  std::memcpy(&position, bytes.data(), sizeof position);
  return position;
}

void Session::reset() {
  const Use use(*this);
  row_.view().reset();
  pending_.reset();
  broken_ = false;
}

std::unique_ptr<Session> Session::fork() {
  const Use use(*this);
  require_usable();
  auto other = std::make_unique<Session>(engine_);
  other->row_.view().copy_from(row_.view());
  other->pending_ = pending_;
  return other;
}

std::int64_t Session::position() {
  const Use use(*this);
  require_usable();
  return tokens_seen();
}

Snapshot Session::snapshot() {
  const Use use(*this);
  require_usable();
  return Snapshot::of(engine_->manifest(), row_.view(), pending_);
}

void Session::restore(const Snapshot& snapshot) {
  const Use use(*this);
  snapshot.copy_to(engine_->manifest(), row_.view());
  pending_ = snapshot.pending();
  broken_ = false;
}

void Session::feed(std::span<const std::int64_t> token_ids, std::span<float> logits) {
  require_usable();
  const std::vector<std::int64_t> fed = with_pending(token_ids);
  poisoning([&] { engine_->prefill(std::array{std::span(fed)}, row_.view(), logits); });
  pending_.reset();
}

std::vector<std::int64_t> Session::with_pending(std::span<const std::int64_t> token_ids) const {
  std::vector<std::int64_t> fed;
  if (pending_) fed.push_back(*pending_);
  fed.insert(fed.end(), token_ids.begin(), token_ids.end());
  return fed;
}

void Session::prefill(std::span<const std::int64_t> token_ids, std::span<float> logits) {
  const Use use(*this);
  feed(token_ids, logits);
}

void Session::decode(std::int64_t token_id, std::span<float> logits) {
  const Use use(*this);
  require_usable();
  const std::span<const std::int64_t> ids(&token_id, 1);
  if (pending_) return feed(ids, logits);
  poisoning([&] { engine_->decode(ids, row_.view(), logits); });
}

// ---- many streams ---------------------------------------------------------------------------------------------------

class Session::Group {
 public:
  explicit Group(std::span<Session* const> sessions) : sessions_(sessions) {
    for (Session* session : sessions) {
      uses_.push_back(std::make_unique<Use>(*session));
      session->require_usable();
      require(session->engine_ == sessions[0]->engine_, "the sessions are of different engines; batch those of one");
    }
  }

  // The states of all, in their order, in one block. Those that are there already stay where they are.
  CacheView together() {
    const CacheView& first = sessions_[0]->row_.view();
    const std::int64_t most = sessions_[0]->engine_->manifest().max_batch, rows = size();
    if (!fits(first.block(), first.first())) {
      const auto roomy = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(rows)));
      fits(sessions_[0]->engine_->new_block(std::min(roomy, most)), 0);
    }
    for (std::size_t i = 0; i < sessions_.size(); ++i) {
      if (!places_[i]) continue;
      places_[i]->view().copy_from(sessions_[i]->row_.view());
      std::swap(sessions_[i]->row_, *places_[i]);
    }
    places_.clear();
    const CacheView& start = sessions_[0]->row_.view();
    return {start.block(), start.first(), rows};
  }

  // Runs what feeds all of them; if it fails, the states are unknown.
  template <typename Call>
  void run(Call call) {
    const CacheView view = together();
    try {
      call(view);
    } catch (...) {
      for (Session* session : sessions_) session->broken_ = true;
      throw;
    }
  }

 private:
  std::int64_t size() const { return static_cast<std::int64_t>(sessions_.size()); }

  // Takes the rows from `first` on for those that are elsewhere; whether all could be had.
  bool fits(const std::shared_ptr<CacheBlock>& block, std::int64_t first) {
    places_.clear();
    if (first + size() > block->rows()) return false;
    places_.resize(sessions_.size());
    for (std::size_t i = 0; i < sessions_.size(); ++i) {
      const std::int64_t row = first + static_cast<std::int64_t>(i);
      const CacheView& now = sessions_[i]->row_.view();
      if (now.block() == block && now.first() == row) continue;
      std::optional<CacheRow> place = CacheRow::take(block, row);
      if (!place) return false;
      places_[i].emplace(std::move(*place));
    }
    return true;
  }

  std::span<Session* const> sessions_;
  std::vector<std::unique_ptr<Use>> uses_;
  std::vector<std::optional<CacheRow>> places_;  // to move to
};

void Session::prefill_batch(std::span<Session* const> sessions,
                            std::span<const std::span<const std::int64_t>> token_ids, std::span<float> logits) {
  const Engine& engine = *sessions[0]->engine_;
  engine.check_batch(static_cast<std::int64_t>(sessions.size()));
  std::vector<std::vector<std::int64_t>> fed;
  for (const auto& ids : token_ids) engine.check_ids(ids);
  Group group(sessions);
  for (std::size_t i = 0; i < sessions.size(); ++i) fed.push_back(sessions[i]->with_pending(token_ids[i]));
  const std::vector<std::span<const std::int64_t>> prompts(fed.begin(), fed.end());
  group.run([&](const CacheView& view) { engine.prefill(prompts, view, logits); });
  for (Session* session : sessions) session->pending_.reset();
}

template <typename Call>
void Session::batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids, Call call) {
  const Engine& engine = *sessions[0]->engine_;
  engine.check_batch(static_cast<std::int64_t>(sessions.size()));
  engine.check_ids(token_ids);
  Group group(sessions);
  for (Session* session : sessions) {
    if (session->pending_) session->feed({}, {});
  }
  group.run([&](const CacheView& view) { call(engine, view); });
}

void Session::decode_batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids,
                           std::span<float> logits) {
  batch(sessions, token_ids,
        [&](const Engine& engine, const CacheView& view) { engine.decode(token_ids, view, logits); });
}

void Session::step_batch(std::span<Session* const> sessions, std::span<const std::int64_t> token_ids,
                         std::span<const megalodon_sampling> samplings, std::span<const std::uint64_t> indices,
                         std::span<std::int64_t> next) {
  for (const megalodon_sampling& one : samplings) check_sampling(one);
  batch(sessions, token_ids,
        [&](const Engine& engine, const CacheView& view) { engine.step(token_ids, view, samplings, indices, next); });
}

// ---- generation -----------------------------------------------------------------------------------------------------

// A stream must begin with something: the beginning-of-sequence token stands in for an empty prompt.
std::vector<std::int64_t> Session::opening(std::span<const std::int64_t> prompt) const {
  if (!prompt.empty() || pending_ || tokens_seen() > 0) return {prompt.begin(), prompt.end()};
  const auto start = engine_->manifest().bos;
  require(start.has_value(), "the prompt is empty and the model has no bos_token_id to begin with; give some text");
  return {*start};
}

GenerateResult Session::generate(std::span<const std::int64_t> prompt, const GenerateOptions& options,
                                 const TokenCallback& callback) {
  const Use use(*this);
  return run(prompt, options, callback);
}

// The greedy steps of a call that run ahead, where the device records steps; at the end the stream is at the token that
// was given out last.
class Session::RunAhead {
 public:
  explicit RunAhead(Session& session) : session_(session) {}
  RunAhead(const RunAhead&) = delete;
  RunAhead& operator=(const RunAhead&) = delete;
  ~RunAhead() {
    if (!ahead_ || session_.broken_) return;
    try {
      ahead_->rewind();
    } catch (...) {
      session_.broken_ = true;
    }
  }

  // Feeds the token that was given out last and returns the next, of at most `steps`; false where nothing runs ahead.
  bool next(std::int64_t& token, std::int64_t steps) {
    const Manifest& manifest = session_.engine_->manifest();
    if (manifest.logits_size != manifest.vocab_size) return false;  // it may choose what must not be fed
    if (!ahead_) {
      RecordedStep* step = session_.engine_->recorded(session_.row_.view());
      if (step == nullptr) return false;
      session_.engine_->check_ids({&*session_.pending_, 1});
      ahead_.emplace(*step, session_.tokens_seen(), manifest.chunk, *session_.pending_, steps);
    }
    token = ahead_->next();
    return true;
  }

 private:
  Session& session_;
  std::optional<Ahead> ahead_;
};

GenerateResult Session::run(std::span<const std::int64_t> prompt, const GenerateOptions& options,
                            const TokenCallback& callback) {
  require_usable();
  check_sampling(options.sampling);
  require(options.max_new_tokens >= 1,
          "max_new_tokens is " + std::to_string(options.max_new_tokens) + ", expected at least 1");
  const std::int64_t eos =
      options.eos_token_id == MEGALODON_MODEL_EOS ? engine_->manifest().eos.value_or(-1) : options.eos_token_id;
  const bool greedy = options.sampling.temperature == 0.0;
  std::vector<float> logits(static_cast<std::size_t>(engine_->manifest().logits_size));
  const std::vector<std::int64_t> first = opening(prompt);
  GenerateResult result{.prompt_tokens = static_cast<std::int64_t>(first.size())};
  RunAhead ahead(*this);
  Clock clock;
  feed(first, logits);
  clock.lap(result.prefill_seconds);
  for (std::int64_t index = 0; index < options.max_new_tokens; ++index) {
    std::int64_t token = 0;
    if (index > 0) {
      const std::int64_t fed = *pending_;
      clock.lap();
      poisoning([&] {
        if (!greedy) {
          engine_->decode({&fed, 1}, row_.view(), logits);
        } else if (!ahead.next(token, options.max_new_tokens - index)) {
          engine_->decode({&fed, 1}, row_.view(), {}, {&token, 1});
        }
      });
      clock.lap(result.decode_seconds);
      pending_.reset();
    }
    if (index == 0 || !greedy) {
      poisoning([&] { token = sample_checked(logits, options.sampling, static_cast<std::uint64_t>(index)); });
      clock.lap(result.sample_seconds);
    }
    pending_ = token;
    if (token == eos) {
      result.finish = MEGALODON_FINISH_EOS;
      break;
    }
    ++result.new_tokens;
    const auto finish = callback(token);
    if (finish || stop_.load()) {
      result.finish = finish.value_or(MEGALODON_FINISH_STOPPED);
      break;
    }
  }
  stop_ = false;
  return result;
}

GenerateResult Session::generate_text(const std::string& prompt, const GenerateOptions& options,
                                      std::vector<std::string> stop, const PieceCallback& callback) {
  const Use use(*this);
  const Tokenizer& tokenizer = engine_->tokenizer();
  TextStream text(tokenizer, std::move(stop));
  const auto push = [&](std::int64_t token) -> std::optional<megalodon_finish> {
    const std::string piece = text.push(token);
    if (!piece.empty() && callback(piece)) return MEGALODON_FINISH_STOPPED;
    return text.stopped() ? std::optional(MEGALODON_FINISH_STOP_STRING) : std::nullopt;
  };
  GenerateResult result = run(tokenizer.encode(prompt), options, push);
  if (result.finish == MEGALODON_FINISH_LENGTH || result.finish == MEGALODON_FINISH_EOS) {
    if (const std::string piece = text.flush(); !piece.empty()) callback(piece);
    if (text.stopped()) result.finish = MEGALODON_FINISH_STOP_STRING;
  }
  return result;
}

}  // namespace megalodon::impl
