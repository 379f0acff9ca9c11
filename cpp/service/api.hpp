// The routes of the service, and the answer to a completion.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <variant>

#include "http.hpp"
#include "scheduler.hpp"

namespace service {

// The answer to one completion, as a whole or in pieces. Its end cancels a completion that is not over.
class Answer {
 public:
  Answer(HttpRequest http, std::shared_ptr<Completion> completion, std::string model);
  ~Answer() { completion_->cancel(); }
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  // The bytes that are new. An answer whose completion fails before the first of them is a whole one with status 500 or
  // 503. If it fails later, the last piece is an error, and the connection must end without the end of the answer.
  std::string take();
  bool has_begun() const { return begun_; }
  bool is_over() const { return over_; }
  // Whether the connection has to end after the answer.
  bool is_last() const { return http_.is_last || failed_; }
  const HttpRequest& http() const { return http_; }

 private:
  std::string piece(const std::string& data) const { return streamed_piece(http_, "data: " + data + "\n\n"); }
  std::string fail(const Completion::Update& update);
  std::string body(const Completion::Update& update, bool is_last) const;

  const HttpRequest http_;
  const std::shared_ptr<Completion> completion_;
  const std::string model_, id_;
  const std::int64_t created_;
  Completion::Update all_;
  bool begun_ = false, over_ = false, failed_ = false;
};

class Api {
 public:
  Api(const megalodon::Engine& engine, std::string model, Scheduler& scheduler, Metrics& metrics, Limits limits);

  // Answers a request at once, or later. Calls `changed` whenever that answer has something new.
  std::variant<std::string, std::unique_ptr<Answer>> answer(HttpRequest request, std::function<void()> changed);
  // The bytes of a refusal. `request` is null where there was none that could be read.
  std::string refuse(const HttpRequest* request, int status, const std::string& why);

 private:
  CompletionRequest read(const HttpRequest& http);

  const megalodon::Engine& engine_;
  const std::string model_;
  Scheduler& scheduler_;
  Metrics& metrics_;
  Limits limits_;
  std::mt19937_64 seeds_{std::random_device{}()};
};

}  // namespace service
