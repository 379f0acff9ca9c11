// The CUDA device: memory from torch's caching allocator, one stream, decode steps recorded as CUDA graphs.
// The one file that uses libtorch's C++ interface; the others use its C interface.
#include "cuda.hpp"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <new>

#include "error.hpp"
#include "manifest.hpp"
#include "sampling.hpp"

namespace megalodon::impl {
namespace {

namespace allocator = c10::cuda::CUDACachingAllocator;

// As in model/kernels: kernels of this name wait for the one before them themselves, up to so many rows.
constexpr std::string_view kWaits = "megalodon_";
constexpr std::int64_t kFewRows = 4;

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

// ---- programmatic dependent launch ----------------------------------------------------------------------------------

// Lets a kernel begin while the one before it still runs, as megalodon_export/runtimes/programmatic.py does and says
// why.
class Overlap {
 public:
  explicit Overlap(CUgraph graph) : graph_(graph) {}

  // Changes the edges into kernels that wait, in a graph that is not instantiated yet; leaves it as it is where the
  // driver or the GPU has no such edges.
  void apply() {
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, c10::cuda::current_device()));
    if (properties.major < 9 || library_ == nullptr || edges_ == nullptr) return;
    std::size_t count = 0;
    check(edges_(graph_, nullptr, nullptr, nullptr, &count));
    std::vector<CUgraphNode> from(count), to(count);
    std::vector<CUgraphEdgeData> data(count);
    check(edges_(graph_, from.data(), to.data(), data.data(), &count));
    CUgraphEdgeData programmatic{};
    programmatic.from_port = 1;  // when every block of the first kernel has asked for its dependents, or has ended
    programmatic.type = CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
    for (std::size_t i = 0; i < count; ++i) {
      const bool plain = data[i].type == 0 && data[i].from_port == 0;
      if (!plain || name(from[i]).empty() || !name(to[i]).starts_with(kWaits)) continue;
      check(remove_(graph_, &from[i], &to[i], &data[i], 1));
      check(add_(graph_, &from[i], &to[i], &programmatic, 1));
    }
  }

 private:
  using Edges = CUresult (*)(CUgraph, CUgraphNode*, CUgraphNode*, CUgraphEdgeData*, std::size_t*);
  using Change = CUresult (*)(CUgraph, const CUgraphNode*, const CUgraphNode*, const CUgraphEdgeData*, std::size_t);
  template <typename Function>
  Function find(const char* name) const {
    return library_ == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library_, name));
  }

  // The name of a node's kernel; empty for a node of another type.
  std::string_view name(CUgraphNode node) const {
    CUgraphNodeType type{};
    check(type_(node, &type));
    if (type != CU_GRAPH_NODE_TYPE_KERNEL) return "";
    CUDA_KERNEL_NODE_PARAMS_v2 params{};
    const char* text = nullptr;
    check(params_(node, &params));
    check(params.func != nullptr ? function_name_(&text, params.func) : kernel_name_(&text, params.kern));
    return text == nullptr ? "" : text;
  }

  static void check(CUresult status) {
    if (status != CUDA_SUCCESS) {
      throw Error(MEGALODON_FAILED, "the CUDA driver refused to change a captured graph: error " +
                                        std::to_string(static_cast<int>(status)));
    }
  }

  CUgraph graph_;
  void* library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);  // loaded by now; torch does not link it either
  Edges edges_ = find<Edges>("cuGraphGetEdges_v2");
  Change remove_ = find<Change>("cuGraphRemoveDependencies_v2"), add_ = find<Change>("cuGraphAddDependencies_v2");
  decltype(&cuGraphNodeGetType) type_ = find<decltype(type_)>("cuGraphNodeGetType");
  decltype(&cuGraphKernelNodeGetParams) params_ = find<decltype(params_)>("cuGraphKernelNodeGetParams_v2");
  decltype(&cuFuncGetName) function_name_ = find<decltype(function_name_)>("cuFuncGetName");
  decltype(&cuKernelGetName) kernel_name_ = find<decltype(kernel_name_)>("cuKernelGetName");
};

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
  explicit Cuda(c10::DeviceIndex index) : stream_(c10::cuda::getStreamFromPool(false, index)) {}

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

  Tensor over(void* data, std::span<const std::int64_t> shape, const DType& dtype) const override {
    return Tensor::over(data, shape, dtype, aoti_torch_device_type_cuda(), stream_.device_index());
  }

  void run(const std::function<void(void*)>& call) const override {
    translated([&] {
      const Turn turn(*this);
      call(stream_.stream());
      synchronize();
    });
  }

  std::unique_ptr<RecordedStep> record(const Step& step, std::int64_t rows,
                                       std::span<const std::span<std::byte>> states) const override;

 private:
  class Graph;

  // The one call at a time that may use the stream, with the stream current.
  class Turn {
   public:
    explicit Turn(const Cuda& device) : lock_(device.mutex_), guard_(device.stream_) {}

   private:
    std::lock_guard<std::mutex> lock_;
    c10::cuda::CUDAStreamGuard guard_;
  };

  void copy_async(void* to, const void* from, std::size_t size) const {
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream_.stream()));
  }
  void synchronize() const { C10_CUDA_CHECK(cudaStreamSynchronize(stream_.stream())); }

  mutable std::mutex mutex_;
  const c10::cuda::CUDAStream stream_;
  // Temporaries of all graphs: one runs at a time, and nothing of it is read after the next has begun.
  const at::cuda::MempoolId_t pool_ = at::cuda::graph_pool_handle();
};

// A step captured once and replayed for every token: token ids from the host, the step, the most probable tokens to the
// host. Logits are fetched when they are asked for.
class Cuda::Graph final : public RecordedStep {
 public:
  Graph(const Cuda& device, const Step& step, std::int64_t rows, std::span<const std::span<std::byte>> states)
      : device_(device),
        ids_(at::empty({rows}, at::TensorOptions(at::kLong).device(device.stream_.device()))),
        host_ids_(static_cast<std::size_t>(rows)),
        host_greedy_(static_cast<std::size_t>(rows)),
        host_peaks_(static_cast<std::size_t>(rows)) {
    std::ranges::fill(host_ids_.values(), 0);
    warm_up(step, states);
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
    if (rows <= kFewRows) Overlap(graph_.raw_cuda_graph()).apply();
    graph_.instantiate();
    host_logits_.emplace(static_cast<std::size_t>(logits_.numel()));
  }

  void run(std::span<const std::int64_t> token_ids, std::span<float> logits, std::span<std::int64_t> greedy) override {
    device_.run([&](void*) {
      std::ranges::copy(token_ids, host_ids_.values().begin());
      graph_.replay();
      if (!logits.empty()) fetch(logits);
      if (greedy.empty()) return;
      device_.synchronize();
      std::ranges::copy(host_greedy_.values(), greedy.begin());
      check_peaks();
    });
  }

 private:
  // Libraries load their kernels and allocate their workspaces outside the capture. Leaves the states as they were.
  void warm_up(const Step& step, std::span<const std::span<std::byte>> states) {
    std::vector<at::Tensor> before;
    for (const auto& state : states) {
      before.push_back(at::empty({static_cast<std::int64_t>(state.size())}, ids_.options().dtype(at::kByte)));
      device_.copy_async(before.back().data_ptr(), state.data(), state.size());
    }
    for (int round = 0; round < 2; ++round) {
      call(step);
      for (std::size_t i = 0; i < states.size(); ++i) {
        device_.copy_async(states[i].data(), before[i].data_ptr(), states[i].size());
      }
    }
    device_.synchronize();
    for (at::Tensor* result : {&logits_, &greedy_, &peaks_}) result->reset();
  }

  void call(const Step& step) {
    device_.copy_async(ids_.data_ptr(), host_ids_.values().data(), host_ids_.values().size_bytes());
    const Tensor ids = device_.over(ids_.data_ptr(), ids_.sizes(), *dtype_by_name("int64"));
    const Tensor logits = step(ids, device_.stream_.stream());
    logits_ = *torch::aot_inductor::tensor_handle_to_tensor_pointer(logits.get());
    std::tie(peaks_, greedy_) = at::max(logits_, -1);  // the first of equal ones, as on the host; NaN before all
    device_.copy_async(host_greedy_.values().data(), greedy_.data_ptr(), host_greedy_.values().size_bytes());
    device_.copy_async(host_peaks_.values().data(), peaks_.data_ptr(), host_peaks_.values().size_bytes());
  }

  void fetch(std::span<float> logits) {
    const auto values = host_logits_->values();
    device_.copy_async(values.data(), logits_.data_ptr(), values.size_bytes());
    device_.synchronize();
    std::ranges::copy(values, logits.begin());
  }

  // NaN and infinities come first among the peaks; sampling says what is wrong with their rows.
  void check_peaks() {
    const auto is_finite = [](float peak) { return std::isfinite(peak); };
    if (std::ranges::all_of(host_peaks_.values(), is_finite)) return;
    std::vector<float> logits(host_logits_->values().size());
    fetch(logits);
    const std::size_t width = logits.size() / host_ids_.values().size();
    for (std::size_t at = 0; at < logits.size(); at += width) {
      sample_checked(std::span(logits).subspan(at, width), MEGALODON_GREEDY, 0);
    }
  }

  const Cuda& device_;
  at::Tensor ids_, logits_, greedy_, peaks_;
  Pinned<std::int64_t> host_ids_, host_greedy_;
  Pinned<float> host_peaks_;
  std::optional<Pinned<float>> host_logits_;
  at::cuda::CUDAGraph graph_{true};  // kept, so that its edges can be changed
};

std::unique_ptr<RecordedStep> Cuda::record(const Step& step, std::int64_t rows,
                                           std::span<const std::span<std::byte>> states) const {
  try {
    return translated([&] {
      const Turn turn(*this);
      return std::make_unique<Graph>(*this, step, rows, states);
    });
  } catch (const std::bad_alloc&) {  // no room to keep the states aside: steps run one kernel after another
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
