// Continuous batching: one thread owns all sessions, and streams join and leave between two decode steps.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "metrics.hpp"
#include "request.hpp"

namespace service {

inline constexpr const char* kShuttingDown = "the service is shutting down";

// Carries what one request generates from the scheduler's thread to the server's thread.
class Completion {
 public:
  struct Update {
    std::string text;
    std::vector<std::int64_t> token_ids;
    std::string finish_reason;  // "stop" or "length"; empty if there is more to come
    std::string failure;        // why the request failed; empty if it has not
    int status = 500;           // of HTTP, for a failure
    bool is_last() const { return !finish_reason.empty() || !failure.empty(); }
  };

  // Calls `changed` whenever there is something new.
  Completion(CompletionRequest request, std::function<void()> changed)
      : request(std::move(request)), changed_(std::move(changed)) {}

  // Returns what the stream has written since the last call; the update is empty if that is nothing.
  Update take();
  void add(std::int64_t token_id, const std::string& text);
  void finish(const std::string& reason, const std::string& text);
  void fail(int status, const std::string& why);
  // The client has disconnected.
  void cancel() { cancelled_ = true; }
  bool is_cancelled() const { return cancelled_; }

  const CompletionRequest request;
  const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();

 private:
  template <typename Change>
  void update(Change change);

  const std::function<void()> changed_;
  std::mutex mutex_;
  Update new_;
  std::atomic<bool> cancelled_ = false;
};

struct SchedulerOptions {
  std::size_t streams = 32;          // running at the same time; at most the bundle's largest batch
  std::size_t queue = 64;            // requests that wait
  std::size_t prefill_tokens = 256;  // of prompts, fed between two decode steps: long prompts must not delay decoding
};

class Scheduler {
 public:
  Scheduler(const megalodon::Engine& engine, SchedulerOptions options, Metrics& metrics);
  ~Scheduler();

  // The request has its prompt as token ids, 1 or more. Null if the queue is full, or the service is shutting down.
  std::shared_ptr<Completion> submit(CompletionRequest request, std::function<void()> changed);
  // Accepts no more requests, waits for the present ones, and ends after `timeout` those that are left.
  void drain(std::chrono::seconds timeout);
  bool is_draining() const { return draining_; }

 private:
  class Stream;
  using Streams = std::vector<std::unique_ptr<Stream>>;

  void run();
  bool admit();
  void drop_cancelled();
  void prefill();
  void decode();
  template <typename Call>
  bool together(const Streams& streams, std::size_t count, Call call);
  void remove_finished(Streams& streams);

  const megalodon::Engine& engine_;
  const SchedulerOptions options_;
  Metrics& metrics_;
  Streams prefilling_, decoding_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Completion>> queue_;
  bool idle_ = true, stop_ = false;
  std::atomic<bool> draining_ = false;
  std::thread thread_;
};

}  // namespace service
