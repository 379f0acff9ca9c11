#include "scheduler.hpp"

#include <algorithm>
#include <utility>

namespace service {
namespace {

constexpr std::size_t kFewest = 32;  // tokens of a stream that make a call of prefill worth its cost

}  // namespace

// ---- one request ----------------------------------------------------------------------------------------------------

Completion::Update Completion::wait(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout, [&] { return !new_.token_ids.empty() || !new_.text.empty() || new_.is_last(); });
  return std::exchange(new_, {});
}

void Completion::add(std::int64_t token_id, const std::string& text) {
  {
    const std::lock_guard lock(mutex_);
    new_.token_ids.push_back(token_id);
    new_.text += text;
  }
  changed_.notify_one();
}

void Completion::set_last(std::string Update::*field, const std::string& value, const std::string& text) {
  {
    const std::lock_guard lock(mutex_);
    new_.text += text;
    new_.*field = value;
  }
  changed_.notify_one();
}

void Completion::finish(const std::string& reason, const std::string& text) {
  set_last(&Update::finish_reason, reason, text);
}

void Completion::fail(const std::string& why) { set_last(&Update::failure, why, ""); }

// ---- one stream -----------------------------------------------------------------------------------------------------

class Scheduler::Stream {
 public:
  Stream(const megalodon::Engine& engine, std::shared_ptr<Completion> completion, Metrics& metrics)
      : session(engine), completion_(std::move(completion)), metrics_(metrics) {
    if (engine.info().has_tokenizer != 0) text_.emplace(engine, request().stop);
    eos_ = request().ignore_eos ? -1 : engine.info().eos_token_id;
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
  std::int64_t last_token() const { return last_; }
  std::uint64_t count() const { return count_; }  // tokens sampled
  bool is_finished() const { return finished_; }

  void sample(const std::vector<float>& logits) {
    push(megalodon::sample(logits, request().sampling, 0));
    const auto waited = std::chrono::steady_clock::now() - completion_->start;
    ++metrics_.first_tokens;
    metrics_.first_token_microseconds += static_cast<std::uint64_t>(waited / std::chrono::microseconds(1));
  }

  // Takes the next token of the stream and gives its text to the client. Ends the stream if the text ends with it.
  void push(std::int64_t token) {
    last_ = token;
    ++count_;
    if (token == eos_) return end("stop");
    ++metrics_.generated_tokens;
    completion_->add(token, text_ ? text_->push(token) : "");
    if (text_ && text_->stopped()) return end("stop");
    if (count_ == static_cast<std::uint64_t>(request().max_tokens)) end("length");
  }

  void fail(const std::string& why) {
    finished_ = true;
    metrics_.count(Outcome::failed);
    completion_->fail(why);
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
  std::int64_t eos_, last_ = 0;
  std::size_t fed_ = 0;  // tokens of the prompt
  std::uint64_t count_ = 0;
  bool finished_ = false;
};

// ---- all streams
// -----------------------------------------------------------------------------------------------------

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

std::shared_ptr<Completion> Scheduler::submit(CompletionRequest request) {
  auto completion = std::make_shared<Completion>(std::move(request));
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
      completion->fail(error.what());
    }
  }
  if (stop) {
    for (Streams* streams : {&prefilling_, &decoding_}) {
      for (auto& stream : *streams) stream->fail(kShuttingDown);
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

// Calls `call` to feed the first `count` streams. If that throws, the streams have failed.
template <typename Call>
void Scheduler::feed(Streams& streams, std::size_t count, Call call) {
  std::vector<megalodon::Session*> sessions;
  for (std::size_t i = 0; i < count; ++i) sessions.push_back(&streams[i]->session);
  try {
    call(sessions);
  } catch (const std::exception& error) {
    for (std::size_t i = 0; i < count; ++i) {
      if (!streams[i]->is_finished()) streams[i]->fail(error.what());
    }
  }
}

void Scheduler::prefill() {
  const std::size_t count = std::min(prefilling_.size(), std::max<std::size_t>(options_.prefill_tokens / kFewest, 1));
  if (count == 0) return;
  std::vector<std::vector<std::int64_t>> pieces;
  for (std::size_t i = 0; i < count; ++i) pieces.push_back(prefilling_[i]->next_piece(options_.prefill_tokens / count));
  feed(prefilling_, count, [&](const std::vector<megalodon::Session*>& sessions) {
    const auto logits = megalodon::prefill_batch(sessions, pieces);
    for (std::size_t i = 0; i < count; ++i) {
      if (prefilling_[i]->prompt_left() == 0) prefilling_[i]->sample(logits[i]);
    }
  });
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
  feed(decoding_, decoding_.size(), [&](const std::vector<megalodon::Session*>& sessions) {
    const auto next = megalodon::step_batch(sessions, token_ids, samplings, indices);
    ++metrics_.decode_steps;
    for (std::size_t i = 0; i < next.size(); ++i) decoding_[i]->push(next[i]);
  });
  remove_finished(decoding_);
}

}  // namespace service
