// megalodon-cli: continues a prompt from the command line or standard input. Streams the text and reports the time of
// each phase.
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>
#include <limits>
#include <megalodon.hpp>

#include "numbers.hpp"

namespace {

megalodon_session* running = nullptr;

void stop(int) { megalodon_session_stop(running); }

struct Arguments {
  std::string bundle, prompt, restore, save;
  std::vector<std::int64_t> ids;
  megalodon::GenerateOptions generate;
  bool no_hashes = false, quiet = false;
};

void describe(CLI::App& app, Arguments& arguments) {
  app.add_option("bundle", arguments.bundle, "folder that `megalodon-export aoti` wrote")->required();
  auto* prompt = app.add_option("--prompt,-p", arguments.prompt, "text to continue; without it, standard input");
  app.add_option("--ids", arguments.ids, "token ids to continue; prints the ids that follow, one per line")
      ->excludes(prompt)
      ->check(cli::within<std::int64_t>("--ids", 0, INT64_MAX));
  constexpr double least = std::numeric_limits<double>::min(), most = std::numeric_limits<double>::max();
  auto& [sampling, max_new_tokens, eos, stop] = arguments.generate;
  cli::add_number<std::int64_t>(app, "--max-new-tokens,-n", max_new_tokens, 1, INT64_MAX, "number of tokens at most");
  cli::add_number(app, "--temperature", sampling.temperature, 0.0, most, "0 is greedy", "a finite number >= 0");
  cli::add_number<std::int64_t>(app, "--top-k", sampling.top_k, 0, INT64_MAX, "0 is off");
  cli::add_number(app, "--top-p", sampling.top_p, least, 1.0, "1 is off", "a number above 0, 1 at most");
  cli::add_number(app, "--min-p", sampling.min_p, 0.0, 1.0, "0 is off");
  cli::add_number<std::uint64_t>(app, "--seed", sampling.seed, 0, UINT64_MAX, "equal seeds give equal texts");
  app.add_option("--stop", stop, "string that ends the text; may be repeated")
      ->allow_extra_args(false);
  app.add_option("--restore", arguments.restore, "snapshot to continue from");
  app.add_option("--save", arguments.save, "file for a snapshot of the final state");
  app.add_flag("--no-hashes", arguments.no_hashes, "check the sizes of the files, but not their sha256");
  app.add_flag("--quiet,-q", arguments.quiet, "print no timings");
}

void print(std::string_view text) {
  std::cout << text << std::flush;
  if (!std::cout) throw std::runtime_error(std::string("standard output cannot be written: ") + std::strerror(errno));
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void report(const megalodon_engine_info& info, const megalodon_generate_result& result, double load, double first) {
  const double per_second =
      result.prefill_seconds > 0 ? static_cast<double>(result.prompt_tokens) / result.prefill_seconds : 0;
  std::fprintf(stderr, "load         %10.3f s\n", load);
  std::fprintf(stderr, "prefill      %10.3f s  %lld tokens, %.1f tokens/s\n", result.prefill_seconds,
               static_cast<long long>(result.prompt_tokens), per_second);
  std::fprintf(stderr, "first token  %10.3f s  after the start of generation\n", first);
  const double steps = static_cast<double>(result.new_tokens) - (result.finish == MEGALODON_FINISH_EOS ? 0 : 1);
  if (steps >= 1 && result.decode_seconds > 0) {
    const double rate = steps / result.decode_seconds;
    const double bytes = static_cast<double>(info.weight_bytes + info.state_bytes);
    std::fprintf(stderr, "decode       %10.3f s  %.0f steps, %.1f tokens/s, %.2f GB/s of weights and state\n",
                 result.decode_seconds, steps, rate, rate * bytes / 1e9);
  }
  std::fprintf(stderr, "sampling     %10.3f s\n", result.sample_seconds);
}

void run(const Arguments& arguments) {
  const auto start = std::chrono::steady_clock::now();
  const megalodon::Engine engine(arguments.bundle, !arguments.no_hashes);
  megalodon::Session session(engine);
  if (!arguments.restore.empty()) session.restore(megalodon::Snapshot::load(arguments.restore));
  const double load = seconds_since(start);
  running = session.get();
  std::signal(SIGINT, stop);

  std::optional<double> first;
  const auto begin = std::chrono::steady_clock::now();
  megalodon_generate_result result{};
  if (!arguments.ids.empty()) {
    result = session.generate(arguments.ids, arguments.generate, [&](std::int64_t token) {
      if (!first) first = seconds_since(begin);
      print(std::to_string(token) + '\n');
    });
  } else {
    std::string prompt = arguments.prompt;
    if (prompt.empty()) prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
    result = session.generate(prompt, arguments.generate, [&](std::string_view piece) {
      if (!first) first = seconds_since(begin);
      print(piece);
    });
    print("\n");
  }
  if (!arguments.save.empty()) session.snapshot().save(arguments.save);
  if (!arguments.quiet) report(engine.info(), result, load, first.value_or(0.0));
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("Continues a text with an exported Megalodon bundle. Text goes to stdout, timings to stderr.");
  app.set_version_flag("--version", megalodon_version());
  describe(app, arguments);
  try {
    const std::optional<int> status = cli::parse(app, argc, argv);
    if (!status) run(arguments);
    print("");
    return status.value_or(0);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
