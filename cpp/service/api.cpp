#include "api.hpp"

#include <ctime>
#include <nlohmann/json.hpp>

namespace service {
namespace {

using nlohmann::json;

constexpr const char* kJson = "application/json";

std::string dump(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); }

// An error in the form that OpenAI's clients read.
std::string error_json(int status, const std::string& why) {
  const char* type = status < 500 ? "invalid_request_error" : "server_error";
  return dump({{"error", {{"message", why}, {"type", type}, {"param", nullptr}, {"code", status}}}});
}

std::string next_id() {
  static std::atomic<std::uint64_t> count = 0;
  return "cmpl-" + std::to_string(++count);
}

}  // namespace

// ---- the answer to a completion -------------------------------------------------------------------------------------

Answer::Answer(HttpRequest http, std::shared_ptr<Completion> completion, std::string model)
    : http_(std::move(http)),
      completion_(std::move(completion)),
      model_(std::move(model)),
      id_(next_id()),
      created_(std::time(nullptr)) {}

std::string Answer::take() {
  const Completion::Update update = completion_->take();
  all_.text += update.text;
  all_.token_ids.insert(all_.token_ids.end(), update.token_ids.begin(), update.token_ids.end());
  if (!update.failure.empty()) return fail(update);
  over_ = update.is_last();
  if (!completion_->request.stream) {
    if (!over_) return "";
    all_.finish_reason = update.finish_reason;
    return whole_answer(&http_, 200, kJson, body(all_, true) + "\n");
  }
  if (!over_ && update.token_ids.empty() && update.text.empty()) return "";
  const std::string bytes = (begun_ ? "" : streamed_head(http_)) + piece(body(update, over_));
  begun_ = true;
  return over_ ? bytes + piece("[DONE]") + streamed_end(http_) : bytes;
}

std::string Answer::fail(const Completion::Update& update) {
  over_ = true;
  failed_ = begun_;
  const std::string error = error_json(update.status, update.failure);
  return begun_ ? piece(error) : whole_answer(&http_, update.status, kJson, error + "\n");
}

std::string Answer::body(const Completion::Update& update, bool is_last) const {
  const CompletionRequest& request = completion_->request;
  json choice{{"index", 0}, {"text", update.text}, {"token_ids", update.token_ids}, {"logprobs", nullptr}};
  choice["finish_reason"] = update.finish_reason.empty() ? json() : json(update.finish_reason);
  json value{{"id", id_},       {"object", "text_completion"},   {"created", created_},
             {"model", model_}, {"seed", request.sampling.seed}, {"choices", {choice}}};
  if (is_last) {
    const std::size_t prompt = request.token_ids.size(), written = all_.token_ids.size();
    value["usage"] = {{"prompt_tokens", prompt}, {"completion_tokens", written}, {"total_tokens", prompt + written}};
  }
  return dump(value);
}

// ---- routes ---------------------------------------------------------------------------------------------------------

Api::Api(const megalodon::Engine& engine, std::string model, Scheduler& scheduler, Metrics& metrics, Limits limits)
    : engine_(engine), model_(std::move(model)), scheduler_(scheduler), metrics_(metrics), limits_(limits) {
  limits_.vocab_size = engine.info().vocab_size;
}

std::string Api::refuse(const HttpRequest* request, int status, const std::string& why) {
  metrics_.count(status == 503 ? Outcome::busy : status == 500 ? Outcome::failed : Outcome::refused);
  return whole_answer(request, status, kJson, error_json(status, why) + "\n");
}

std::variant<std::string, std::unique_ptr<Answer>> Api::answer(HttpRequest request, std::function<void()> changed) {
  try {
    const bool reads = request.method == "GET" || request.method == "HEAD";
    if (reads && request.path == "/health") {
      if (scheduler_.is_draining()) throw Refused(503, kShuttingDown);
      return whole_answer(&request, 200, kJson, "{\"status\":\"ok\"}\n");
    }
    if (reads && request.path == "/metrics") {
      return whole_answer(&request, 200, "text/plain; version=0.0.4", metrics_.text());
    }
    if (request.method != "POST" || request.path != "/v1/completions") {
      throw Refused(404, "there is no " + request.method.substr(0, 20) + ' ' + request.path.substr(0, 80) +
                             "; there are POST /v1/completions, GET /health and GET /metrics");
    }
    CompletionRequest asked = read(request);
    const std::string model = asked.model.empty() ? model_ : asked.model;
    auto completion = scheduler_.submit(std::move(asked), std::move(changed));
    if (completion == nullptr) {
      throw Refused(503, scheduler_.is_draining() ? kShuttingDown : "the queue is full; try again later");
    }
    return std::make_unique<Answer>(std::move(request), std::move(completion), model);
  } catch (const Refused& error) {
    return refuse(&request, error.status, error.what());
  }
}

CompletionRequest Api::read(const HttpRequest& http) {
  CompletionRequest request = parse_request(http.body, limits_, seeds_());
  const megalodon_engine_info info = engine_.info();
  if (info.has_tokenizer == 0 && !request.stop.empty()) {
    throw Refused(400, "stop strings need a tokenizer, and this model's bundle has none that the service reads");
  }
  try {
    if (request.is_text) request.token_ids = engine_.encode(request.text);
  } catch (const megalodon::Error& error) {
    throw Refused(400, error.what());
  }
  if (request.token_ids.size() > limits_.prompt_tokens) {
    throw too_long(request.token_ids.size(), limits_.prompt_tokens);
  }
  if (request.token_ids.empty()) {
    if (info.bos_token_id < 0) throw Refused(400, "the prompt is empty, and the model has no token to begin with");
    request.token_ids = {info.bos_token_id};
  }
  return request;
}

}  // namespace service
