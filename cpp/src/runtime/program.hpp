// A program, prefill or decode: AOTInductor stages that run one after another on one copy of the weights.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle/manifest.hpp"
#include "runtime/aoti_library.hpp"
#include "runtime/cache.hpp"
#include "runtime/weights.hpp"

namespace megalodon::impl {

// The bundle that programs are loaded from, and the device that they run on.
struct ProgramSource {
  const std::filesystem::path& folder;
  const Manifest& manifest;
  WeightStore& weights;
  const Device& device;
  int concurrency;  // calls of a stage that may run at the same time
};

// A call has tensors with names: its arguments, and what its stages return. Stages also read weights, and read and
// update the cache. For decode:
//
//     begin(token_ids, cache final.position, weights) -> x, rotary.cos, rotary.sin
//     layer(x, rotary.cos, rotary.sin, cache layers.0.key ..., weights of layer 0) -> x      once for every layer
//     end(x, cache final.norm_mean ..., weights) -> logits
class Program {
 public:
  Program(const ProgramEntry& entry, const ProgramSource& source);

  // Null for an argument that the program does not take.
  struct Arguments {
    const Tensor* token_ids;
    const Tensor* lengths = nullptr;
    const Tensor* next_tokens = nullptr;  // an output: see Device::Step
  };
  // Returns logits and updates the cache in place. Threads may call it at the same time with different rows.
  Tensor run(const Arguments& arguments, const CacheView& cache, void* cuda_stream) const;
  // Whether the program takes `next_tokens`.
  bool has_next_tokens() const { return has_next_tokens_; }

 private:
  // The origin of an input: one of the layer's weights, of the cache's tensors, or of the call's.
  struct InputSource {
    InputKind kind;
    std::size_t index;
  };
  struct BoundLayer {
    std::vector<InputSource> inputs;
    std::vector<Tensor> weights;
  };
  struct LoadedStage {
    std::unique_ptr<AotiLibrary> library;
    std::vector<BoundLayer> layers;    // one alone for `begin` and `end`
    std::vector<std::size_t> outputs;  // indices among the call's tensors
  };

  LoadedStage load(const Stage& stage, std::int64_t layers, const ProgramSource& source);
  InputSource bind(const Stage& stage, const StageInput& input, std::int64_t layer, const ProgramSource& source,
                   std::vector<Tensor>& weights) const;
  std::size_t index_of(const std::string& name);
  void run_stage(const LoadedStage& stage, std::size_t layer, std::vector<Tensor>& tensors, const CacheView& cache,
                 void* cuda_stream) const;

  std::map<std::string, std::size_t> indices_;  // of the call's tensors, by name
  LoadedStage begin_, layer_, end_;
  bool has_next_tokens_ = false;
};

}  // namespace megalodon::impl
