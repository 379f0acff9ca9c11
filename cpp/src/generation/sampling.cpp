#include "generation/sampling.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "error.hpp"
#include "text_format.hpp"

// Compiled with -ffp-contract=off: a fused multiply-add rounds once where the algorithm rounds twice.

namespace megalodon::impl {
namespace {

constexpr double kLog2E = 1.4426950408889634;
// ln 2 in two parts (fdlibm e_exp.c): the high part's product with a small n is exact.
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

// Of a row; a positive one is a number of NaNs. As model/kernels/__init__.py.
constexpr std::int64_t kPositiveInfinity = -1, kNothingLeft = -2;

std::int64_t fault_of(std::span<const float> logits, float peak) {
  const auto nans = std::ranges::count_if(logits, [](float logit) { return std::isnan(logit); });
  constexpr float infinity = std::numeric_limits<float>::infinity();
  return nans > 0 ? nans : peak == infinity ? kPositiveInfinity : peak == -infinity ? kNothingLeft : 0;
}

void require_no_fault(std::int64_t fault, std::size_t logits_size) {
  const std::string found = fault == kPositiveInfinity ? "+inf among the logits"
                            : fault == kNothingLeft
                                ? "-inf for every token"
                                : "NaN in " + std::to_string(fault) + " of " + std::to_string(logits_size) + " logits";
  require(fault == 0, "row 0 cannot be sampled: " + found +
                          ", expected finite logits (or -inf for tokens that are ruled out); check the weights, the "
                          "dtype and any logits mask");
}

// What is added and taken away to round to the nearest integer, ties to even: |x| < 2**51 by the first, 0 <= x <= 2**52
// by the second. What the compiler makes of std::nearbyint is a call, unless it knows of SSE4.1.
constexpr double kRounder = 0x1.8p52, kRounderOfWeights = 0x1p52;

// The most probable tokens by rank: at least `count` of them, or all. A block's largest logit is a logit, so no more
// than count logits exceed the largest but count of them, and what is below that one need not be sorted.
std::vector<std::uint32_t> most_probable(std::span<const float> logits, std::size_t count) {
  constexpr std::size_t kBlock = 32;
  float least = -std::numeric_limits<float>::infinity();
  const std::size_t blocks = logits.size() / kBlock;
  if (count <= blocks) {
    std::vector<float> peaks(blocks, least);
    for (std::size_t i = 0; i < blocks; ++i) {
      for (std::size_t j = 0; j < kBlock; ++j) peaks[i] = std::max(peaks[i], logits[i * kBlock + j]);
    }
    const auto last = peaks.begin() + static_cast<std::ptrdiff_t>(count) - 1;
    std::ranges::nth_element(peaks, last, std::greater{});
    least = *last;
  }
  std::vector<std::uint32_t> ids;
  for (std::uint32_t id = 0; id < logits.size(); ++id) {
    if (logits[id] >= least) ids.push_back(id);
  }
  std::ranges::stable_sort(ids, std::greater{}, [&](std::uint32_t id) { return logits[id]; });
  return ids;
}

// Sums of weights are of integers below 2**53: exact, in any order.
double sum(std::span<const double> weights) { return std::accumulate(weights.begin(), weights.end(), 0.0); }

// What a token's logit, seen from the peak, weighs beside the peak's `unit`.
double weight_of(float logit, float peak, double temperature, double unit) {
  const double below = static_cast<double>(logit) - static_cast<double>(peak);
  const double weight = exp_reproducible(std::max(below / temperature, kLowestExponent)) * unit;
  return (weight + kRounderOfWeights) - kRounderOfWeights;
}

// How many tokens are left by top-p, of some with these weights, by rank: one stays while less than `wanted` is before
// it.
std::size_t nucleus(std::span<const double> weights, double wanted) {
  double before = 0.0;
  std::size_t size = 0;
  while (size < weights.size() && before < wanted) before += weights[size++];
  return size;
}

// Sets the weights of tokens that top-p drops to zero.
void keep_nucleus(std::vector<double>& weights, std::span<const float> logits, double top_p) {
  const double wanted = top_p * sum(weights);
  std::vector<std::uint32_t> ids;
  std::vector<double> ranked;
  std::size_t size = 0;
  for (std::size_t count = 64; size == ids.size() && size < logits.size(); count *= 8) {
    ids = most_probable(logits, count);
    ranked.clear();
    for (const std::uint32_t id : ids) ranked.push_back(weights[id]);
    size = nucleus(ranked, wanted);
  }
  std::ranges::fill(weights, 0.0);
  for (std::size_t rank = 0; rank < size; ++rank) weights[ids[rank]] = ranked[rank];
}

void drop_below(std::vector<double>& weights, double least) {
  for (double& weight : weights) weight = weight >= least ? weight : 0.0;
}

// The first token at which the sum of weights exceeds its share of all of them: by blocks, each of four sums that do
// not wait for one another.
std::size_t pick(std::span<const double> weights, double share) {
  constexpr std::size_t kBlock = 256;
  std::vector<double> sums((weights.size() + kBlock - 1) / kBlock);
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const auto block = weights.subspan(i * kBlock, std::min(kBlock, weights.size() - i * kBlock));
    std::array<double, 4> parts{};
    for (std::size_t j = 0; j < block.size(); ++j) parts[j % 4] += block[j];
    sums[i] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
  const double target = share * sum(sums);
  double cumulative = 0.0;
  std::size_t block = 0;
  while (cumulative + sums[block] <= target) cumulative += sums[block++];
  std::size_t id = block * kBlock;
  while ((cumulative += weights[id]) <= target) ++id;
  return id;
}

// What is wrong with a program's logits is no fault of the caller's arguments.
template <typename Call>
auto as_failed(Call call) {
  try {
    return call();
  } catch (const Error& error) {
    throw Error(MEGALODON_FAILED, error.what());
  }
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
  // n = nearest integer to x log2(e); it stands in the last bits of its sum with kRounder, more than an exponent has.
  const double shifted = x * kLog2E + kRounder;
  const double n = shifted - kRounder;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double result = kTaylor.back();
  for (std::size_t k = kTaylor.size() - 1; k-- > 0;) result = result * r + kTaylor[k];
  return result * std::bit_cast<double>((std::bit_cast<std::uint64_t>(shifted) + 1023) << 52);
}

std::int64_t sample(std::span<const float> logits, const megalodon_sampling& params, std::uint64_t index) {
  const auto peak = std::ranges::max_element(logits);  // the first of equal ones
  require_no_fault(fault_of(logits, *peak), logits.size());
  if (params.temperature == 0.0) return peak - logits.begin();
  const double unit = std::ldexp(1.0, 53 - std::bit_width(logits.size()));
  const auto weight = [peak = *peak, temperature = params.temperature, unit](float logit) {
    return weight_of(logit, peak, temperature, unit);
  };
  const double share = uniform(params.seed, index), least = params.min_p * unit;
  std::vector<double> weights;
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < logits.size()) {
    auto ids = most_probable(logits, static_cast<std::size_t>(params.top_k));
    ids.resize(static_cast<std::size_t>(params.top_k));
    const auto weigh = [&] {
      weights.clear();
      for (const std::uint32_t id : ids) weights.push_back(weight(logits[id]));
    };
    weigh();
    ids.resize(nucleus(weights, params.top_p * sum(weights)));
    std::ranges::sort(ids);
    weigh();
    drop_below(weights, least);
    return ids[pick(weights, share)];
  }
  weights.resize(logits.size());
  for (std::size_t id = 0; id < logits.size(); ++id) weights[id] = weight(logits[id]);
  if (params.top_p < 1.0) keep_nucleus(weights, logits, params.top_p);
  drop_below(weights, least);
  return static_cast<std::int64_t>(pick(weights, share));
}

std::int64_t sample_checked(std::span<const float> logits, const megalodon_sampling& params, std::uint64_t index) {
  return as_failed([&] { return sample(logits, params, index); });
}

void check_fault(std::int64_t fault, std::int64_t logits_size) {
  as_failed([&] { require_no_fault(fault, static_cast<std::size_t>(logits_size)); });
}

}  // namespace megalodon::impl
