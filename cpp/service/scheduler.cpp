#include "scheduler.hpp"

#include <algorithm>
#include <iostream>
#include <utility>

namespace service {
namespace {

constexpr std::size_t kFewest = 32;  // tokens of a stream that make a call of prefill worth its cost

}  // namespace

// ---- one request ----------------------------------------------------------------------------------------------------

Completion::Update Completion::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(new_, {});
}

template <typename Change>
void Completion::update(Change change) {
  {
    const std::lock_guard lock(mutex_);
    change(new_);
  }
  changed_();
}

void Completion::add(std::int64_t token_id, const std::string& text) {
  update([&](Update& update) {
    update.token_ids.push_back(token_id);
    update.text += text;
  });
}

void Completion::finish(const std::string& reason, const std::string& text) {
  update([&](Update& update) {
    update.text += text;
    update.finish_reason = reason;
  });
}

void Completion::fail(int status, const std::string& why) {
  update([&](Update& update) {
    update.status = status;
    update.failure = why;
  });
}

// ---- one stream -----------------------------------------------------------------------------------------------------

class Scheduler::Stream {
 public:
  Stream(const megalodon::Engine& engine, std::shared_ptr<Completion> completion, Metrics& metrics)
      : session(engine), completion_(std::move(completion)), metrics_(metrics) {
    if (engine.info().has_tokenizer != 0) text_.emplace(engine, request().stop);
    eos_ = request().ignore_eos ? -1 : engine.info().eos_token_id;
    vocab_size_ = engine.info().vocab_size;
    ++metrics_.sessions;
  }
  ~Stream() { --metrics_.sessions; }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const CompletionRequest& request() const { return completion_->request; }
  std::size_t prompt_left() const { return request().token_ids.size() - fed_; }
  std::vector<std::int64_t> next_piece(std::size_t most) {
    const auto begin = request().token_ids.begin() + static_cast<std::ptrdiff_t>(fed_);
    const std::size_t size = std::min(most, prompt_left());
    fed_ += size;
    metrics_.prompt_tokens += size;
    return {begin, begin + static_cast<std::ptrdiff_t>(size)};
  }
  std::int64_t last_token() const { return sampled_.back(); }
  std::uint64_t count() const { return sampled_.size(); }  // tokens sampled
  bool is_finished() const { return finished_; }

  void sample(const std::vector<float>& logits) {
    push(megalodon::sample(logits, request().sampling, count()));
    if (count() > 1) return;
    const auto waited = std::chrono::steady_clock::now() - completion_->start;
    ++metrics_.first_tokens;
    metrics_.first_token_microseconds += static_cast<std::uint64_t>(waited / std::chrono::microseconds(1));
  }

  // Feeds the stream again from its beginning, by itself: a call for several streams has failed, so it is unknown which
  // of them failed, and their states are.
  void feed_again() {
    const auto begin = request().token_ids.begin();
    std::vector<std::int64_t> fed(begin, begin + static_cast<std::ptrdiff_t>(fed_));
    fed.insert(fed.end(), sampled_.begin(), sampled_.end());
    session.reset();
    const auto logits = session.prefill(fed);
    if (prompt_left() == 0) sample(logits);
  }

  // Takes the next token of the stream and gives its text to the client. Ends the stream if the text ends with it.
  void push(std::int64_t token) {
    sampled_.push_back(token);
    if (token == eos_) return end("stop");
    ++metrics_.generated_tokens;
    completion_->add(token, text_ ? text_->push(token) : "");
    if (text_ && text_->stopped()) return end("stop");
    if (count() == static_cast<std::uint64_t>(request().max_tokens)) return end("length");
    if (token >= vocab_size_) {  // a head may have more logits than the model has token ids
      throw std::runtime_error("the model has chosen token id " + std::to_string(token) + ", which is outside 0.." +
                               std::to_string(vocab_size_ - 1) + " and cannot be fed");
    }
  }

  void fail(int status, const std::string& why) {
    if (finished_) return;
    finished_ = true;
    metrics_.count(Outcome::failed);
    completion_->fail(status, why);
  }

  // Calls `work`. If that throws, this stream fails, and no other.
  template <typename Work>
  void alone(Work work) {
    try {
      work();
    } catch (const std::exception& error) {
      fail(500, error.what());
    }
  }

  void drop_if_cancelled() {
    if (finished_ || !completion_->is_cancelled()) return;
    finished_ = true;
    metrics_.count(Outcome::cancelled);
  }

  megalodon::Session session;

 private:
  void end(const std::string& reason) {
    finished_ = true;
    const std::string rest = text_ ? text_->flush() : "";
    metrics_.count(Outcome::completed);
    completion_->finish(text_ && text_->stopped() ? "stop" : reason, rest);
  }

  std::shared_ptr<Completion> completion_;
  Metrics& metrics_;
  std::optional<megalodon::TextStream> text_;
  std::int64_t eos_, vocab_size_;
  std::size_t fed_ = 0;                // tokens of the prompt
  std::vector<std::int64_t> sampled_;  // the last one is not fed yet
  bool finished_ = false;
};

// ---- all streams ----------------------------------------------------------------------------------------------------

Scheduler::Scheduler(const megalodon::Engine& engine, SchedulerOptions options, Metrics& metrics)
    : engine_(engine), options_(options), metrics_(metrics), thread_([this] { run(); }) {}

Scheduler::~Scheduler() {
  drain(std::chrono::seconds(0));
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

std::shared_ptr<Completion> Scheduler::submit(CompletionRequest request, std::function<void()> changed) {
  auto completion = std::make_shared<Completion>(std::move(request), std::move(changed));
  {
    const std::lock_guard lock(mutex_);
    if (draining_ || queue_.size() >= options_.queue) return nullptr;
    queue_.push_back(completion);
    metrics_.queued = static_cast<std::int64_t>(queue_.size());
  }
  changed_.notify_all();
  return completion;
}

void Scheduler::drain(std::chrono::seconds timeout) {
  std::unique_lock lock(mutex_);
  draining_ = true;
  if (changed_.wait_for(lock, timeout, [&] { return idle_ && queue_.empty(); })) return;
  stop_ = true;
  changed_.notify_all();
  changed_.wait(lock, [&] { return idle_ && queue_.empty(); });
}

void Scheduler::run() {
  while (true) {
    drop_cancelled();
    if (!admit()) return;
    prefill();
    decode();
  }
}

// Starts streams for requests that wait, and waits for a request if there is no stream. Returns false at the end.
bool Scheduler::admit() {
  std::unique_lock lock(mutex_);
  idle_ = prefilling_.empty() && decoding_.empty();
  if (idle_ && queue_.empty()) {
    changed_.notify_all();  // `drain` waits for this
    changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return false;
  }
  std::vector<std::shared_ptr<Completion>> admitted;
  while (!queue_.empty() && (stop_ || prefilling_.size() + decoding_.size() + admitted.size() < options_.streams)) {
    admitted.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  idle_ = false;
  metrics_.queued = static_cast<std::int64_t>(queue_.size());
  const bool stop = stop_;
  lock.unlock();
  for (auto& completion : admitted) {
    try {
      prefilling_.push_back(std::make_unique<Stream>(engine_, completion, metrics_));
    } catch (const std::exception& error) {
      metrics_.count(Outcome::failed);
      completion->fail(500, error.what());
    }
  }
  if (stop) {
    for (Streams* streams : {&prefilling_, &decoding_}) {
      for (auto& stream : *streams) stream->fail(503, kShuttingDown);
      streams->clear();
    }
  }
  return true;
}

void Scheduler::drop_cancelled() {
  {
    const std::lock_guard lock(mutex_);
    const auto gone = std::erase_if(queue_, [](const auto& completion) { return completion->is_cancelled(); });
    for (std::size_t i = 0; i < gone; ++i) metrics_.count(Outcome::cancelled);
    metrics_.queued = static_cast<std::int64_t>(queue_.size());
  }
  for (Streams* streams : {&prefilling_, &decoding_}) {
    for (auto& stream : *streams) stream->drop_if_cancelled();
    remove_finished(*streams);
  }
}

// Removes streams that are finished. The last stream takes the place of one that leaves, so it is the only one whose
// state moves.
void Scheduler::remove_finished(Streams& streams) {
  for (std::size_t i = streams.size(); i-- > 0;) {
    if (!streams[i]->is_finished()) continue;
    std::swap(streams[i], streams.back());
    streams.pop_back();
  }
}

// Calls `call` with the sessions of the first `count` streams. Returns whether that succeeded.
template <typename Call>
bool Scheduler::together(const Streams& streams, std::size_t count, Call call) {
  std::vector<megalodon::Session*> sessions;
  for (std::size_t i = 0; i < count; ++i) sessions.push_back(&streams[i]->session);
  try {
    call(sessions);
    return true;
  } catch (const std::exception& error) {
    std::cerr << "a call for " << count << " streams has failed: " << error.what() << std::endl;
    return false;
  }
}

void Scheduler::prefill() {
  const std::size_t count = std::min(prefilling_.size(), std::max<std::size_t>(options_.prefill_tokens / kFewest, 1));
  if (count == 0) return;
  std::vector<std::vector<std::int64_t>> pieces;
  for (std::size_t i = 0; i < count; ++i) pieces.push_back(prefilling_[i]->next_piece(options_.prefill_tokens / count));
  std::vector<std::vector<float>> logits;
  const bool are_fed = together(prefilling_, count, [&](const std::vector<megalodon::Session*>& sessions) {
    logits = megalodon::prefill_batch(sessions, pieces);
  });
  for (std::size_t i = 0; i < count; ++i) {
    Stream& stream = *prefilling_[i];
    stream.alone([&] {
      if (!are_fed) return stream.feed_again();
      if (stream.prompt_left() == 0) stream.sample(logits[i]);
    });
  }
  Streams left;
  for (std::size_t i = 0; i < prefilling_.size(); ++i) {
    auto& stream = prefilling_[i];
    if (stream->is_finished()) continue;
    (stream->prompt_left() == 0 ? decoding_ : left).push_back(std::move(stream));
  }
  prefilling_ = std::move(left);
}

void Scheduler::decode() {
  if (decoding_.empty()) return;
  std::vector<std::int64_t> token_ids;
  std::vector<megalodon_sampling> samplings;
  std::vector<std::uint64_t> indices;
  for (const auto& stream : decoding_) {
    token_ids.push_back(stream->last_token());
    samplings.push_back(stream->request().sampling);
    indices.push_back(stream->count());
  }
  std::vector<std::int64_t> next(decoding_.size(), -1);
  together(decoding_, decoding_.size(), [&](const std::vector<megalodon::Session*>& sessions) {
    megalodon::step_batch(sessions, token_ids, samplings, indices, next);
  });
  ++metrics_.decode_steps;
  for (std::size_t i = 0; i < next.size(); ++i) {
    Stream& stream = *decoding_[i];
    stream.alone([&] { next[i] >= 0 ? stream.push(next[i]) : stream.feed_again(); });
  }
  remove_finished(decoding_);
}

}  // namespace service
