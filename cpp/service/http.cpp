#include "http.hpp"

#include <sys/socket.h>

#include <nlohmann/json.hpp>
#include <random>
#include <semaphore>
#include <set>

namespace service {
namespace {

using nlohmann::json;

constexpr std::chrono::milliseconds kPollInterval{100};  // between checks whether the client is still connected
constexpr std::size_t kMaxDiscarded = 64 << 20;          // bytes of a body that are read although it is too large
constexpr int kRetryAfter = 1;                           // seconds
constexpr const char* kJson = "application/json";

// One thread for each connection that is served. It accepts the next connection when a thread is free.
class Connections : public httplib::ThreadPool {
 public:
  explicit Connections(std::size_t count) : ThreadPool(count), free_(static_cast<std::ptrdiff_t>(count)) {}
  void enqueue(std::function<void()> serve) override {
    free_.acquire();
    ThreadPool::enqueue([this, serve = std::move(serve)] {
      serve();
      free_.release();
    });
  }

 private:
  std::counting_semaphore<> free_;
};

std::string dump(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); }

json error_json(int status, const std::string& why) {
  const char* type = status < 500 ? "invalid_request_error" : "server_error";
  return {{"error", {{"message", why}, {"type", type}, {"code", status}}}};
}

// Reads a body of at most `most` bytes. It reads a larger one to its end before it refuses it: if the connection closed
// at once, the client would lose the answer.
std::string read_body(const httplib::ContentReader& reader, std::size_t most) {
  std::string body;
  std::size_t size = 0;
  const bool whole = reader([&](const char* data, std::size_t length) {
    size += length;
    if (size <= most) body.append(data, length);
    return size <= most + kMaxDiscarded;
  });
  if (size > most) throw Refused(413, "the body is larger than " + std::to_string(most) + " bytes, send a shorter one");
  if (!whole) throw Refused(400, "the body cannot be read to its end");
  return body;
}

// The answer to one request, sent piece by piece or as a whole.
class Answer {
 public:
  Answer(std::shared_ptr<Completion> completion, std::string model)
      : completion_(std::move(completion)), model_(std::move(model)) {}
  ~Answer() { completion_->cancel(); }  // the connection is over

  // Sends what is new. Returning false ends the connection before the end of the answer, so the client sees a failure.
  bool send(httplib::DataSink& sink) {
    if (!sink.is_writable()) return false;
    const Completion::Update update = completion_->wait(kPollInterval);
    all_.text += update.text;
    all_.token_ids.insert(all_.token_ids.end(), update.token_ids.begin(), update.token_ids.end());
    const bool stream = completion_->request.stream;
    if (!update.failure.empty()) {
      write(sink, error_json(500, update.failure));
      return false;
    }
    if (stream && (update.is_last() || !update.token_ids.empty() || !update.text.empty())) {
      write(sink, body(update, update.is_last()));
    }
    if (!update.is_last()) return true;
    all_.finish_reason = update.finish_reason;
    if (!stream) write(sink, body(all_, true));
    if (stream) write(sink, std::string("[DONE]"));
    sink.done();
    return true;
  }

 private:
  void write(httplib::DataSink& sink, const json& value) { write(sink, dump(value)); }
  void write(httplib::DataSink& sink, const std::string& text) {
    const std::string framed = completion_->request.stream ? "data: " + text + "\n\n" : text + "\n";
    sink.write(framed.data(), framed.size());
  }

  json body(const Completion::Update& update, bool is_last) const {
    const CompletionRequest& request = completion_->request;
    json choice{{"index", 0}, {"text", update.text}, {"token_ids", update.token_ids}, {"logprobs", nullptr}};
    choice["finish_reason"] = update.finish_reason.empty() ? json() : json(update.finish_reason);
    json value{{"id", id_},       {"object", "text_completion"},   {"created", created_},
               {"model", model_}, {"seed", request.sampling.seed}, {"choices", {choice}}};
    if (is_last) {
      const std::size_t prompt = request.token_ids.size(), written = all_.token_ids.size();
      value["usage"] = {{"prompt_tokens", prompt}, {"completion_tokens", written}, {"total_tokens", prompt + written}};
    }
    return value;
  }

  static std::string next_id() {
    static std::atomic<std::uint64_t> count = 0;
    return "cmpl-" + std::to_string(++count);
  }

  const std::shared_ptr<Completion> completion_;
  const std::string model_, id_ = next_id();
  const std::int64_t created_ = std::time(nullptr);
  Completion::Update all_;
};

}  // namespace

HttpServer::HttpServer(const megalodon::Engine& engine, std::string model, Scheduler& scheduler, Metrics& metrics,
                       HttpOptions options)
    : engine_(engine),
      model_(std::move(model)),
      scheduler_(scheduler),
      metrics_(metrics),
      options_(std::move(options)) {
  server_.new_task_queue = [this] { return new Connections(options_.connections); };
  server_.set_socket_options([this](int socket) {  // cpp-httplib's default would let two services share a port
    const int on = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    listening_ = socket;
  });
  server_.set_tcp_nodelay(true);
  server_.set_keep_alive_timeout(2);  // seconds; a shutdown waits for them
  server_.set_keep_alive_max_count(100);
  server_.set_exception_handler([this](const httplib::Request&, httplib::Response& response, std::exception_ptr) {
    refuse(response, 500, "the service failed; its log may say why");
  });
  const httplib::Server::HandlerWithResponse count = [this](const auto&, httplib::Response& response) {
    if (response.body.empty()) refuse(response, response.status, "the request cannot be parsed; is it HTTP/1.1?");
    metrics_.count(response.status == 503 ? Outcome::busy : response.status < 500 ? Outcome::refused : Outcome::failed);
    return httplib::Server::HandlerResponse::Handled;
  };
  server_.set_error_handler(count);
  add_routes();
}

int HttpServer::bind() {
  const int port = options_.port == 0                                   ? server_.bind_to_any_port(options_.host)
                   : server_.bind_to_port(options_.host, options_.port) ? options_.port
                                                                        : -1;
  if (port < 0) {
    throw std::runtime_error(options_.host + ":" + std::to_string(options_.port) +
                             " cannot be bound: is another service there? Choose another --port or --host.");
  }
  ::listen(listening_, SOMAXCONN);  // replaces cpp-httplib's backlog of 5 connections
  return port;
}

void HttpServer::add_routes() {
  const auto nothing_there = [this](const httplib::Request& http, httplib::Response& response) {
    refuse(response, 404,
           "there is no " + http.path.substr(0, 80) + "; there are POST /v1/completions, GET /health and GET /metrics");
  };
  server_.set_pre_routing_handler([this](const httplib::Request& http, httplib::Response& response) {
    static const std::set<std::string> known{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"};
    if (known.contains(http.method)) return httplib::Server::HandlerResponse::Unhandled;
    refuse(response, 405, "the method is unknown, expected GET or POST");
    return httplib::Server::HandlerResponse::Handled;
  });
  server_.Post("/v1/completions",
               [this](const auto& http, auto& response, const auto& reader) { complete(http, response, reader); });
  server_.Get("/health", [this](const httplib::Request&, httplib::Response& response) {
    if (scheduler_.is_draining()) return refuse(response, 503, kShuttingDown);
    response.set_content("{\"status\":\"ok\"}\n", kJson);
  });
  server_.Get("/metrics", [this](const httplib::Request&, httplib::Response& response) {
    response.set_content(metrics_.text(), "text/plain; version=0.0.4");
  });
  server_.Get(".*", nothing_there);
  server_.Options(".*", nothing_there);
  const auto nothing_to_write = [=](const auto& http, auto& response, const auto& reader) {
    reader(
        [size = std::size_t{0}](const char*, std::size_t length) mutable { return (size += length) <= kMaxDiscarded; });
    nothing_there(http, response);
  };
  server_.Post(".*", nothing_to_write).Put(".*", nothing_to_write).Patch(".*", nothing_to_write);
  server_.Delete(".*", httplib::Server::HandlerWithContentReader(nothing_to_write));
}

void HttpServer::refuse(httplib::Response& response, int status, const std::string& why) {
  response.status = status;
  response.set_content(dump(error_json(status, why)) + "\n", kJson);
  if (status == 503) response.set_header("Retry-After", std::to_string(kRetryAfter));
}

CompletionRequest HttpServer::read(const httplib::Request& http, const httplib::ContentReader& reader) const {
  if (http.is_multipart_form_data()) throw Refused(400, "the body is a form, expected a JSON object");
  static thread_local std::mt19937_64 seeds{std::random_device{}()};
  CompletionRequest request = parse_request(read_body(reader, options_.limits.body_bytes), options_.limits, seeds());
  const megalodon_engine_info info = engine_.info();
  if (info.has_tokenizer == 0 && !request.stop.empty()) {
    throw Refused(400, "stop strings need a tokenizer, and this model's bundle has none that the service reads");
  }
  try {
    if (request.is_text) request.token_ids = engine_.encode(request.text);
  } catch (const megalodon::Error& error) {
    throw Refused(400, error.what());
  }
  if (request.token_ids.size() > options_.limits.prompt_tokens) {
    throw too_long(request.token_ids.size(), options_.limits.prompt_tokens);
  }
  if (request.token_ids.empty()) {
    if (info.bos_token_id < 0) throw Refused(400, "the prompt is empty, and the model has no token to begin with");
    request.token_ids = {info.bos_token_id};
  }
  for (const std::int64_t id : request.token_ids) {
    if (id >= info.vocab_size) {
      throw Refused(400, "the prompt has token id " + std::to_string(id) + ", expected 0.." +
                             std::to_string(info.vocab_size - 1));
    }
  }
  return request;
}

void HttpServer::complete(const httplib::Request& http, httplib::Response& response,
                          const httplib::ContentReader& reader) {
  try {
    CompletionRequest request = read(http, reader);
    const std::string model = request.model.empty() ? model_ : request.model;
    const char* type = request.stream ? "text/event-stream" : kJson;
    const auto completion = scheduler_.submit(std::move(request));
    if (completion == nullptr) {
      return refuse(response, 503, scheduler_.is_draining() ? kShuttingDown : "the queue is full; try again later");
    }
    const auto answer = std::make_shared<Answer>(completion, model);
    response.set_header("Cache-Control", "no-store");
    response.set_chunked_content_provider(
        type, [answer](std::size_t, httplib::DataSink& sink) { return answer->send(sink); });
  } catch (const Refused& error) {
    refuse(response, error.status, error.what());
  }
}

}  // namespace service
