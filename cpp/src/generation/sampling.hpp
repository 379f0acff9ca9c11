// Chooses the next token, bit for bit as Python does: the docstring of `megalodon_export.generation.sampling` specifies
// the algorithm.
#pragma once

#include <cstdint>
#include <span>

#include "megalodon.h"

namespace megalodon::impl {

// Error MEGALODON_INVALID_ARGUMENT for values out of range.
void check_sampling(const megalodon_sampling& params);

// The draw, in [0, 1), for the token that a stream samples after `index` others.
double uniform(std::uint64_t seed, std::uint64_t index);

// exp(x) for x in [-700, 700], from correctly rounded operations only.
double exp_reproducible(double x);

// Samples one token id. Throws an Error with the status `bad_logits` if the logits are no distribution: they contain
// NaN or +inf, or are all -inf. Pass MEGALODON_FAILED for logits of a program, whose stream is then broken. The message
// names the row.
std::int64_t sample(std::span<const float> logits, const megalodon_sampling& params, std::uint64_t index,
                    megalodon_status bad_logits = MEGALODON_INVALID_ARGUMENT, std::size_t row = 0);

}  // namespace megalodon::impl
