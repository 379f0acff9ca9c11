#include "runtime/pdl.hpp"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <string>
#include <string_view>
#include <vector>

#include "error.hpp"

namespace megalodon::impl {
namespace {

// As in model/kernels: kernels of this name wait for the one before them themselves.
constexpr std::string_view kWaits = "megalodon_";

class Overlap {
 public:
  explicit Overlap(CUgraph graph) : graph_(graph) {}

  // Changes the edges into kernels that wait.
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

}  // namespace

void overlap_kernels(CUgraph graph) { Overlap(graph).apply(); }

}  // namespace megalodon::impl
