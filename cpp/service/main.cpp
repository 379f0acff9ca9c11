// megalodon-service: completions over HTTP from an exported bundle, with many clients in one batch. An example of a
// service that uses the public interface; README.md describes the requests.
#include <CLI/CLI.hpp>
#include <csignal>
#include <filesystem>
#include <iostream>

#include "http.hpp"

namespace {

struct Arguments {
  std::string bundle;
  bool no_hashes = false;
  int drain_seconds = 10;
  service::HttpOptions http;
  service::SchedulerOptions scheduler;
};

void describe(CLI::App& app, Arguments& arguments) {
  service::Limits& limits = arguments.http.limits;
  app.add_option("bundle", arguments.bundle, "folder that `megalodon-export aoti` wrote")->required();
  app.add_option("--host", arguments.http.host, "address to listen on")->capture_default_str();
  app.add_option("--port", arguments.http.port, "0: any free one")->capture_default_str();
  app.add_option("--streams", arguments.scheduler.streams, "requests in one batch")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--queue", arguments.scheduler.queue, "requests that may wait; more are answered 503")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--prefill-tokens", arguments.scheduler.prefill_tokens, "tokens of prompts between two decode steps")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--max-body-bytes", limits.body_bytes, "bytes of a request's body at most")->capture_default_str();
  app.add_option("--max-prompt-tokens", limits.prompt_tokens, "tokens of a prompt at most")->capture_default_str();
  app.add_option("--max-new-tokens", limits.new_tokens, "tokens that a request may ask for")->capture_default_str();
  app.add_option("--drain-seconds", arguments.drain_seconds, "time for running requests to end after SIGTERM")
      ->check(CLI::Range(0, 3600))
      ->capture_default_str();
  app.add_flag("--no-hashes", arguments.no_hashes, "check the sizes of the files, but not their sha256");
}

void serve(Arguments& arguments, const sigset_t& signals) {
  const megalodon::Engine engine(arguments.bundle, !arguments.no_hashes);
  const auto most = static_cast<std::size_t>(engine.info().max_batch);
  arguments.scheduler.streams = std::min(arguments.scheduler.streams, most);
  arguments.http.connections = arguments.scheduler.streams + arguments.scheduler.queue + 32;  // the 32 are for refusals
  service::Metrics metrics;
  service::Scheduler scheduler(engine, arguments.scheduler, metrics);
  const std::string model = std::filesystem::absolute(arguments.bundle).lexically_normal().filename();
  service::HttpServer server(engine, model, scheduler, metrics, arguments.http);
  const int port = server.bind();
  std::thread listener([&] { server.listen(); });
  std::cout << "listening on http://" << arguments.http.host << ':' << port << std::endl;
  int signal = 0;
  sigwait(&signals, &signal);
  std::cout << "shutting down" << std::endl;
  scheduler.drain(std::chrono::seconds(arguments.drain_seconds));
  server.stop();
  listener.join();
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app(
      "Serves completions from an exported Megalodon bundle: POST /v1/completions, GET /health, GET /metrics.");
  app.set_version_flag("--version", megalodon_version());
  describe(app, arguments);
  CLI11_PARSE(app, argc, argv);
  sigset_t signals;  // blocked in every thread, so that `serve` can wait for them
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  try {
    serve(arguments, signals);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
