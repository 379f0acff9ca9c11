#include "runtime/tensor.hpp"

#include <dlfcn.h>

#include <algorithm>

#include "error.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

void check(AOTITorchError status) {
  if (status != AOTI_TORCH_SUCCESS) throw Error(MEGALODON_FAILED, "libtorch refused a tensor" + torch_error());
}

}  // namespace

Tensor::~Tensor() {
  if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
}

Tensor Tensor::over(void* data, std::span<const std::int64_t> shape, const DType& dtype, std::int32_t device_type,
                    std::int32_t device_index) {
  std::vector<std::int64_t> strides(shape.size(), 1);
  for (std::size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<std::int64_t>(shape[i], 1);
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_create_tensor_from_blob(data, static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(),
                                           0, dtype.torch_number(), device_type, device_index, &handle));
  return Tensor(handle);
}

AtenTensorHandle Tensor::share() const {
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_new_tensor_handle(handle_, &handle));
  return handle;
}

std::vector<std::int64_t> Tensor::shape() const {
  std::int64_t dims = 0;
  std::int64_t* sizes = nullptr;
  check(aoti_torch_get_dim(handle_, &dims));
  check(aoti_torch_get_sizes(handle_, &sizes));
  return {sizes, sizes + dims};
}

const void* Tensor::contiguous(const DType& dtype, std::span<const std::int64_t> shape) const {
  std::int32_t found = 0;
  bool is_contiguous = false;
  check(aoti_torch_get_dtype(handle_, &found));
  check(aoti_torch_is_contiguous(handle_, &is_contiguous));
  const std::vector<std::int64_t> sizes = this->shape();
  if (found != dtype.torch_number() || !std::ranges::equal(sizes, shape) || !is_contiguous) {
    throw Error(MEGALODON_FAILED, "a program returned " + dtype_text(found) + " " + list_text(sizes) +
                                      ", but the manifest says " + std::string(dtype.name) + " " +
                                      list_text({shape.begin(), shape.end()}) + "; export the bundle again");
  }
  void* data = nullptr;
  check(aoti_torch_get_data_ptr(handle_, &data));
  return data;
}

std::string torch_version() {
  const std::uint64_t version = aoti_torch_abi_version();  // its first bytes are major, minor and patch
  const auto part = [&](int index) { return std::to_string((version >> (56 - 8 * index)) & 0xFF); };
  return part(0) + "." + part(1) + "." + part(2);
}

std::string torch_error() {
  // torch has this function from 2.13 on. The lookup at run time lets older versions load.
  static const auto what =
      reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* text = what == nullptr ? nullptr : what();
  return text == nullptr || *text == '\0' ? "" : std::string(": ") + text;
}

}  // namespace megalodon::impl
