// libtorch's tensors through its C interface, which is stable across versions: no ATen header is needed.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bundle/dtype.hpp"

namespace megalodon::impl {

// Owns one reference to a libtorch tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor();

  // A tensor over contiguous memory that the caller keeps alive. `device_type` is libtorch's number of the device.
  static Tensor over(void* data, std::span<const std::int64_t> shape, const DType& dtype, std::int32_t device_type,
                     std::int32_t device_index = 0);

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  // Another reference to the same tensor, for a callee that takes ownership of its arguments.
  AtenTensorHandle share() const;
  std::vector<std::int64_t> shape() const;
  // The address of the elements in the device's memory. Error MEGALODON_FAILED unless the tensor is contiguous and has
  // this dtype and shape.
  const void* contiguous(const DType& dtype, std::span<const std::int64_t> shape) const;

 private:
  AtenTensorHandle handle_ = nullptr;
};

// The version of the loaded libtorch: "2.13.0".
std::string torch_version();

// ": " and libtorch's message about the last error of this thread; empty if it has none.
std::string torch_error();

}  // namespace megalodon::impl
