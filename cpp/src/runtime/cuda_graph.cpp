#include "runtime/cuda_graph.hpp"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <algorithm>

#include "runtime/logits.hpp"
#include "runtime/pdl.hpp"

namespace megalodon::impl {

CudaGraphStep::CudaGraphStep(const CudaDevice& device, const Device::Step& step, std::int64_t rows, StepMemory memory,
                             std::int64_t logits_size)
    : device_(device),
      rows_(static_cast<std::size_t>(rows)),
      logits_size_(logits_size),
      next_tokens_(at::zeros({2, rows}, at::TensorOptions(at::kLong).device(device.cuda_stream().device()))),
      host_ids_(rows_),
      host_results_(2 * rows_ * kResultSlots),
      host_logits_(rows_ * static_cast<std::size_t>(logits_size)) {
  warm_up(step, memory);
  capture(step);
  enable_pdl(graph_.raw_cuda_graph());
  graph_.instantiate();
  for (const auto& state : memory.states) states_.push_back(as_words(state.data(), state.size()));
  states_.push_back(as_words(next_tokens_.data_ptr(), next_tokens_.nbytes()));
}

void CudaGraphStep::run(std::span<const std::int64_t> token_ids, std::span<float> logits,
                        std::span<std::int64_t> next_tokens) {
  device_.run([&](void*) {
    enqueue_step(token_ids, 0);
    if (!logits.empty()) {
      const auto values = host_logits_.values();
      device_.enqueue_copy(values.data(), logits_.data_ptr(), values.size_bytes());
      device_.synchronize();
      std::ranges::copy(values, logits.begin());
    }
    if (!next_tokens.empty()) take_result(0, next_tokens);
  });
}

void CudaGraphStep::launch(std::span<const std::int64_t> token_ids, std::int64_t result_slot) {
  device_.enqueue([&] { enqueue_step(token_ids, result_slot); });
}

void CudaGraphStep::read(std::int64_t result_slot, std::span<std::int64_t> next_tokens) {
  translate_errors([&] { take_result(result_slot, next_tokens); });
}

void CudaGraphStep::checkpoint(bool which) {
  device_.enqueue([&] {
    std::vector<at::Tensor>& saved = checkpoints_[which];
    if (saved.empty()) {
      for (const at::Tensor& state : states_) saved.push_back(at::empty_like(state));
    }
    copy_all(saved, states_);
  });
}

void CudaGraphStep::roll_back(bool which) {
  device_.enqueue([&] { copy_all(states_, checkpoints_[which]); });
}

// Calls the step outside the capture, since libraries load their kernels and allocate their workspaces in the first
// calls. Leaves the memory as it was.
void CudaGraphStep::warm_up(const Device::Step& step, const StepMemory& memory) {
  std::vector<std::span<std::byte>> all = memory.states;
  all.insert(all.end(), memory.rings.begin(), memory.rings.end());
  std::vector<at::Tensor> before;
  for (const auto& one : all) {
    before.push_back(at::empty({static_cast<std::int64_t>(one.size())}, next_tokens_.options().dtype(at::kByte)));
    device_.enqueue_copy(before.back().data_ptr(), one.data(), one.size());
  }
  for (int round = 0; round < 2; ++round) {
    call(step);
    for (std::size_t i = 0; i < all.size(); ++i) {
      device_.enqueue_copy(all[i].data(), before[i].data_ptr(), all[i].size());
    }
    next_tokens_.zero_();
  }
  device_.synchronize();
  logits_.reset();
}

void CudaGraphStep::capture(const Device::Step& step) {
  graph_.capture_begin(device_.graph_pool(), cudaStreamCaptureModeThreadLocal);
  try {
    call(step);
  } catch (...) {
    try {
      graph_.capture_end();
    } catch (const c10::Error&) {  // the first error says what was wrong
    }
    throw;
  }
  graph_.capture_end();
}

void CudaGraphStep::call(const Device::Step& step) {
  const DType& int64 = *dtype_by_name("int64");
  const std::array<std::int64_t, 1> rows{next_tokens_.size(1)};
  const Tensor token_ids = device_.tensor_over(next_tokens_.data_ptr(), rows, int64);
  const Tensor next_tokens = device_.tensor_over(next_tokens_.data_ptr(), next_tokens_.sizes(), int64);
  const Tensor logits = step(token_ids, next_tokens, device_.cuda_stream().stream());
  logits_ = *torch::aot_inductor::tensor_handle_to_tensor_pointer(logits.get());
}

void CudaGraphStep::enqueue_step(std::span<const std::int64_t> token_ids, std::int64_t result_slot) {
  if (!token_ids.empty()) {
    uploaded_.synchronize();  // the GPU may not have read the ids of an earlier step yet
    std::ranges::copy(token_ids, host_ids_.values().begin());
    device_.enqueue_copy(next_tokens_.data_ptr(), host_ids_.values().data(), host_ids_.values().size_bytes());
    uploaded_.record(device_.cuda_stream());
  }
  graph_.replay();
  const auto result = host_result(result_slot);
  device_.enqueue_copy(result.data(), next_tokens_.data_ptr(), result.size_bytes());
  arrived_[static_cast<std::size_t>(result_slot)].record(device_.cuda_stream());
}

void CudaGraphStep::take_result(std::int64_t result_slot, std::span<std::int64_t> next_tokens) {
  arrived_[static_cast<std::size_t>(result_slot)].synchronize();
  const auto result = host_result(result_slot);
  choose_tokens(next_tokens, [&](std::size_t row) {
    check_logit_error(result[rows_ + row], static_cast<std::size_t>(logits_size_), MEGALODON_FAILED, row);
    return result[row];
  });
}

std::span<std::int64_t> CudaGraphStep::host_result(std::int64_t result_slot) const {
  return host_results_.values().subspan(static_cast<std::size_t>(result_slot) * 2 * rows_, 2 * rows_);
}

// Memory as a tensor of 32-bit words, for copies: the size of all that a step updates is a multiple of 4 bytes.
at::Tensor CudaGraphStep::as_words(void* data, std::size_t size) const {
  return at::from_blob(data, {static_cast<std::int64_t>(size / sizeof(std::int32_t))},
                       next_tokens_.options().dtype(at::kInt));
}

// Makes a few large copies one by one, and many small ones in one kernel.
void CudaGraphStep::copy_all(std::vector<at::Tensor>& to, const std::vector<at::Tensor>& from) const {
  constexpr std::size_t few = 4;
  if (to.size() > few) return at::_foreach_copy_(to, from);
  for (std::size_t i = 0; i < to.size(); ++i) {
    device_.enqueue_copy(to[i].data_ptr(), from[i].data_ptr(), from[i].nbytes());
  }
}

}  // namespace megalodon::impl
