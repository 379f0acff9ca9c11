#include "runtime/cuda_device.hpp"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <algorithm>

#include "runtime/cuda.hpp"
#include "runtime/cuda_graph.hpp"

namespace megalodon::impl {

namespace allocator = c10::cuda::CUDACachingAllocator;

CudaDevice::CudaDevice(c10::DeviceIndex index) : cuda_stream_(c10::cuda::getStreamFromPool(false, index)) {
  const c10::cuda::CUDAStreamGuard guard(cuda_stream_);
  anchor_graph_.capture_begin(graph_pool_, cudaStreamCaptureModeThreadLocal);
  anchor_tensor_ = at::zeros({1}, at::TensorOptions(at::kFloat).device(cuda_stream_.device()));
  anchor_graph_.capture_end();
}

std::byte* CudaDevice::allocate(std::size_t size) const {
  return translate_errors([&] {
    const StreamLock lock(*this);
    void* memory = allocator::raw_alloc_with_stream(std::max<std::size_t>(size, 1), cuda_stream_.stream());
    return static_cast<std::byte*>(memory);
  });
}

void CudaDevice::release(std::byte* memory) const noexcept {
  const StreamLock lock(*this);
  allocator::raw_delete(memory);
}

void CudaDevice::zero(std::byte* memory, std::size_t size) const {
  run([&](void*) { C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, size, cuda_stream_.stream())); });
}

void CudaDevice::copy(void* to, const void* from, std::size_t size) const {
  run([&](void*) { enqueue_copy(to, from, size); });
}

void CudaDevice::copy_async(void* cuda_stream, void* to, const void* from, std::size_t size) const {
  C10_CUDA_CHECK(cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(cuda_stream)));
}

Tensor CudaDevice::tensor_over(void* data, std::span<const std::int64_t> shape, const DType& dtype) const {
  return Tensor::over(data, shape, dtype, aoti_torch_device_type_cuda(), cuda_stream_.device_index());
}

void CudaDevice::run(const std::function<void(void*)>& call) const {
  enqueue([&] {
    call(cuda_stream_.stream());
    synchronize();
  });
}

void CudaDevice::enqueue_copy(void* to, const void* from, std::size_t size) const {
  C10_CUDA_CHECK(cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, cuda_stream_.stream()));
}

std::unique_ptr<CapturedStep> CudaDevice::capture(const Step& step, std::int64_t rows, StepMemory memory,
                                                  std::int64_t logits_size) const {
  try {
    return translate_errors([&] {
      const StreamLock lock(*this);
      return std::make_unique<CudaGraphStep>(*this, step, rows, std::move(memory), logits_size);
    });
  } catch (const std::bad_alloc&) {  // no room for a copy of the rings: steps run kernel by kernel, without a graph
    return nullptr;
  }
}

std::unique_ptr<Device> open_cuda(const std::string& architecture) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    cudaGetLastError();  // clears the error, which the next call would report
    throw unavailable("the AOTInductor programs are for CUDA and this machine has none" + std::string(kExportAgain));
  }
  return translate_errors([&]() -> std::unique_ptr<Device> {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    const c10::DeviceIndex index = c10::cuda::current_device();
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    const std::string here = "sm_" + std::to_string(properties.major) + std::to_string(properties.minor);
    if (architecture != here) {
      throw unavailable("the AOTInductor programs are for " + architecture + ", this GPU is " + here + kExportAgain);
    }
    return std::make_unique<CudaDevice>(index);
  });
}

}  // namespace megalodon::impl
