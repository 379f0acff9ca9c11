// Replaces cuda_device.cpp in a library that is built without CUDA.
#include "error.hpp"
#include "runtime/cuda.hpp"

namespace megalodon::impl {

std::unique_ptr<Device> open_cuda(const std::string&) {
  throw unavailable(
      "the AOTInductor programs are for CUDA, and this library was built without it; build it where libtorch has CUDA "
      "and the CUDA toolkit is installed, or export the model for a CPU: megalodon-export aoti --device cpu");
}

}  // namespace megalodon::impl
