// The CUDA device: memory from torch's caching allocator, and one CUDA stream that one call at a time may use.
// The files cuda_device, cuda_graph and pdl alone use libtorch's C++ interface; all others use its C interface.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <new>

#include "error.hpp"
#include "runtime/device.hpp"

namespace megalodon::impl {

// Calls `call` and throws libtorch's exceptions as this library's.
template <typename Call>
auto translate_errors(Call call) {
  try {
    return call();
  } catch (const c10::OutOfMemoryError&) {
    throw std::bad_alloc();
  } catch (const c10::Error& error) {
    throw Error(MEGALODON_FAILED, error.what_without_backtrace());
  }
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(c10::DeviceIndex index);

  const char* type() const override { return "cuda"; }
  bool is_concurrent() const override { return false; }
  std::byte* allocate(std::size_t size) const override;
  void release(std::byte* memory) const noexcept override;
  void zero(std::byte* memory, std::size_t size) const override;
  void copy(void* to, const void* from, std::size_t size) const override;
  void copy_async(void* cuda_stream, void* to, const void* from, std::size_t size) const override;
  Tensor tensor_over(void* data, std::span<const std::int64_t> shape, const DType& dtype) const override;
  void run(const std::function<void(void*)>& call) const override;
  std::unique_ptr<CapturedStep> capture(const Step& step, std::int64_t rows, StepMemory memory,
                                        std::int64_t logits_size) const override;

  // Calls `call`, which may enqueue work on the CUDA stream, and does not wait for that work.
  template <typename Call>
  void enqueue(Call call) const {
    translate_errors([&] {
      const StreamLock lock(*this);
      call();
    });
  }
  // For calls inside `enqueue` and `run`: copy in any direction, and wait for all that is enqueued.
  void enqueue_copy(void* to, const void* from, std::size_t size) const;
  void synchronize() const { C10_CUDA_CHECK(cudaStreamSynchronize(cuda_stream_.stream())); }

  const c10::cuda::CUDAStream& cuda_stream() const { return cuda_stream_; }
  // The memory of the temporaries of all captured steps. Steps can share it: one runs at a time, and nothing reads its
  // temporaries once the next one runs.
  at::cuda::MempoolId_t graph_pool() const { return graph_pool_; }

 private:
  // A call that uses the CUDA stream holds this lock, and the CUDA stream is the current one meanwhile. The lock also
  // turns TF32 off, so that float32 products are float32 whatever the process told torch.
  class StreamLock {
   public:
    explicit StreamLock(const CudaDevice& device) : lock_(device.mutex_), guard_(device.cuda_stream_) {}

   private:
    std::lock_guard<std::mutex> lock_;
    c10::cuda::CUDAStreamGuard guard_;
    at::NoTF32Guard no_tf32_;
  };

  mutable std::mutex mutex_;
  const c10::cuda::CUDAStream cuda_stream_;
  const at::cuda::MempoolId_t graph_pool_ = at::cuda::graph_pool_handle();
  // torch frees a pool with its last graph and then refuses to use it again. This graph is never replayed: it keeps the
  // pool alive.
  at::cuda::CUDAGraph anchor_graph_;
  at::Tensor anchor_tensor_;
};

}  // namespace megalodon::impl
