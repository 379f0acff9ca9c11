// The sampler against slow arithmetic of its own; that it equals Python's is tested from Python.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "error.hpp"
#include "sampling.hpp"

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
  EXPECT_EQ(reached(logits, {1.0, 1, 1.0, 0.0, 0}), (Ids{1}));  // equal logits: the lower id
  EXPECT_EQ(reached(logits, {1.0, 3, 1.0, 0.0, 0}), (Ids{1, 2, 3}));
  EXPECT_EQ(reached(logits, {1.0, 0, 1e-9, 0.0, 0}), (Ids{1}));
  EXPECT_EQ(reached(logits, {1.0, 0, 0.5, 0.0, 0}), (Ids{1, 2}));
  EXPECT_EQ(reached(logits, {1.0, 0, 1.0, 0.3, 0}), (Ids{1, 2, 3}));
  EXPECT_EQ(reached(logits, {1.0, 0, 1.0, 1.0, 0}), (Ids{1, 2}));
  EXPECT_EQ(reached(logits, {0.0, 0, 1.0, 0.0, 0}), (Ids{1}));
}

TEST(Sampling, WhatIsNoDistributionIsRefused) {
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
