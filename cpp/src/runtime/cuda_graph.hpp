// A decode step captured as a CUDA graph.
#pragma once

#include <ATen/cuda/CUDAEvent.h>

#include <array>

#include "runtime/cuda_device.hpp"

namespace megalodon::impl {

// Pinned memory of the host, which the GPU copies from and to without the CPU.
template <typename Value>
class PinnedArray {
 public:
  explicit PinnedArray(std::size_t count) : values_(nullptr), count_(count) {
    void* memory = nullptr;
    C10_CUDA_CHECK(cudaHostAlloc(&memory, count * sizeof(Value), cudaHostAllocDefault));
    values_ = static_cast<Value*>(memory);
  }
  ~PinnedArray() { cudaFreeHost(values_); }
  PinnedArray(const PinnedArray&) = delete;
  PinnedArray& operator=(const PinnedArray&) = delete;
  std::span<Value> values() const { return {values_, count_}; }

 private:
  Value* values_;
  std::size_t count_;
};

// The chosen tokens stay on the GPU, where the next step reads them. A copy of them travels to the host after the step.
// Logits are copied to the host only when `run` is asked for them.
class CudaGraphStep final : public CapturedStep {
 public:
  CudaGraphStep(const CudaDevice& device, const Device::Step& step, std::int64_t rows, StepMemory memory,
                std::int64_t logits_size);

  void run(std::span<const std::int64_t> token_ids, std::span<float> logits,
           std::span<std::int64_t> next_tokens) override;
  void launch(std::span<const std::int64_t> token_ids, std::int64_t result_slot) override;
  void read(std::int64_t result_slot, std::span<std::int64_t> next_tokens) override;
  void checkpoint(bool which) override;
  void roll_back(bool which) override;

 private:
  void warm_up(const Device::Step& step, const StepMemory& memory);
  void capture(const Device::Step& step);
  void call(const Device::Step& step);
  void enqueue_step(std::span<const std::int64_t> token_ids, std::int64_t result_slot);
  void take_result(std::int64_t result_slot, std::span<std::int64_t> next_tokens);
  std::span<std::int64_t> host_result(std::int64_t result_slot) const;
  at::Tensor as_words(void* data, std::size_t size) const;
  void copy_all(std::vector<at::Tensor>& to, const std::vector<at::Tensor>& from) const;

  const CudaDevice& device_;
  const std::size_t rows_;
  const std::int64_t logits_size_;
  at::Tensor next_tokens_;                                 // (2, rows): the tokens to feed next, and the logit errors
  at::Tensor logits_;                                      // of the step that ran last
  PinnedArray<std::int64_t> host_ids_;                     // (rows)
  PinnedArray<std::int64_t> host_results_;                 // (kResultSlots, 2, rows)
  PinnedArray<float> host_logits_;                         // (rows, V)
  std::array<at::cuda::CUDAEvent, kResultSlots> arrived_;  // when a result slot is filled
  at::cuda::CUDAEvent uploaded_;                           // when the GPU has read `host_ids_`
  std::vector<at::Tensor> states_;                         // all that a checkpoint copies
  std::array<std::vector<at::Tensor>, 2> checkpoints_;
  at::cuda::CUDAGraph graph_{/*keep_graph=*/true};  // so that its edges can be changed before it is instantiated
};

}  // namespace megalodon::impl
