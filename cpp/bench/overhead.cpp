// Measures what generation costs on top of the decode program: seconds per token of both, alternating, as JSON.
//
//     megalodon-overhead BUNDLE [STEPS]
//
// "program" runs decode steps of one stream without a session. On a GPU, each step feeds the token that the step before
// it chose; on a CPU, all steps feed the same token. "generate" and "sampled" generate through the public interface.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <megalodon.hpp>

#include "runtime/engine.hpp"

namespace {

using megalodon::impl::CapturedStep;

constexpr int kRounds = 9;

double seconds_of(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::array<double, kRounds> values) {
  std::ranges::nth_element(values, values.begin() + kRounds / 2);
  return values[kRounds / 2];
}

// Runs the decode program alone, on its own stream.
class ProgramAlone {
 public:
  explicit ProgramAlone(const char* bundle) : engine_(bundle, true, 1), row_(engine_.new_cache()) {}

  void run(std::int64_t steps) {
    std::int64_t token = 1;
    const auto& cache = row_.view();
    if (CapturedStep* step = engine_.captured_step(cache)) {
      for (std::int64_t i = 0; i < steps; ++i) {
        step->launch(i == 0 ? std::span<const std::int64_t>(&token, 1) : std::span<const std::int64_t>{}, 0);
      }
      return step->read(0, {&token, 1});
    }
    const std::array<std::int64_t, 1> one{1};
    const auto ids = megalodon::impl::Tensor::over(&token, one, *megalodon::impl::dtype_by_name("int64"),
                                                   aoti_torch_device_type_cpu());
    for (std::int64_t i = 0; i < steps; ++i) engine_.decode_program(1).run({&ids}, cache, nullptr);
  }

 private:
  megalodon::impl::Engine engine_;
  megalodon::impl::CacheRow row_;
};

double generate(megalodon::Session& session, std::int64_t steps, double temperature) {
  megalodon::GenerateOptions options;
  options.max_new_tokens = steps + 1;
  options.eos_token_id = MEGALODON_NO_EOS;
  options.sampling.temperature = temperature;
  options.sampling.top_k = temperature > 0.0 ? 50 : 0;
  std::chrono::steady_clock::time_point first, last;
  session.generate(std::vector<std::int64_t>{1}, options, [&](std::int64_t) {
    last = std::chrono::steady_clock::now();
    if (first == decltype(first){}) first = last;
  });
  return std::chrono::duration<double>(last - first).count();
}

int run(const char* bundle, std::int64_t steps) {
  ProgramAlone program(bundle);
  const megalodon::Engine engine(bundle);
  megalodon::Session greedy(engine), sampled(engine);
  program.run(steps);
  generate(greedy, steps, 0.0);
  generate(sampled, steps, 0.8);
  std::array<double, kRounds> program_seconds{}, greedy_seconds{}, sampled_seconds{};
  for (std::size_t i = 0; i < kRounds; ++i) {
    program_seconds[i] = seconds_of([&] { program.run(steps); }) / static_cast<double>(steps);
    greedy_seconds[i] = generate(greedy, steps, 0.0) / static_cast<double>(steps);
    sampled_seconds[i] = generate(sampled, steps, 0.8) / static_cast<double>(steps);
  }
  const double base = median(program_seconds), generation = median(greedy_seconds);
  std::printf("{\"steps\": %lld, \"rounds\": %d, \"program_seconds\": %.9f, \"generate_seconds\": %.9f, ",
              static_cast<long long>(steps), kRounds, base, generation);
  std::printf("\"overhead\": %.5f, \"sampled_seconds\": %.9f}\n", generation / base - 1.0, median(sampled_seconds));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s BUNDLE [STEPS]\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1], argc > 2 ? std::max(1LL, std::atoll(argv[2])) : 200);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
