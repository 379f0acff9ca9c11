// Choosing the next token, bit for bit as megalodon_export/sampling.py does: its docstring is the algorithm.
#pragma once

#include <cstdint>
#include <span>

#include "megalodon.h"

namespace megalodon::impl {

// Error MEGALODON_INVALID_ARGUMENT for values out of range.
void check_sampling(const megalodon_sampling& params);

// The draw in [0, 1) of the token that a stream samples after `index` others.
double uniform(std::uint64_t seed, std::uint64_t index);

// exp(x) from correctly rounded operations only, x in [-700, 700].
double exp_reproducible(double x);

// One token id; MEGALODON_INVALID_ARGUMENT if the logits are no distribution.
std::int64_t sample(std::span<const float> logits, const megalodon_sampling& params, std::uint64_t index);

// The same for logits that a program returned: if they are no distribution, the stream's state is broken too, which is
// MEGALODON_FAILED.
std::int64_t sample_checked(std::span<const float> logits, const megalodon_sampling& params, std::uint64_t index);

// The same for a row's fault, as a decode program for a GPU writes it beside the token that it chose; 0 is none.
void check_fault(std::int64_t fault, std::int64_t logits_size);

}  // namespace megalodon::impl
