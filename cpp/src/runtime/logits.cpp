#include "runtime/logits.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "error.hpp"

namespace megalodon::impl {
namespace {

std::int64_t logit_error_of(std::span<const float> logits, float largest) {
  const auto nans = std::ranges::count_if(logits, [](float logit) { return std::isnan(logit); });
  constexpr float infinity = std::numeric_limits<float>::infinity();
  return nans > 0 ? nans : largest == infinity ? kPositiveInfinity : largest == -infinity ? kAllMasked : 0;
}

}  // namespace

void check_logit_error(std::int64_t logit_error, std::size_t logits_size, megalodon_status status, std::size_t row) {
  if (logit_error == 0) return;
  const std::string found = logit_error == kPositiveInfinity ? "+inf among the logits"
                            : logit_error == kAllMasked      ? "-inf for every token"
                                                             : "NaN in " + std::to_string(logit_error) + " of " +
                                                                   std::to_string(logits_size) + " logits";
  throw Error(status, "row " + std::to_string(row) + " cannot be sampled: " + found +
                          ", expected finite logits (or -inf for tokens that are ruled out); check the weights, the "
                          "dtype and any logits mask");
}

std::size_t argmax(std::span<const float> logits, megalodon_status status, std::size_t row) {
  const auto largest = std::ranges::max_element(logits);  // the first of equal ones
  check_logit_error(logit_error_of(logits, *largest), logits.size(), status, row);
  return static_cast<std::size_t>(largest - logits.begin());
}

}  // namespace megalodon::impl
