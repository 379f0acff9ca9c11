// Opens the GPU where the library was built with CUDA; refuses where it was not (cuda_none.cpp).
#pragma once

#include "runtime/device.hpp"

namespace megalodon::impl {

// The current GPU. Error MEGALODON_UNAVAILABLE if there is none, if its architecture is another one, or if the library
// was built without CUDA.
std::unique_ptr<Device> open_cuda(const std::string& architecture);

}  // namespace megalodon::impl
