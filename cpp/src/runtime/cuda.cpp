// The CUDA device: memory from torch's caching allocator, one stream, decode steps recorded as CUDA graphs.
// The one file, with overlap.cpp, that uses libtorch's C++ interface; the others use its C interface.
#include "runtime/cuda.hpp"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <new>

#include "bundle/manifest.hpp"
#include "error.hpp"
#include "generation/sampling.hpp"
#include "runtime/pdl.hpp"

namespace megalodon::impl {
namespace {

namespace allocator = c10::cuda::CUDACachingAllocator;

// libtorch's exceptions as the library's.
template <typename Call>
auto translated(Call call) {
  try {
    return call();
  } catch (const c10::OutOfMemoryError&) {
    throw std::bad_alloc();
  } catch (const c10::Error& error) {
    throw Error(MEGALODON_FAILED, error.what_without_backtrace());
  }
}

// ---- the device -----------------------------------------------------------------------------------------------------

// Memory of the host that the GPU copies from and to by itself.
template <typename Value>
class Pinned {
 public:
  explicit Pinned(std::size_t count) : values_(nullptr), count_(count) {
    void* memory = nullptr;
    C10_CUDA_CHECK(cudaHostAlloc(&memory, count * sizeof(Value), cudaHostAllocDefault));
    values_ = static_cast<Value*>(memory);
  }
  ~Pinned() { cudaFreeHost(values_); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  std::span<Value> values() const { return {values_, count_}; }

 private:
  Value* values_;
  std::size_t count_;
};

class Cuda final : public Device {
 public:
  explicit Cuda(c10::DeviceIndex index) : stream_(c10::cuda::getStreamFromPool(false, index)) {
    const c10::cuda::CUDAStreamGuard guard(stream_);
    anchor_.capture_begin(pool_, cudaStreamCaptureModeThreadLocal);
    anchored_ = at::zeros({1}, at::TensorOptions(at::kFloat).device(stream_.device()));
    anchor_.capture_end();
  }

  const char* type() const override { return "cuda"; }
  bool is_concurrent() const override { return false; }

  std::byte* allocate(std::size_t size) const override {
    return translated([&] {
      const Turn turn(*this);
      void* memory = allocator::raw_alloc_with_stream(std::max<std::size_t>(size, 1), stream_.stream());
      return static_cast<std::byte*>(memory);
    });
  }

  void release(std::byte* memory) const noexcept override {
    const Turn turn(*this);
    allocator::raw_delete(memory);
  }

  void zero(std::byte* memory, std::size_t size) const override {
    run([&](void*) { C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, size, stream_.stream())); });
  }

  void copy(void* to, const void* from, std::size_t size) const override {
    run([&](void*) { copy_async(to, from, size); });
  }

  void copy_on(void* stream, void* to, const void* from, std::size_t size) const override {
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
  }

  Tensor over(void* data, std::span<const std::int64_t> shape, const DType& dtype) const override {
    return Tensor::over(data, shape, dtype, aoti_torch_device_type_cuda(), stream_.device_index());
  }

  void run(const std::function<void(void*)>& call) const override {
    queue([&] {
      call(stream_.stream());
      synchronize();
    });
  }

  std::unique_ptr<RecordedStep> record(const Step& step, std::int64_t rows, StepMemory memory,
                                       std::int64_t logits_size) const override;

 private:
  class Graph;

  // The one call at a time that may use the stream, with the stream current. Products of float32 are of float32,
  // whatever the process has told torch.
  class Turn {
   public:
    explicit Turn(const Cuda& device) : lock_(device.mutex_), guard_(device.stream_) {}

   private:
    std::lock_guard<std::mutex> lock_;
    c10::cuda::CUDAStreamGuard guard_;
    at::NoTF32Guard no_tf32_;
  };

  // Makes calls that the stream takes up in its order, without waiting for it.
  template <typename Call>
  void queue(Call call) const {
    translated([&] {
      const Turn turn(*this);
      call();
    });
  }
  void copy_async(void* to, const void* from, std::size_t size) const {
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream_.stream()));
  }
  void synchronize() const { C10_CUDA_CHECK(cudaStreamSynchronize(stream_.stream())); }

  mutable std::mutex mutex_;
  const c10::cuda::CUDAStream stream_;
  // Temporaries of all graphs: one runs at a time, and nothing of it is read after the next has begun.
  const at::cuda::MempoolId_t pool_ = at::cuda::graph_pool_handle();
  // Of the pool, and never replayed: torch does not take a pool again once its last graph is gone.
  at::cuda::CUDAGraph anchor_;
  at::Tensor anchored_;
};

// A step captured once and replayed for every token. What it chose stays on the device, where the next one finds it,
// and travels to the host behind it. Logits are fetched when they are asked for.
class Cuda::Graph final : public RecordedStep {
 public:
  Graph(const Cuda& device, const Step& step, std::int64_t rows, StepMemory memory, std::int64_t logits_size)
      : device_(device),
        rows_(static_cast<std::size_t>(rows)),
        choice_(at::zeros({2, rows}, at::TensorOptions(at::kLong).device(device.stream_.device()))),
        host_ids_(rows_),
        host_choices_(2 * rows_ * kPlaces),
        host_logits_(rows_ * static_cast<std::size_t>(logits_size)),
        logits_size_(logits_size) {
    warm_up(step, memory);
    graph_.capture_begin(device.pool_, cudaStreamCaptureModeThreadLocal);
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
    overlap_kernels(graph_.raw_cuda_graph());
    graph_.instantiate();
    for (const auto& state : memory.states) live_.push_back(words(state.data(), state.size()));
    live_.push_back(words(choice_.data_ptr(), choice_.nbytes()));
  }

  void run(std::span<const std::int64_t> token_ids, std::span<float> logits, std::span<std::int64_t> greedy) override {
    device_.run([&](void*) {
      start(token_ids, 0);
      if (!logits.empty()) {
        const auto values = host_logits_.values();
        device_.copy_async(values.data(), logits_.data_ptr(), values.size_bytes());
        device_.synchronize();
        std::ranges::copy(values, logits.begin());
      }
      if (!greedy.empty()) take(0, greedy);
    });
  }

  void issue(std::span<const std::int64_t> token_ids, std::int64_t place) override {
    device_.queue([&] { start(token_ids, place); });
  }

  void read(std::int64_t place, std::span<std::int64_t> greedy) override {
    translated([&] { take(place, greedy); });
  }

  void keep(bool place) override {
    device_.queue([&] {
      std::vector<at::Tensor>& kept = kept_[place];
      if (kept.empty()) {
        for (const at::Tensor& live : live_) kept.push_back(at::empty_like(live));
      }
      copy_all(kept, live_);
    });
  }

  void put_back(bool place) override {
    device_.queue([&] { copy_all(live_, kept_[place]); });
  }

 private:
  // Memory as a tensor for copies: all that a step updates is a whole number of words.
  at::Tensor words(void* data, std::size_t size) const {
    return at::from_blob(data, {static_cast<std::int64_t>(size / sizeof(std::int32_t))},
                         choice_.options().dtype(at::kInt));
  }

  // A few large copies, or many small ones in one kernel.
  void copy_all(std::vector<at::Tensor>& to, const std::vector<at::Tensor>& from) const {
    constexpr std::size_t few = 4;
    if (to.size() > few) return at::_foreach_copy_(to, from);
    for (std::size_t i = 0; i < to.size(); ++i) {
      device_.copy_async(to[i].data_ptr(), from[i].data_ptr(), from[i].nbytes());
    }
  }

  // Libraries load their kernels and allocate their workspaces outside the capture. Leaves the memory as it was.
  void warm_up(const Step& step, const StepMemory& memory) {
    std::vector<std::span<std::byte>> all = memory.states;
    all.insert(all.end(), memory.rings.begin(), memory.rings.end());
    std::vector<at::Tensor> before;
    for (const auto& one : all) {
      before.push_back(at::empty({static_cast<std::int64_t>(one.size())}, choice_.options().dtype(at::kByte)));
      device_.copy_async(before.back().data_ptr(), one.data(), one.size());
    }
    for (int round = 0; round < 2; ++round) {
      call(step);
      for (std::size_t i = 0; i < all.size(); ++i) {
        device_.copy_async(all[i].data(), before[i].data_ptr(), all[i].size());
      }
      choice_.zero_();
    }
    device_.synchronize();
    logits_.reset();
  }

  void call(const Step& step) {
    const DType& ids = *dtype_by_name("int64");
    const std::array<std::int64_t, 1> row{choice_.size(1)};
    const Tensor fed = device_.over(choice_.data_ptr(), row, ids);
    const Tensor choice = device_.over(choice_.data_ptr(), choice_.sizes(), ids);
    const Tensor logits = step(fed, choice, device_.stream_.stream());
    logits_ = *torch::aot_inductor::tensor_handle_to_tensor_pointer(logits.get());
  }

  void start(std::span<const std::int64_t> token_ids, std::int64_t place) {
    if (!token_ids.empty()) {
      uploaded_.synchronize();  // the host's copy is not overwritten before it has been read
      std::ranges::copy(token_ids, host_ids_.values().begin());
      device_.copy_async(choice_.data_ptr(), host_ids_.values().data(), host_ids_.values().size_bytes());
      uploaded_.record(device_.stream_);
    }
    graph_.replay();
    const auto choice = slot(place);
    device_.copy_async(choice.data(), choice_.data_ptr(), choice.size_bytes());
    arrived_[static_cast<std::size_t>(place)].record(device_.stream_);
  }

  void take(std::int64_t place, std::span<std::int64_t> greedy) {
    arrived_[static_cast<std::size_t>(place)].synchronize();
    const auto choice = slot(place);
    for (const std::int64_t fault : choice.subspan(rows_)) check_fault(fault, logits_size_);
    std::ranges::copy(choice.first(rows_), greedy.begin());
  }

  std::span<std::int64_t> slot(std::int64_t place) const {
    return host_choices_.values().subspan(static_cast<std::size_t>(place) * 2 * rows_, 2 * rows_);
  }

  const Cuda& device_;
  const std::size_t rows_;
  at::Tensor choice_;  // (2, rows): what is fed next, and what was wrong with the logits
  at::Tensor logits_;  // of the step that ran last
  Pinned<std::int64_t> host_ids_, host_choices_;
  Pinned<float> host_logits_;
  const std::int64_t logits_size_;
  std::array<at::cuda::CUDAEvent, kPlaces> arrived_;
  at::cuda::CUDAEvent uploaded_;
  std::vector<at::Tensor> live_;
  std::array<std::vector<at::Tensor>, 2> kept_;
  at::cuda::CUDAGraph graph_{true};  // kept, so that its edges can be changed
};

std::unique_ptr<RecordedStep> Cuda::record(const Step& step, std::int64_t rows, StepMemory memory,
                                           std::int64_t logits_size) const {
  try {
    return translated([&] {
      const Turn turn(*this);
      return std::make_unique<Graph>(*this, step, rows, std::move(memory), logits_size);
    });
  } catch (const std::bad_alloc&) {  // no room to keep the rings aside: steps run one kernel after another
    return nullptr;
  }
}

}  // namespace

std::unique_ptr<Device> open_cuda(const std::string& architecture) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    cudaGetLastError();  // forgotten, or the next call would report it
    throw unavailable("the AOTInductor programs are for CUDA and this machine has none" + std::string(kExportAgain));
  }
  return translated([&]() -> std::unique_ptr<Device> {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    const c10::DeviceIndex index = c10::cuda::current_device();
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    const std::string here = "sm_" + std::to_string(properties.major) + std::to_string(properties.minor);
    if (architecture != here) {
      throw unavailable("the AOTInductor programs are for " + architecture + ", this GPU is " + here + kExportAgain);
    }
    return std::make_unique<Cuda>(index);
  });
}

}  // namespace megalodon::impl
