// The weights of a bundle, which all stages of all programs share.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "bundle/file.hpp"
#include "bundle/manifest.hpp"
#include "bundle/safetensors.hpp"
#include "runtime/device.hpp"

namespace megalodon::impl {

// Maps each safetensors file once. On a CPU, tensors lie in the mapped files and are not copied. For a GPU, each tensor
// is copied there once.
class WeightStore {
 public:
  WeightStore(std::filesystem::path folder, const Device& device) : folder_(std::move(folder)), device_(device) {}

  // The weight that a stage takes for a layer. The file has it: `open_manifest` checked that.
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
  std::map<std::byte*, DeviceMemory> gpu_copies_;  // by the address in a mapped file
};

}  // namespace megalodon::impl
