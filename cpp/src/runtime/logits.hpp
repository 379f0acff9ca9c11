// The most probable token of a row of logits, and what can be wrong with the row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>

#include "megalodon.h"

namespace megalodon::impl {

// A logit error says why a row cannot be sampled: 0 if it can, the number of its NaNs, or one of these.
// The decode programs of a GPU write the same numbers beside the tokens that they choose.
inline constexpr std::int64_t kPositiveInfinity = -1, kAllMasked = -2;

// Throws an Error with this status, which names the row, unless the logit error is 0.
void check_logit_error(std::int64_t logit_error, std::size_t logits_size, megalodon_status status, std::size_t row = 0);

// The id of the largest logit, the lowest among equals. Throws an Error with this status if the row cannot be sampled:
// pass MEGALODON_INVALID_ARGUMENT for logits of the user, and MEGALODON_FAILED for logits of a program, since bad ones
// mean that the stream's state is broken.
std::size_t argmax(std::span<const float> logits, megalodon_status status, std::size_t row = 0);

inline constexpr std::int64_t kNoToken = -1;

// Writes `choose(row)` for each row. A row for which it throws gets kNoToken, and the other rows their tokens all the
// same. Then throws what the first such row threw.
template <typename Choose>
void choose_tokens(std::span<std::int64_t> next_tokens, Choose choose) {
  std::exception_ptr first;
  for (std::size_t row = 0; row < next_tokens.size(); ++row) {
    try {
      next_tokens[row] = static_cast<std::int64_t>(choose(row));
    } catch (...) {
      next_tokens[row] = kNoToken;
      if (!first) first = std::current_exception();
    }
  }
  if (first) std::rethrow_exception(first);
}

}  // namespace megalodon::impl
