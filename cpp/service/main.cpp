// megalodon-service: completions over HTTP from an exported bundle, with many clients in one batch. An example of a
// service that uses the public interface; README.md describes the requests.
#include <csignal>
#include <filesystem>
#include <iostream>

#include "numbers.hpp"
#include "server.hpp"

namespace {

struct Arguments {
  std::string bundle;
  bool no_hashes = false;
  std::string host = "127.0.0.1";
  int port = 8080, drain_seconds = 10;
  service::Limits limits;
  service::SchedulerOptions scheduler;
};

void describe(CLI::App& app, Arguments& arguments) {
  using cli::add_number;
  constexpr std::size_t most = INT32_MAX;
  auto& [streams, queue, prefill_tokens] = arguments.scheduler;
  service::Limits& limits = arguments.limits;
  app.add_option("bundle", arguments.bundle, "folder that `megalodon-export aoti` wrote")->required();
  app.add_option("--host", arguments.host, "address to listen on")->capture_default_str();
  add_number(app, "--port", arguments.port, 0, 65535, "0: any free one");
  add_number<std::size_t>(app, "--streams", streams, 1, 4096, "requests in one batch");
  add_number<std::size_t>(app, "--queue", queue, 1, 4096, "requests that may wait; more are answered 503");
  add_number<std::size_t>(app, "--prefill-tokens", prefill_tokens, 1, 1 << 20,
                          "tokens of prompts between two decode steps");
  add_number<std::size_t>(app, "--max-body-bytes", limits.body_bytes, 1, most, "bytes of a request's body at most");
  add_number<std::size_t>(app, "--max-prompt-tokens", limits.prompt_tokens, 1, most, "tokens of a prompt at most");
  add_number<std::int64_t>(app, "--max-new-tokens", limits.new_tokens, 1, most, "tokens that a request may ask for");
  add_number(app, "--drain-seconds", arguments.drain_seconds, 0, 3600,
             "time for running requests to end after SIGTERM");
  app.add_flag("--no-hashes", arguments.no_hashes, "check the sizes of the files, but not their sha256");
}

void serve(Arguments& arguments, const sigset_t& signals) {
  const megalodon::Engine engine(arguments.bundle, !arguments.no_hashes);
  const auto most = static_cast<std::size_t>(engine.info().max_batch);
  arguments.scheduler.streams = std::min(arguments.scheduler.streams, most);
  service::Metrics metrics;
  service::Scheduler scheduler(engine, arguments.scheduler, metrics);
  const std::string model = std::filesystem::absolute(arguments.bundle).lexically_normal().filename();
  service::Api api(engine, model, scheduler, metrics, arguments.limits);
  service::Server server(api, arguments.host, arguments.port, arguments.limits.body_bytes);
  const int port = server.bind();
  std::thread listener([&] { server.run(); });
  std::cout << "listening on http://" << arguments.host << ':' << port << std::endl;
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
  if (const std::optional<int> status = cli::parse(app, argc, argv)) return *status;
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
