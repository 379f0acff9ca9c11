#include "runtime/program.hpp"

#include <algorithm>

#include "error.hpp"

namespace megalodon::impl {
namespace {

// The names of arguments in the manifest.
constexpr const char *kTokenIds = "token_ids", *kLengths = "lengths", *kNextTokens = "next_tokens";

}  // namespace

Program::Program(const ProgramEntry& entry, const ProgramSource& source) {
  // A stage can take the arguments and the outputs of the stages before it, so names are added in that order.
  for (const char* argument : {kTokenIds, kLengths, kNextTokens}) index_of(argument);
  begin_ = load(entry.begin, 1, source);
  layer_ = load(entry.layer, source.manifest.layers, source);
  end_ = load(entry.end, 1, source);
  index_of("logits");
  has_next_tokens_ =
      std::ranges::any_of(entry.end.inputs, [](const StageInput& input) { return input.name == kNextTokens; });
}

// Adds the name if it is new.
std::size_t Program::index_of(const std::string& name) { return indices_.emplace(name, indices_.size()).first->second; }

Program::LoadedStage Program::load(const Stage& stage, std::int64_t layers, const ProgramSource& source) {
  LoadedStage loaded;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    BoundLayer& bound = loaded.layers.emplace_back();
    for (const StageInput& input : stage.inputs) {
      bound.inputs.push_back(bind(stage, input, layer, source, bound.weights));
    }
  }
  for (const std::string& output : stage.outputs) loaded.outputs.push_back(index_of(output));
  loaded.library = std::make_unique<AotiLibrary>(source.folder / "aoti" / stage.file, stage.inputs.size(),
                                                 stage.outputs.size(), source.device, source.concurrency);
  return loaded;
}

Program::InputSource Program::bind(const Stage& stage, const StageInput& input, std::int64_t layer,
                                   const ProgramSource& source, std::vector<Tensor>& weights) const {
  const std::string name = numbered(input.name, layer);
  const auto nowhere = [&] {
    return inconsistent("manifest.json: the input " + name + " of " + stage.file + " comes from nowhere");
  };
  if (input.kind == InputKind::weight) {
    weights.push_back(source.weights.find(input, layer));
    return {input.kind, weights.size() - 1};
  }
  if (input.kind == InputKind::cache) {
    const std::vector<CacheTensor>& cache = source.manifest.cache;
    const auto found = std::ranges::find(cache, name, &CacheTensor::name);
    if (found == cache.end() || found->dtype != input.dtype) throw nowhere();
    return {input.kind, static_cast<std::size_t>(found - cache.begin())};
  }
  const auto found = indices_.find(name);
  if (found == indices_.end()) throw nowhere();
  return {input.kind, found->second};
}

Tensor Program::run(const Arguments& arguments, const CacheView& cache, void* cuda_stream) const {
  std::vector<Tensor> tensors(indices_.size());
  const auto set = [&](const char* name, const Tensor* tensor) {
    if (tensor != nullptr) tensors[indices_.at(name)] = Tensor(tensor->share());
  };
  set(kTokenIds, arguments.token_ids);
  set(kLengths, arguments.lengths);
  set(kNextTokens, arguments.next_tokens);
  cache.copy_in(cuda_stream);
  run_stage(begin_, 0, tensors, cache, cuda_stream);
  for (std::size_t layer = 0; layer < layer_.layers.size(); ++layer) {
    run_stage(layer_, layer, tensors, cache, cuda_stream);
  }
  run_stage(end_, 0, tensors, cache, cuda_stream);
  cache.copy_out(cuda_stream);
  return std::move(tensors[indices_.at("logits")]);
}

void Program::run_stage(const LoadedStage& stage, std::size_t layer, std::vector<Tensor>& tensors,
                        const CacheView& cache, void* cuda_stream) const {
  const BoundLayer& bound = stage.layers[layer];
  std::vector<Tensor> inputs;
  inputs.reserve(bound.inputs.size());
  for (const InputSource& input : bound.inputs) {
    const Tensor& tensor = input.kind == InputKind::weight  ? bound.weights[input.index]
                           : input.kind == InputKind::cache ? cache.tensor(input.index)
                                                            : tensors[input.index];
    if (tensor.get() == nullptr)
      throw bad_bundle("manifest.json: a stage reads a tensor that no stage before it returns");
    inputs.emplace_back(tensor.share());
  }
  std::vector<AtenTensorHandle> handles;
  handles.reserve(inputs.size());
  for (Tensor& input : inputs) handles.push_back(input.release());
  std::vector<AtenTensorHandle> outputs(stage.outputs.size(), nullptr);
  stage.library->run(handles, outputs, cuda_stream);
  for (std::size_t i = 0; i < outputs.size(); ++i) tensors[stage.outputs[i]] = Tensor(outputs[i]);
}

}  // namespace megalodon::impl
