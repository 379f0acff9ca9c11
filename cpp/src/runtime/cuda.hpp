// A CUDA GPU, where the library was built with CUDA.
#pragma once

#include "runtime/device.hpp"

namespace megalodon::impl {

// The current GPU; MEGALODON_UNAVAILABLE if there is none, or its architecture is another one, or without CUDA built
// in.
std::unique_ptr<Device> open_cuda(const std::string& architecture);

}  // namespace megalodon::impl
