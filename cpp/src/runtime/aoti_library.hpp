// A shared library that AOTInductor compiled: one stage of a program.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "runtime/device.hpp"

namespace megalodon::impl {

// Loading one runs native code: check the bundle's hashes first.
class AotiLibrary {
 public:
  // At most `concurrency` calls run at the same time; further ones wait. Error MEGALODON_BAD_BUNDLE unless the library
  // has this number of inputs and outputs.
  AotiLibrary(const std::filesystem::path& path, std::size_t inputs, std::size_t outputs, const Device& device,
              int concurrency);
  ~AotiLibrary();
  AotiLibrary(const AotiLibrary&) = delete;
  AotiLibrary& operator=(const AotiLibrary&) = delete;

  // Takes ownership of the inputs and gives ownership of the outputs. `cuda_stream` is null on a CPU.
  void run(std::vector<AtenTensorHandle>& inputs, std::vector<AtenTensorHandle>& outputs, void* cuda_stream) const;

 private:
  struct Functions;
  std::unique_ptr<Functions> functions_;
};

}  // namespace megalodon::impl
