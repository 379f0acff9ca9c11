#include "runtime/device.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "runtime/cuda.hpp"

namespace megalodon::impl {
namespace {

constexpr std::size_t kAlignment = 64;  // bytes of a cache line, and of the widest vector

class Cpu final : public Device {
 public:
  const char* type() const override { return "cpu"; }
  bool is_concurrent() const override { return true; }

  std::byte* allocate(std::size_t size) const override {
    const std::size_t rounded = (std::max<std::size_t>(size, 1) + kAlignment - 1) / kAlignment * kAlignment;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }
  void release(std::byte* memory) const noexcept override { std::free(memory); }
  void zero(std::byte* memory, std::size_t size) const override { std::memset(memory, 0, size); }
  void copy(void* to, const void* from, std::size_t size) const override {
    if (size > 0) std::memcpy(to, from, size);
  }
  void copy_async(void*, void* to, const void* from, std::size_t size) const override { copy(to, from, size); }
  Tensor tensor_over(void* data, std::span<const std::int64_t> shape, const DType& dtype) const override {
    return Tensor::over(data, shape, dtype, aoti_torch_device_type_cpu());
  }
  void run(const std::function<void(void*)>& call) const override { call(nullptr); }
  std::unique_ptr<CapturedStep> capture(const Step&, std::int64_t, StepMemory, std::int64_t) const override {
    return nullptr;
  }
};

}  // namespace

std::unique_ptr<Device> open_device(const std::string& name, const std::string& architecture) {
  return name == "cuda" ? open_cuda(architecture) : std::make_unique<Cpu>();
}

}  // namespace megalodon::impl
