// The generation loop of a session.
#include <chrono>

#include "generation/lookahead.hpp"
#include "generation/sampling.hpp"
#include "generation/session.hpp"
#include "generation/text.hpp"
#include "utf8.hpp"

namespace megalodon::impl {
namespace {

// Adds the time from its construction to its destruction to `seconds`.
class ScopedTimer {
 public:
  explicit ScopedTimer(double& seconds) : seconds_(seconds) {}
  ~ScopedTimer() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  ScopedTimer(const ScopedTimer&) = delete;
  ScopedTimer& operator=(const ScopedTimer&) = delete;

 private:
  double& seconds_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

// Gives the tokens of one generation. Its destructor leaves the stream at the token that it returned last, whatever it
// has launched ahead.
class Session::TokenSource {
 public:
  TokenSource(Session& session, const GenerateOptions& options, GenerateResult& seconds)
      : session_(session),
        engine_(*session.engine_),
        options_(options),
        seconds_(seconds),
        logits_(static_cast<std::size_t>(engine_.manifest().logits_size)) {}
  TokenSource(const TokenSource&) = delete;
  TokenSource& operator=(const TokenSource&) = delete;
  ~TokenSource() {
    if (!lookahead_ || session_.poisoned_) return;
    try {
      lookahead_->roll_back();
    } catch (...) {
      session_.poisoned_ = true;
    }
  }

  // Feeds the prompt.
  std::int64_t first(std::span<const std::int64_t> prompt) {
    {
      const ScopedTimer timer(seconds_.prefill_seconds);
      session_.feed(prompt, logits_);
    }
    return sample_logits();
  }

  // Feeds the pending token, which is the one that was returned last.
  std::int64_t next() {
    const std::int64_t fed = *session_.pending_;
    std::int64_t token = 0;
    {
      const ScopedTimer timer(seconds_.decode_seconds);
      session_.poison_on_failure([&] {
        if (!is_greedy()) {
          engine_.decode({&fed, 1}, session_.row_.view(), logits_);
        } else if (can_look_ahead()) {
          token = lookahead_->next();
        } else {
          engine_.decode({&fed, 1}, session_.row_.view(), {}, {&token, 1});
        }
      });
    }
    session_.pending_.reset();
    return is_greedy() ? token : sample_logits();
  }

 private:
  bool is_greedy() const { return options_.sampling.temperature == 0.0; }

  // Creates the lookahead the first time, where the device captures steps. A head with more logits than token ids could
  // choose an id that must not be fed, so there the host checks each token first.
  bool can_look_ahead() {
    if (lookahead_) return true;
    const Manifest& manifest = engine_.manifest();
    if (manifest.logits_size != manifest.vocab_size) return false;
    CapturedStep* step = engine_.captured_step(session_.row_.view());
    if (step == nullptr) return false;
    engine_.check_ids({&*session_.pending_, 1});
    lookahead_.emplace(*step, session_.tokens_fed(), manifest.chunk, *session_.pending_, options_.max_new_tokens - 1);
    return true;
  }

  std::int64_t sample_logits() {
    const ScopedTimer timer(seconds_.sample_seconds);
    std::int64_t token = 0;
    session_.poison_on_failure([&] { token = sample(logits_, options_.sampling, draws_++, MEGALODON_FAILED); });
    return token;
  }

  Session& session_;
  const Engine& engine_;
  const GenerateOptions& options_;
  GenerateResult& seconds_;
  std::vector<float> logits_;
  std::uint64_t draws_ = 0;
  std::optional<Lookahead> lookahead_;
};

// A stream must begin with a token: the beginning-of-sequence token replaces an empty prompt of a fresh stream.
std::vector<std::int64_t> Session::prompt_or_bos(std::span<const std::int64_t> prompt) const {
  if (!prompt.empty() || pending_ || tokens_fed() > 0) return {prompt.begin(), prompt.end()};
  const auto bos = engine_->manifest().bos_token_id;
  require(bos.has_value(), "the prompt is empty and the model has no bos_token_id to begin with; give some text");
  return {*bos};
}

GenerateResult Session::run_generation(std::span<const std::int64_t> prompt, const GenerateOptions& options,
                                       const TokenCallback& callback) {
  require_usable();
  check_sampling(options.sampling);
  require(options.max_new_tokens >= 1,
          "max_new_tokens is " + std::to_string(options.max_new_tokens) + ", expected at least 1");
  const std::int64_t ids = engine_->manifest().logits_size;
  require(options.eos_token_id >= MEGALODON_MODEL_EOS && options.eos_token_id < ids,
          "eos_token_id is " + std::to_string(options.eos_token_id) + ", expected 0.." + std::to_string(ids - 1) +
              ", or -1 for none");
  const std::int64_t eos = options.eos_token_id == MEGALODON_MODEL_EOS ? engine_->manifest().eos_token_id.value_or(-1)
                                                                       : options.eos_token_id;
  const std::vector<std::int64_t> fed_first = prompt_or_bos(prompt);
  GenerateResult result{.prompt_tokens = static_cast<std::int64_t>(fed_first.size())};
  TokenSource tokens(*this, options, result);
  for (std::int64_t count = 0; count < options.max_new_tokens; ++count) {
    const std::int64_t token = count == 0 ? tokens.first(fed_first) : tokens.next();
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

GenerateResult Session::generate(std::span<const std::int64_t> prompt, const GenerateOptions& options,
                                 const TokenCallback& callback) {
  const ExclusiveUse use(*this);
  return run_generation(prompt, options, callback);
}

GenerateResult Session::generate_text(const std::string& prompt, const GenerateOptions& options,
                                      std::vector<std::string> stop, const PieceCallback& callback) {
  const ExclusiveUse use(*this);
  const Tokenizer& tokenizer = engine_->tokenizer();
  require_utf8(prompt, "the prompt");
  TextStream text(tokenizer, std::move(stop));
  const auto push = [&](std::int64_t token) -> std::optional<megalodon_finish> {
    const std::string piece = text.push(token);
    if (!piece.empty() && callback(piece)) return MEGALODON_FINISH_STOPPED;
    return text.stopped() ? std::optional(MEGALODON_FINISH_STOP_STRING) : std::nullopt;
  };
  GenerateResult result = run_generation(tokenizer.encode(prompt), options, push);
  if (result.finish == MEGALODON_FINISH_LENGTH || result.finish == MEGALODON_FINISH_EOS) {
    if (const std::string piece = text.flush(); !piece.empty()) callback(piece);
    if (text.stopped()) result.finish = MEGALODON_FINISH_STOP_STRING;
  }
  return result;
}

}  // namespace megalodon::impl
