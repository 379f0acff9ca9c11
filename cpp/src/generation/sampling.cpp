#include "generation/sampling.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "error.hpp"
#include "python_format.hpp"
#include "runtime/logits.hpp"

// CMakeLists.txt compiles this file with -ffp-contract=off: a fused multiply-add rounds once where the algorithm rounds
// twice.

namespace megalodon::impl {
namespace {

constexpr double kLog2E = 1.4426950408889634;
// ln 2 = high + low (fdlibm e_exp.c). The product of the high part with a small integer is exact.
constexpr double kLn2High = 6.93147180369123816490e-01;
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kLowestExponent = -64.0;

constexpr auto kTaylor = [] {
  std::array<double, 14> coefficients{};
  double factorial = 1.0;  // exact up to 13!
  for (int k = 0; k < 14; ++k) {
    if (k > 0) factorial *= k;
    coefficients[static_cast<std::size_t>(k)] = 1.0 / factorial;
  }
  return coefficients;
}();

// Adding and subtracting one of these rounds to the nearest integer, ties to even: kRounder for |x| < 2**51,
// kWeightRounder for 0 <= x <= 2**52. Without SSE4.1, compilers turn std::nearbyint into a slow function call.
constexpr double kRounder = 0x1.8p52, kWeightRounder = 0x1p52;

// The ids of at least `count` tokens (or of all, if there are fewer), the most probable first.
//
// It finds a logit that at least `count` logits reach, and sorts only those that reach it. The maxima of blocks give
// such a logit: the `count` largest maxima are `count` different logits.
std::vector<std::uint32_t> most_probable(std::span<const float> logits, std::size_t count) {
  constexpr std::size_t kBlock = 32;
  float threshold = -std::numeric_limits<float>::infinity();
  const std::size_t blocks = logits.size() / kBlock;
  if (count <= blocks) {
    std::vector<float> maxima(blocks, threshold);
    for (std::size_t i = 0; i < blocks; ++i) {
      for (std::size_t j = 0; j < kBlock; ++j) maxima[i] = std::max(maxima[i], logits[i * kBlock + j]);
    }
    const auto last = maxima.begin() + static_cast<std::ptrdiff_t>(count) - 1;
    std::ranges::nth_element(maxima, last, std::greater{});
    threshold = *last;
  }
  std::vector<std::uint32_t> ids;
  for (std::uint32_t id = 0; id < logits.size(); ++id) {
    if (logits[id] >= threshold) ids.push_back(id);
  }
  std::ranges::stable_sort(ids, std::greater{}, [&](std::uint32_t id) { return logits[id]; });
  return ids;
}

// Weights are integers and their sum is below 2**53, so the sum is exact in any order.
double sum(std::span<const double> weights) { return std::accumulate(weights.begin(), weights.end(), 0.0); }

// The integer weight of a token: exp((logit - largest) / temperature) * unit, rounded. The token with the largest logit
// has weight `unit`.
double weight_of(float logit, float largest, double temperature, double unit) {
  const double below = static_cast<double>(logit) - static_cast<double>(largest);
  const double weight = exp_reproducible(std::max(below / temperature, kLowestExponent)) * unit;
  return (weight + kWeightRounder) - kWeightRounder;
}

// The number of tokens that top-p keeps, given weights in falling order: a token stays while the sum of the weights
// before it is less than `wanted`.
std::size_t nucleus_size(std::span<const double> weights, double wanted) {
  double before = 0.0;
  std::size_t size = 0;
  while (size < weights.size() && before < wanted) before += weights[size++];
  return size;
}

// Sets the weights of all tokens that top-p drops to zero. It ranks the 64 most probable tokens first, and 8 times as
// many each time that those do not suffice.
void apply_top_p(std::vector<double>& weights, std::span<const float> logits, double top_p) {
  const double wanted = top_p * sum(weights);
  std::vector<std::uint32_t> ids;
  std::vector<double> ranked;
  std::size_t size = 0;
  for (std::size_t count = 64; size == ids.size() && size < logits.size(); count *= 8) {
    ids = most_probable(logits, count);
    ranked.clear();
    for (const std::uint32_t id : ids) ranked.push_back(weights[id]);
    size = nucleus_size(ranked, wanted);
  }
  std::ranges::fill(weights, 0.0);
  for (std::size_t rank = 0; rank < size; ++rank) weights[ids[rank]] = ranked[rank];
}

void apply_min_p(std::vector<double>& weights, double threshold) {
  for (double& weight : weights) weight = weight >= threshold ? weight : 0.0;
}

// The first token at which the cumulative weight exceeds `draw` times the total. It skips whole blocks of tokens first.
// The sum of a block is four independent sums, which the processor computes in parallel.
std::size_t pick(std::span<const double> weights, double draw) {
  constexpr std::size_t kBlock = 256;
  std::vector<double> sums((weights.size() + kBlock - 1) / kBlock);
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const auto block = weights.subspan(i * kBlock, std::min(kBlock, weights.size() - i * kBlock));
    std::array<double, 4> quarters{};
    for (std::size_t j = 0; j < block.size(); ++j) quarters[j % 4] += block[j];
    sums[i] = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
  }
  const double target = draw * sum(sums);
  double cumulative = 0.0;
  std::size_t block = 0;
  while (cumulative + sums[block] <= target) cumulative += sums[block++];
  std::size_t id = block * kBlock;
  while ((cumulative += weights[id]) <= target) ++id;
  return id;
}

}  // namespace

void check_sampling(const megalodon_sampling& params) {
  require(params.temperature >= 0.0 && std::isfinite(params.temperature),
          "temperature is " + repr(params.temperature) + ", expected a finite number >= 0; use 0 for greedy decoding");
  require(params.top_k >= 0,
          "top_k is " + std::to_string(params.top_k) + ", expected an integer >= 0; use 0 to turn top-k off");
  require(params.top_p > 0.0 && params.top_p <= 1.0,
          "top_p is " + repr(params.top_p) + ", expected a number in (0, 1]; use 1 to turn top-p off");
  require(params.min_p >= 0.0 && params.min_p <= 1.0,
          "min_p is " + repr(params.min_p) + ", expected a number in [0, 1]; use 0 to turn min-p off");
}

double uniform(std::uint64_t seed, std::uint64_t index) {
  std::uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

double exp_reproducible(double x) {
  // n is the nearest integer to x log2(e). The low bits of `shifted` hold n as an integer, so a shift by 52 moves it
  // into the exponent and makes 2**n.
  const double shifted = x * kLog2E + kRounder;
  const double n = shifted - kRounder;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double result = kTaylor.back();
  for (std::size_t k = kTaylor.size() - 1; k-- > 0;) result = result * r + kTaylor[k];
  return result * std::bit_cast<double>((std::bit_cast<std::uint64_t>(shifted) + 1023) << 52);
}

std::int64_t sample(std::span<const float> logits, const megalodon_sampling& params, std::uint64_t index,
                    megalodon_status bad_logits, std::size_t row) {
  const std::size_t most_probable_id = argmax(logits, bad_logits, row);
  if (params.temperature == 0.0) return static_cast<std::int64_t>(most_probable_id);
  const double unit = std::ldexp(1.0, 53 - std::bit_width(logits.size()));
  const auto weight = [largest = logits[most_probable_id], temperature = params.temperature, unit](float logit) {
    return weight_of(logit, largest, temperature, unit);
  };
  const double draw = uniform(params.seed, index), least = params.min_p * unit;
  std::vector<double> weights;
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < logits.size()) {
    auto ids = most_probable(logits, static_cast<std::size_t>(params.top_k));
    ids.resize(static_cast<std::size_t>(params.top_k));
    const auto compute_weights = [&] {
      weights.clear();
      for (const std::uint32_t id : ids) weights.push_back(weight(logits[id]));
    };
    compute_weights();
    ids.resize(nucleus_size(weights, params.top_p * sum(weights)));
    std::ranges::sort(ids);
    compute_weights();
    apply_min_p(weights, least);
    return ids[pick(weights, draw)];
  }
  weights.resize(logits.size());
  for (std::size_t id = 0; id < logits.size(); ++id) weights[id] = weight(logits[id]);
  if (params.top_p < 1.0) apply_top_p(weights, logits, params.top_p);
  apply_min_p(weights, least);
  return static_cast<std::int64_t>(pick(weights, draw));
}

}  // namespace megalodon::impl
