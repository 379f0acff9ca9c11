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

// The names of kernels that execute `griddepcontrol.wait`: KERNEL_PREFIX of `model/kernels`.
constexpr std::string_view kKernelPrefix = "megalodon_";

class GraphEdges {
 public:
  explicit GraphEdges(CUgraph graph) : graph_(graph) {}

  void make_programmatic() {
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, c10::cuda::current_device()));
    if (properties.major < 9 || library_ == nullptr || get_edges_ == nullptr) return;
    std::size_t count = 0;
    check(get_edges_(graph_, nullptr, nullptr, nullptr, &count));
    std::vector<CUgraphNode> from(count), to(count);
    std::vector<CUgraphEdgeData> data(count);
    check(get_edges_(graph_, from.data(), to.data(), data.data(), &count));
    CUgraphEdgeData programmatic{};
    programmatic.from_port = 1;  // once every block of the first kernel has executed launch_dependents, or has ended
    programmatic.type = CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
    for (std::size_t i = 0; i < count; ++i) {
      const bool plain = data[i].type == 0 && data[i].from_port == 0;
      if (!plain || kernel_name(from[i]).empty() || !kernel_name(to[i]).starts_with(kKernelPrefix)) continue;
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

  // The name of a node's kernel. Empty for a node of another type.
  std::string_view kernel_name(CUgraphNode node) const {
    CUgraphNodeType type{};
    check(get_type_(node, &type));
    if (type != CU_GRAPH_NODE_TYPE_KERNEL) return "";
    CUDA_KERNEL_NODE_PARAMS_v2 params{};
    const char* text = nullptr;
    check(get_params_(node, &params));
    check(params.func != nullptr ? get_function_name_(&text, params.func) : get_kernel_name_(&text, params.kern));
    return text == nullptr ? "" : text;
  }

  static void check(CUresult status) {
    if (status != CUDA_SUCCESS) {
      throw Error(MEGALODON_FAILED, "the CUDA driver refused to change a captured graph: error " +
                                        std::to_string(static_cast<int>(status)));
    }
  }

  CUgraph graph_;
  void* library_ =
      dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);  // torch has loaded it; neither torch nor this links it
  Edges get_edges_ = find<Edges>("cuGraphGetEdges_v2");
  Change remove_ = find<Change>("cuGraphRemoveDependencies_v2"), add_ = find<Change>("cuGraphAddDependencies_v2");
  decltype(&cuGraphNodeGetType) get_type_ = find<decltype(get_type_)>("cuGraphNodeGetType");
  decltype(&cuGraphKernelNodeGetParams) get_params_ = find<decltype(get_params_)>("cuGraphKernelNodeGetParams_v2");
  decltype(&cuFuncGetName) get_function_name_ = find<decltype(get_function_name_)>("cuFuncGetName");
  decltype(&cuKernelGetName) get_kernel_name_ = find<decltype(get_kernel_name_)>("cuKernelGetName");
};

}  // namespace

void enable_pdl(CUgraph graph) { GraphEdges(graph).make_programmatic(); }

}  // namespace megalodon::impl
