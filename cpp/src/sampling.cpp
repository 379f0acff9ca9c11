#include "sampling.hpp"

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

// Sets the weights of tokens that top-k and top-p drop to zero.
void keep_most_probable(std::vector<double>& weights, std::span<const float> logits, const megalodon_sampling& params) {
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, std::greater{}, [&](std::size_t id) { return logits[id]; });
  const std::size_t kept =
      params.top_k > 0 ? std::min<std::size_t>(static_cast<std::size_t>(params.top_k), order.size()) : order.size();
  for (std::size_t rank = kept; rank < order.size(); ++rank) weights[order[rank]] = 0.0;
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);  // integers below 2**53: exact
  double before = 0.0;
  for (std::size_t rank = 0; rank < kept; ++rank) {
    double& weight = weights[order[rank]];
    const double own = weight;
    if (!(before < params.top_p * total)) weight = 0.0;
    before += own;
  }
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
  const double n = std::nearbyint(x * kLog2E);  // ties to even
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double result = kTaylor.back();
  for (std::size_t k = kTaylor.size() - 1; k-- > 0;) result = result * r + kTaylor[k];
  return result * std::bit_cast<double>(static_cast<std::uint64_t>(static_cast<std::int64_t>(n) + 1023) << 52);
}

std::int64_t sample(std::span<const float> logits, const megalodon_sampling& params, std::uint64_t index) {
  const auto peak = std::ranges::max_element(logits);  // the first of equal ones
  require_no_fault(fault_of(logits, *peak), logits.size());
  if (params.temperature == 0.0) return peak - logits.begin();
  const double unit = std::ldexp(1.0, 53 - std::bit_width(logits.size()));
  std::vector<double> weights(logits.size());
  for (std::size_t id = 0; id < logits.size(); ++id) {
    const double below = static_cast<double>(logits[id]) - static_cast<double>(*peak);
    weights[id] = std::nearbyint(exp_reproducible(std::max(below / params.temperature, kLowestExponent)) * unit);
  }
  if (params.top_k > 0 || params.top_p < 1.0) keep_most_probable(weights, logits, params);
  for (double& weight : weights) {
    if (!(weight >= params.min_p * unit)) weight = 0.0;
  }
  const double target = uniform(params.seed, index) * std::accumulate(weights.begin(), weights.end(), 0.0);
  double cumulative = 0.0;
  std::int64_t token = 0;
  for (const double weight : weights) {
    cumulative += weight;
    if (cumulative > target) break;
    ++token;
  }
  return token;
}

std::int64_t sample_checked(std::span<const float> logits, const megalodon_sampling& params, std::uint64_t index) {
  return as_failed([&] { return sample(logits, params, index); });
}

void check_fault(std::int64_t fault, std::int64_t logits_size) {
  as_failed([&] { require_no_fault(fault, static_cast<std::size_t>(logits_size)); });
}

}  // namespace megalodon::impl
