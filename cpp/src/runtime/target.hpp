// Checks that programs were compiled for this CPU and this libtorch.
#pragma once

#include "bundle/manifest.hpp"

namespace megalodon::impl {

// Error MEGALODON_UNAVAILABLE, with Python's message, for programs of another torch version, architecture or CPU.
// `open_device` checks the GPU that CUDA programs need.
void check_target(const Target& target);

}  // namespace megalodon::impl
