// AOTInductor programs: three compiled stages each, run over the layers on one copy of the weights.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle/manifest.hpp"
#include "bundle/safetensors.hpp"
#include "runtime/cache.hpp"

namespace megalodon::impl {

// The tensors of a bundle's safetensors files: mapped once, given to every stage without a copy. For a GPU, each is
// copied there once.
class WeightStore {
 public:
  WeightStore(std::filesystem::path folder, const Device& device) : folder_(std::move(folder)), device_(device) {}

  // The weight of a layer; Error MEGALODON_BAD_BUNDLE if it is not as the manifest says.
  Tensor find(const StageInput& input, std::int64_t layer);

 private:
  struct File {
    std::unique_ptr<MappedFile> mapped;
    Safetensors content;
  };
  const File& open(const std::string& name);

  std::filesystem::path folder_;
  const Device& device_;
  std::map<std::string, File> files_;
  std::map<std::byte*, DeviceMemory> copies_;  // by their place in a mapped file
};

// A shared library that AOTInductor compiled. Loading it runs native code: the hashes must have been checked.
class Library {
 public:
  // `concurrent`: how many calls may run at the same time; more wait for their turn.
  Library(const std::filesystem::path& path, std::size_t inputs, std::size_t outputs, const Device& device,
          int concurrent);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  // Takes the inputs over. `stream` is the device's; null on a CPU.
  void run(std::vector<AtenTensorHandle>& inputs, std::vector<AtenTensorHandle>& outputs, void* stream) const;

 private:
  struct Functions;
  std::unique_ptr<Functions> functions_;
};

class Program {
 public:
  Program(const std::filesystem::path& folder, const ProgramEntry& entry, const Manifest& manifest,
          WeightStore& weights, const Device& device, int concurrent);

  // A call's tensors beside the cache; null for those that the program does not take.
  struct Arguments {
    const Tensor* token_ids;
    const Tensor* lengths = nullptr;
    const Tensor* choice = nullptr;  // where it writes the most probable tokens, see Device::Step
  };
  // Logits; the cache is updated in place. Thread-safe for different rows of caches.
  Tensor run(const Arguments& arguments, const CacheView& cache, void* stream) const;
  // Whether it takes `choice`.
  bool chooses() const { return chooses_; }

 private:
  // Where an input comes from: a weight of the layer, a tensor of the cache, or a tensor of the call.
  struct Source {
    InputKind kind;
    std::size_t index;
  };
  struct StageRun {
    std::unique_ptr<Library> compiled;
    std::vector<std::vector<Source>> sources;  // per layer
    std::vector<std::vector<Tensor>> weights;  // per layer
    std::vector<std::size_t> outputs;          // places among the tensors of the call
  };

  StageRun load(const std::filesystem::path& folder, const Stage& stage, std::int64_t layers, const Manifest& manifest,
                WeightStore& weights, const Device& device, int concurrent);
  std::size_t place(const std::string& name);
  void run_stage(const StageRun& stage, std::size_t layer, std::vector<Tensor>& tensors, const CacheView& cache,
                 void* stream) const;

  std::map<std::string, std::size_t> places_;  // of the tensors of a call, by name
  StageRun begin_, layer_, end_;
  std::int64_t layers_;
  bool chooses_ = false;
};

}  // namespace megalodon::impl
