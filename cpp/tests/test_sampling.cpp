// The sampler against a slow and obvious one. tests/cpp/test_cpp.py compares it with Python's.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "error.hpp"
#include "generation/sampling.hpp"

namespace megalodon::impl {
namespace {

constexpr megalodon_sampling kPlain{1.0, 0, 1.0, 0.0, 0};

TEST(Sampling, ExpIsWithinTwoUnitsInTheLastPlace) {
  for (double x = -64.0; x <= 3.0; x += 0.0137) {
    const long double exact = std::exp(static_cast<long double>(x));
    const double result = exp_reproducible(x);
    EXPECT_LE(std::fabs(static_cast<double>(exact - result)), 2.0 * (std::nextafter(result, 1e300) - result)) << x;
  }
}

TEST(Sampling, DrawsAreUniform) {
  double sum = 0.0;
  for (std::uint64_t index = 0; index < 10'000; ++index) {
    const double draw = uniform(7, index);
    ASSERT_GE(draw, 0.0);
    ASSERT_LT(draw, 1.0);
    sum += draw;
  }
  EXPECT_NEAR(sum / 10'000, 0.5, 0.02);
}

TEST(Sampling, FrequenciesAreThoseOfTheSoftmax) {
  const std::vector<float> logits{0.0F, 1.0F, 2.0F, -std::numeric_limits<float>::infinity()};
  std::vector<int> counts(logits.size());
  constexpr int draws = 50'000;
  for (std::uint64_t index = 0; index < draws; ++index)
    ++counts[static_cast<std::size_t>(sample(logits, kPlain, index))];
  const double total = 1.0 + std::exp(1.0) + std::exp(2.0);
  for (std::size_t id = 0; id < 3; ++id) {
    EXPECT_NEAR(static_cast<double>(counts[id]) / draws, std::exp(logits[id]) / total, 0.01);
  }
  EXPECT_EQ(counts[3], 0);
}

std::set<std::int64_t> reached(const std::vector<float>& logits, const megalodon_sampling& params) {
  std::set<std::int64_t> ids;
  for (std::uint64_t index = 0; index < 2'000; ++index) ids.insert(sample(logits, params, index));
  return ids;
}

TEST(Sampling, FiltersKeepWhatTheySay) {
  const std::vector<float> logits{1.0F, 3.0F, 3.0F, 2.0F, 0.0F};
  using Ids = std::set<std::int64_t>;
  EXPECT_EQ(reached(logits, {1.0, 1, 1.0, 0.0, 0}), (Ids{1}));  // of equal logits, the lower id wins
  EXPECT_EQ(reached(logits, {1.0, 3, 1.0, 0.0, 0}), (Ids{1, 2, 3}));
  EXPECT_EQ(reached(logits, {1.0, 0, 1e-9, 0.0, 0}), (Ids{1}));
  EXPECT_EQ(reached(logits, {1.0, 0, 0.5, 0.0, 0}), (Ids{1, 2}));
  EXPECT_EQ(reached(logits, {1.0, 0, 1.0, 0.3, 0}), (Ids{1, 2, 3}));
  EXPECT_EQ(reached(logits, {1.0, 0, 1.0, 1.0, 0}), (Ids{1, 2}));
  EXPECT_EQ(reached(logits, {0.0, 0, 1.0, 0.0, 0}), (Ids{1}));
}

// Steps 2 to 8 of the algorithm in the docstring of `megalodon_export.generation.sampling`, written down directly: it
// sorts the whole vocabulary and sums in order.
std::int64_t sample_slowly(const std::vector<float>& logits, const megalodon_sampling& params, std::uint64_t index) {
  const double peak = *std::ranges::max_element(logits);
  const double unit = std::ldexp(1.0, 53 - std::bit_width(logits.size()));
  std::vector<double> weights;
  for (const double logit : logits) {
    weights.push_back(std::nearbyint(exp_reproducible(std::max((logit - peak) / params.temperature, -64.0)) * unit));
  }
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, std::greater{}, [&](std::size_t id) { return logits[id]; });
  if (params.top_k > 0) {
    for (auto rank = static_cast<std::size_t>(params.top_k); rank < order.size(); ++rank) weights[order[rank]] = 0.0;
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double before = 0.0;
  for (const std::size_t id : order) {
    const double own = weights[id];
    if (!(before < params.top_p * total)) weights[id] = 0.0;
    before += own;
  }
  for (double& weight : weights) {
    if (!(weight >= params.min_p * unit)) weight = 0.0;
  }
  const double target = uniform(params.seed, index) * std::accumulate(weights.begin(), weights.end(), 0.0);
  double cumulative = 0.0;
  std::int64_t id = 0;
  while ((cumulative += weights[static_cast<std::size_t>(id)]) <= target) ++id;
  return id;
}

TEST(Sampling, NoShortcutChangesAToken) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0F, 3.0F);
  const auto any = [&](auto... values) {
    const std::array choices{values...};
    return choices[random() % choices.size()];
  };
  for (int round = 0; round < 3'000; ++round) {
    std::vector<float> logits(any(1U, 2U, 3U, 63U, 64U, 65U, 257U, 1'000U, 5'000U));
    const float step = any(0.0F, 0.25F, 1.0F);  // rounding to steps makes many logits equal
    for (float& logit : logits) {
      logit = normal(random);
      if (step > 0.0F) logit = std::nearbyint(logit / step) * step;
    }
    if (logits.size() > 2 && round % 3 == 0) logits[random() % logits.size()] = -std::numeric_limits<float>::infinity();
    const megalodon_sampling params{any(0.1, 0.8, 1.0, 3.0), any(0, 0, 1, 5, 50, 64, 100'000),
                                    any(1.0, 1.0, 0.999, 0.9, 0.5, 1e-9), any(0.0, 0.0, 0.01, 1.0), random()};
    const std::uint64_t index = random();
    ASSERT_EQ(sample(logits, params, index), sample_slowly(logits, params, index))
        << logits.size() << " logits, temperature " << params.temperature << ", top_k " << params.top_k << ", top_p "
        << params.top_p << ", min_p " << params.min_p;
  }
}

TEST(Sampling, LogitsThatAreNoDistributionAreRefused) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (const std::vector<float>& logits : {std::vector{0.0F, NAN}, {inf, 0.0F}, {-inf, -inf}}) {
    EXPECT_THROW(sample(logits, kPlain, 0), Error);
    EXPECT_THROW(sample(logits, {0.0, 0, 1.0, 0.0, 0}, 0), Error);
  }
}

TEST(Sampling, ParametersOutOfRangeAreRefused) {
  for (const megalodon_sampling& params : {megalodon_sampling{-1.0, 0, 1.0, 0.0, 0},
                                           {INFINITY, 0, 1.0, 0.0, 0},
                                           {NAN, 0, 1.0, 0.0, 0},
                                           {1.0, -1, 1.0, 0.0, 0},
                                           {1.0, 0, 0.0, 0.0, 0},
                                           {1.0, 0, 1.1, 0.0, 0},
                                           {1.0, 0, 1.0, -0.1, 0},
                                           {1.0, 0, 1.0, 1.1, 0},
                                           {1.0, 0, NAN, 0.0, 0},
                                           {1.0, 0, 1.0, NAN, 0}}) {
    EXPECT_THROW(check_sampling(params), Error);
  }
}

}  // namespace
}  // namespace megalodon::impl
