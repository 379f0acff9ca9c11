// The service's routes over HTTP.
#pragma once

#include <httplib.h>

#include <memory>
#include <string>

#include "scheduler.hpp"

namespace service {

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8080;              // 0: any free one
  std::size_t connections = 0;  // served at the same time; further ones wait to be accepted
  Limits limits;
};

class HttpServer {
 public:
  HttpServer(const megalodon::Engine& engine, std::string model, Scheduler& scheduler, Metrics& metrics,
             HttpOptions options);

  // Binds and returns the port. Throws std::runtime_error if it cannot.
  int bind();
  // Serves until another thread calls `stop`.
  void listen() { server_.listen_after_bind(); }
  void stop() { server_.stop(); }

 private:
  void add_routes();
  void complete(const httplib::Request& http, httplib::Response& response, const httplib::ContentReader& reader);
  CompletionRequest read(const httplib::Request& http, const httplib::ContentReader& reader) const;
  void refuse(httplib::Response& response, int status, const std::string& why);

  const megalodon::Engine& engine_;
  const std::string model_;
  Scheduler& scheduler_;
  Metrics& metrics_;
  const HttpOptions options_;
  httplib::Server server_;
  int listening_ = -1;
};

}  // namespace service
