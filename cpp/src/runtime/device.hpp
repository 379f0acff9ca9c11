// Where an engine keeps its weights and caches and runs its programs: the CPU, or a CUDA GPU.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/tensor.hpp"

namespace megalodon::impl {

// A decode step over fixed memory, captured once and replayed for every token.
//
// `run` replays one step and waits for it. `launch` does not wait, so that a caller can launch steps before it has read
// the tokens of earlier ones. A launched step leaves its tokens in a result slot until another step gets that slot:
//
//     step.launch(token_ids, 0);   // feeds `token_ids`
//     step.launch({}, 1);          // feeds the tokens that the first step chose; the host does not know them yet
//     step.read(0, next_tokens);   // waits for the first step
class CapturedStep {
 public:
  virtual ~CapturedStep() = default;
  // Feeds one token to each row. Writes the logits (rows, V) and the most probable token of each row, or leaves out
  // what is given as empty.
  virtual void run(std::span<const std::int64_t> token_ids, std::span<float> logits,
                   std::span<std::int64_t> next_tokens) = 0;

  static constexpr std::int64_t kResultSlots = 4;
  // Starts a step that feeds `token_ids` or, if that is empty, the tokens that the step before it chose.
  virtual void launch(std::span<const std::int64_t> token_ids, std::int64_t result_slot) = 0;
  // Waits for the step that was launched with this slot. Writes the most probable token of each row.
  virtual void read(std::int64_t result_slot, std::span<std::int64_t> next_tokens) = 0;

  // Copies all states, but not the rings, as they are after the steps launched so far. There is room for two
  // checkpoints, `which` = false and true.
  virtual void checkpoint(bool which) = 0;
  // Restores the states of a checkpoint.
  virtual void roll_back(bool which) = 0;
};

// The memory that a step updates: small states, and rings.
struct StepMemory {
  std::vector<std::span<std::byte>> states, rings;
};

class Device {
 public:
  // A decode step: feeds `token_ids` (rows) and returns logits (rows, V). Into `next_tokens` (2, rows) it writes first
  // the most probable token of each row, then the logit error of each row, which is 0 if there is none (logits.hpp).
  // `token_ids` may be the first half of `next_tokens`.
  using Step = std::function<Tensor(const Tensor& token_ids, const Tensor& next_tokens, void* cuda_stream)>;

  virtual ~Device() = default;
  // The device's name in AOTInductor: "cpu" or "cuda".
  virtual const char* type() const = 0;
  // Whether several calls of a program may run at the same time. A device that runs one at a time captures decode
  // steps.
  virtual bool is_concurrent() const = 0;

  // Memory that is aligned for any vector. Throws std::bad_alloc.
  virtual std::byte* allocate(std::size_t size) const = 0;
  virtual void release(std::byte* memory) const noexcept = 0;
  virtual void zero(std::byte* memory, std::size_t size) const = 0;
  // Copies between the memories of the device and the host, or within either. The copy is done when it returns.
  virtual void copy(void* to, const void* from, std::size_t size) const = 0;
  // Copies within the device's memory, in order with what else is enqueued on the CUDA stream.
  virtual void copy_async(void* cuda_stream, void* to, const void* from, std::size_t size) const = 0;
  // A tensor over contiguous memory of this device that the caller keeps alive.
  virtual Tensor tensor_over(void* data, std::span<const std::int64_t> shape, const DType& dtype) const = 0;
  // Calls `call` with the device's CUDA stream, null on a CPU. Waits until all that it enqueued is done.
  virtual void run(const std::function<void(void* cuda_stream)>& call) const = 0;
  // Captures a step over `rows` rows and leaves the memory that it updates unchanged. Null where capturing gains
  // nothing.
  virtual std::unique_ptr<CapturedStep> capture(const Step& step, std::int64_t rows, StepMemory memory,
                                                std::int64_t logits_size) const = 0;
};

// `name` is "cpu" or "cuda"; `architecture` is that of the GPU which the programs were compiled for, "sm_90".
// Error MEGALODON_UNAVAILABLE if this machine or this build has no such device.
std::unique_ptr<Device> open_device(const std::string& name, const std::string& architecture);

// Owns memory of a device.
class DeviceMemory {
 public:
  DeviceMemory(const Device& device, std::size_t size) : device_(&device), data_(device.allocate(size)) {}
  DeviceMemory(DeviceMemory&& other) noexcept : device_(other.device_), data_(std::exchange(other.data_, nullptr)) {}
  ~DeviceMemory() {
    if (data_ != nullptr) device_->release(data_);
  }
  std::byte* data() const { return data_; }

 private:
  const Device* device_;
  std::byte* data_;
};

// A tensor of int64 in its own device memory, copied from values in host memory.
class DeviceTensor {
 public:
  DeviceTensor(const Device& device, std::span<const std::int64_t> values, std::span<const std::int64_t> shape)
      : memory_(device, values.size_bytes()),
        tensor_(device.tensor_over(memory_.data(), shape, *dtype_by_name("int64"))) {
    device.copy(memory_.data(), values.data(), values.size_bytes());
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  DeviceMemory memory_;
  Tensor tensor_;
};

}  // namespace megalodon::impl
