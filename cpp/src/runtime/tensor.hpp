// libtorch's tensors through its C interface, which is stable across versions: no ATen header is needed.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace megalodon::impl {

// An element type by torch's name, its name in a safetensors file, and its number in libtorch.
struct DType {
  std::string_view name;
  std::string_view safetensors;
  std::size_t size;
  std::int32_t (*number)();
};

const DType* dtype_by_name(std::string_view name);              // null if there is none
const DType* dtype_by_safetensors_name(std::string_view name);  // null if there is none
std::string dtype_text(std::int32_t number);

// A tensor that this owns a reference to.
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

  // A tensor over contiguous memory, of a device by its number in libtorch, that somebody else keeps alive.
  static Tensor over(void* data, std::span<const std::int64_t> shape, const DType& dtype, std::int32_t device_type,
                     std::int32_t device_index = 0);

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  // Another reference to the same tensor, for a callee that takes its arguments over.
  AtenTensorHandle share() const;
  std::vector<std::int64_t> shape() const;
  // The elements, in the memory of the device; Error MEGALODON_FAILED unless they are contiguous, of this dtype and
  // shape.
  const void* contiguous(const DType& dtype, std::span<const std::int64_t> shape) const;

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Version of the libtorch that is loaded, e.g. "2.13.0".
std::string torch_version();

// What libtorch said about the last error of this thread, if it says so.
std::string torch_error();

}  // namespace megalodon::impl
