// megalodon-service: completions over HTTP from an exported bundle, many clients in one batch. An example of a service
// on the public interface; README.md says what it answers.
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
  app.add_option("--host", arguments.http.host, "address to listen at")->capture_default_str();
  app.add_option("--port", arguments.http.port, "0: any that is free")->capture_default_str();
  app.add_option("--streams", arguments.scheduler.streams, "requests in one batch")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--queue", arguments.scheduler.queue, "requests that may wait; more are answered 503")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--prefill-tokens", arguments.scheduler.prefill_tokens, "tokens of prompts between two decode steps")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--max-body-bytes", limits.body_bytes, "of a request")->capture_default_str();
  app.add_option("--max-prompt-tokens", limits.prompt_tokens, "of a request")->capture_default_str();
  app.add_option("--max-new-tokens", limits.new_tokens, "that a request may ask for")->capture_default_str();
  app.add_option("--drain-seconds", arguments.drain_seconds, "for running requests after SIGTERM")
      ->check(CLI::Range(0, 3600))
      ->capture_default_str();
  app.add_flag("--no-hashes", arguments.no_hashes, "trust the contents of files of the right size");
}

void serve(Arguments& arguments, const sigset_t& signals) {
  const megalodon::Engine engine(arguments.bundle, !arguments.no_hashes);
  const auto most = static_cast<std::size_t>(engine.info().max_batch);
  arguments.scheduler.streams = std::min(arguments.scheduler.streams, most);
  arguments.http.connections = arguments.scheduler.streams + arguments.scheduler.queue + 32;  // some for refusals
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
  sigset_t signals;  // for every thread, so that this one alone waits for them
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
