#include "runtime/programs.hpp"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_runtime/interface.h>

#include <algorithm>

#include "error.hpp"
#include "text_format.hpp"

namespace megalodon::impl {
namespace {

// The arguments of programs, as manifests name them.
constexpr const char *kTokenIds = "token_ids", *kLengths = "lengths", *kChoice = "greedy";

}  // namespace

// ---- weights --------------------------------------------------------------------------------------------------------

const WeightStore::File& WeightStore::open(const std::string& name) {
  const auto found = files_.find(name);
  if (found != files_.end()) return found->second;
  File file{std::make_unique<MappedFile>(folder_ / name), {}};
  try {
    file.content = parse_safetensors(file.mapped->bytes(), (folder_ / name).string());
  } catch (const Error& error) {
    throw inconsistent(error.what());
  }
  return files_.emplace(name, std::move(file)).first->second;
}

Tensor WeightStore::find(const StageInput& input, std::int64_t layer) {
  const std::string name = numbered(input.tensor, layer);
  const Safetensors& content = open(input.file).content;
  const auto found = content.tensors.find(name);
  if (found == content.tensors.end()) {
    throw inconsistent(input.file + " has no tensor " + name + ", but the manifest says so");
  }
  const StoredTensor& tensor = found->second;
  if (tensor.dtype != input.dtype || tensor.shape != input.shape) {
    throw inconsistent(input.file + ": " + name + " is " + std::string(tensor.dtype->name) + " " +
                       list_text(tensor.shape) + ", but the manifest says " + std::string(input.dtype->name) + " " +
                       list_text(input.shape));
  }
  std::byte* data = tensor.data.data();
  if (std::string(device_.type()) != "cpu") {
    auto copy = copies_.find(data);
    if (copy == copies_.end()) {
      copy = copies_.emplace(data, DeviceMemory(device_, tensor.data.size())).first;
      device_.copy(copy->second.data(), data, tensor.data.size());
    }
    data = copy->second.data();
  }
  return device_.over(data, tensor.shape, *tensor.dtype);
}

// ---- libraries ------------------------------------------------------------------------------------------------------

struct Library::Functions {
  std::string path;
  void* handle = nullptr;
  AOTInductorModelContainerHandle container = nullptr;
  decltype(&AOTInductorModelContainerDelete) remove = nullptr;
  decltype(&AOTInductorModelContainerRun) run = nullptr;
  AOTIRuntimeError (*last_error)(const char**) = nullptr;  // not in every version of torch

  template <typename Function>
  Function find(const char* name) const {
    return reinterpret_cast<Function>(dlsym(handle, name));
  }
  template <typename Function>
  Function need(const char* name) const {
    const auto function = find<Function>(name);
    if (function == nullptr) throw bad_bundle(path + " is no AOTInductor program: it has no " + name);
    return function;
  }
  void check(AOTIRuntimeError status, const std::string& what) const {
    if (status == AOTI_RUNTIME_SUCCESS) return;
    const char* message = nullptr;
    if (last_error != nullptr) last_error(&message);
    const std::string why = message != nullptr && *message != '\0' ? std::string(": ") + message : "";
    throw Error(MEGALODON_FAILED, path + " " + what + why + torch_error());
  }
  ~Functions() {
    if (container != nullptr) remove(container);
    if (handle != nullptr) dlclose(handle);
  }
};

Library::Library(const std::filesystem::path& path, std::size_t inputs, std::size_t outputs, const Device& device,
                 int concurrent)
    : functions_(std::make_unique<Functions>()) {
  Functions& f = *functions_;
  f.path = path.string();
  f.handle = dlopen(f.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (f.handle == nullptr) {
    const char* error = dlerror();
    throw unavailable(f.path + " cannot be loaded: " + (error == nullptr ? "?" : error));
  }
  f.remove = f.need<decltype(f.remove)>("AOTInductorModelContainerDelete");
  // On a GPU the programs are recorded: the other function would ask events that a recording does not answer.
  f.run = f.need<decltype(f.run)>(device.is_concurrent() ? "AOTInductorModelContainerRun"
                                                         : "AOTInductorModelContainerRunSingleThreaded");
  f.last_error = f.find<decltype(f.last_error)>("AOTInductorGetLastError");
  const auto create =
      f.need<decltype(&AOTInductorModelContainerCreateWithDevice)>("AOTInductorModelContainerCreateWithDevice");
  f.check(create(&f.container, device.is_concurrent() ? static_cast<std::size_t>(concurrent) : 1, device.type(),
                 path.parent_path().c_str()),  // where a GPU's kernels are, in files of their own
          "cannot be started");
  const auto count = [&](const char* name, std::size_t expected, const std::string& what) {
    std::size_t found = 0;
    f.check(f.need<decltype(&AOTInductorModelContainerGetNumInputs)>(name)(f.container, &found), "cannot be asked");
    if (found != expected) {
      throw inconsistent(f.path + " has " + std::to_string(found) + " " + what + ", but the manifest says " +
                         std::to_string(expected));
    }
  };
  count("AOTInductorModelContainerGetNumInputs", inputs, "inputs");
  count("AOTInductorModelContainerGetNumOutputs", outputs, "outputs");
}

Library::~Library() = default;

void Library::run(std::vector<AtenTensorHandle>& inputs, std::vector<AtenTensorHandle>& outputs, void* stream) const {
  const Functions& f = *functions_;
  f.check(f.run(f.container, inputs.data(), inputs.size(), outputs.data(), outputs.size(),
                static_cast<AOTInductorStreamHandle>(stream), nullptr),
          "failed");
}

// ---- programs -------------------------------------------------------------------------------------------------------

Program::Program(const std::filesystem::path& folder, const ProgramEntry& entry, const Manifest& manifest,
                 WeightStore& weights, const Device& device, int concurrent)
    : layers_(manifest.layers) {
  // The arguments come first; what a stage gives is known to those after it.
  for (const char* argument : {kTokenIds, kLengths, kChoice}) place(argument);
  begin_ = load(folder, entry.begin, 1, manifest, weights, device, concurrent);
  layer_ = load(folder, entry.layer, layers_, manifest, weights, device, concurrent);
  end_ = load(folder, entry.end, 1, manifest, weights, device, concurrent);
  place("logits");
  chooses_ = std::ranges::any_of(entry.end.inputs, [](const StageInput& input) { return input.name == kChoice; });
}

std::size_t Program::place(const std::string& name) { return places_.emplace(name, places_.size()).first->second; }

Program::StageRun Program::load(const std::filesystem::path& folder, const Stage& stage, std::int64_t layers,
                                const Manifest& manifest, WeightStore& weights, const Device& device, int concurrent) {
  StageRun run;
  run.sources.resize(static_cast<std::size_t>(layers));
  run.weights.resize(static_cast<std::size_t>(layers));
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    auto& sources = run.sources[static_cast<std::size_t>(layer)];
    auto& bound = run.weights[static_cast<std::size_t>(layer)];
    for (const StageInput& input : stage.inputs) {
      const std::string name = numbered(input.name, layer);
      const auto nowhere = [&] {
        return inconsistent("manifest.json: the input " + name + " of " + stage.file + " comes from nowhere");
      };
      if (input.kind == InputKind::weight) {
        bound.push_back(weights.find(input, layer));
        sources.push_back({input.kind, bound.size() - 1});
      } else if (input.kind == InputKind::cache) {
        const auto found = std::ranges::find(manifest.cache, name, &CacheTensor::name);
        if (found == manifest.cache.end() || found->dtype != input.dtype) throw nowhere();
        sources.push_back({input.kind, static_cast<std::size_t>(found - manifest.cache.begin())});
      } else {
        const auto found = places_.find(name);
        if (found == places_.end()) throw nowhere();
        sources.push_back({input.kind, found->second});
      }
    }
  }
  for (const std::string& output : stage.outputs) run.outputs.push_back(place(output));
  run.compiled = std::make_unique<Library>(folder / "aoti" / stage.file, stage.inputs.size(), stage.outputs.size(),
                                           device, concurrent);
  return run;
}

Tensor Program::run(const Arguments& arguments, const CacheView& cache, void* stream) const {
  std::vector<Tensor> tensors(places_.size());
  const auto give = [&](const char* name, const Tensor* tensor) {
    if (tensor != nullptr) tensors[places_.at(name)] = Tensor(tensor->share());
  };
  give(kTokenIds, arguments.token_ids);
  give(kLengths, arguments.lengths);
  give(kChoice, arguments.choice);
  cache.enter(stream);
  run_stage(begin_, 0, tensors, cache, stream);
  for (std::size_t layer = 0; layer < static_cast<std::size_t>(layers_); ++layer) {
    run_stage(layer_, layer, tensors, cache, stream);
  }
  run_stage(end_, 0, tensors, cache, stream);
  cache.leave(stream);
  return std::move(tensors[places_.at("logits")]);
}

void Program::run_stage(const StageRun& stage, std::size_t layer, std::vector<Tensor>& tensors, const CacheView& cache,
                        void* stream) const {
  std::vector<Tensor> inputs;
  inputs.reserve(stage.sources[layer].size());
  for (const Source& source : stage.sources[layer]) {
    const Tensor& tensor = source.kind == InputKind::weight  ? stage.weights[layer][source.index]
                           : source.kind == InputKind::cache ? cache.tensor(source.index)
                                                             : tensors[source.index];
    if (tensor.get() == nullptr) throw bad_bundle("manifest.json: a stage needs a tensor that none before it gives");
    inputs.emplace_back(tensor.share());
  }
  std::vector<AtenTensorHandle> handles;
  handles.reserve(inputs.size());
  for (Tensor& input : inputs) handles.push_back(input.release());
  std::vector<AtenTensorHandle> outputs(stage.outputs.size(), nullptr);
  stage.compiled->run(handles, outputs, stream);
  for (std::size_t i = 0; i < outputs.size(); ++i) tensors[stage.outputs[i]] = Tensor(outputs[i]);
}

}  // namespace megalodon::impl
