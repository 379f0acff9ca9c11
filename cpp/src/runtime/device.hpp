// Where an engine keeps its weights and caches and runs its programs: the CPU, or a CUDA GPU (cuda.cpp).
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "runtime/tensor.hpp"

namespace megalodon::impl {

// A decode step over fixed memory that the device has recorded, for replay.
class RecordedStep {
 public:
  virtual ~RecordedStep() = default;
  // Feeds a token to each row; logits (rows x V, or empty), and the most probable token of each row (or empty).
  virtual void run(std::span<const std::int64_t> token_ids, std::span<float> logits,
                   std::span<std::int64_t> greedy) = 0;

  // For those who run ahead of what they read. Starts a step that feeds the tokens, or, without any, those that the
  // step before it chose. Its own are for `read` with the same place, until another step is given that place.
  static constexpr std::int64_t kPlaces = 4;
  virtual void issue(std::span<const std::int64_t> token_ids, std::int64_t place) = 0;
  // The most probable token of each row; waits for the step.
  virtual void read(std::int64_t place, std::span<std::int64_t> greedy) = 0;
  // Keeps a copy of the states after all steps that were issued, but of what is in the rings, in one of two places.
  virtual void keep(bool place) = 0;
  // Puts it back.
  virtual void put_back(bool place) = 0;
};

// The memory that a step updates: small states, and rings.
struct StepMemory {
  std::vector<std::span<std::byte>> states, rings;
};

class Device {
 public:
  // What feeds tokens (rows) on a stream and returns logits (rows, V). Into `choice` (2, rows) it writes the most
  // probable tokens, and what is wrong with the logits of their rows. `token_ids` may lie in `choice`.
  using Step = std::function<Tensor(const Tensor& token_ids, const Tensor& choice, void* stream)>;

  virtual ~Device() = default;
  // As AOTInductor calls it.
  virtual const char* type() const = 0;
  // Whether several calls of a program may run at the same time. One that is not records steps.
  virtual bool is_concurrent() const = 0;

  virtual std::byte* allocate(std::size_t size) const = 0;  // aligned for any vector; throws std::bad_alloc
  virtual void release(std::byte* memory) const noexcept = 0;
  virtual void zero(std::byte* memory, std::size_t size) const = 0;
  // Between this device's memory and the host's, or within either; done when it returns.
  virtual void copy(void* to, const void* from, std::size_t size) const = 0;
  // The same within this device's memory, on the stream that a program runs on, in its order.
  virtual void copy_on(void* stream, void* to, const void* from, std::size_t size) const = 0;
  // A tensor over contiguous memory of this device that somebody else keeps alive.
  virtual Tensor over(void* data, std::span<const std::int64_t> shape, const DType& dtype) const = 0;
  // Calls programs on the device's stream, which is null on a CPU, and waits until they are done.
  virtual void run(const std::function<void(void* stream)>& call) const = 0;
  // Records a step over `rows` rows, without changing the memory that it updates; null where that gains nothing.
  virtual std::unique_ptr<RecordedStep> record(const Step& step, std::int64_t rows, StepMemory memory,
                                               std::int64_t logits_size) const = 0;
};

// The device of this name, "cpu" or "cuda"; MEGALODON_UNAVAILABLE if this machine or this build has none. `target` is
// what the programs were compiled for: the architecture of a GPU, sm_90.
std::unique_ptr<Device> open_device(const std::string& name, const std::string& target);

// Memory of a device, freed at the end.
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

// A copy on the device of values in host memory, as a tensor.
class Uploaded {
 public:
  Uploaded(const Device& device, std::span<const std::int64_t> values, std::span<const std::int64_t> shape)
      : memory_(device, values.size_bytes()), tensor_(device.over(memory_.data(), shape, *dtype_by_name("int64"))) {
    device.copy(memory_.data(), values.data(), values.size_bytes());
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  DeviceMemory memory_;
  Tensor tensor_;
};

}  // namespace megalodon::impl
