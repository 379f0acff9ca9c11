#include "runtime/aoti_library.hpp"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_runtime/interface.h>

#include "error.hpp"

namespace megalodon::impl {

struct AotiLibrary::Functions {
  std::string path;
  void* handle = nullptr;
  AOTInductorModelContainerHandle container = nullptr;
  decltype(&AOTInductorModelContainerDelete) remove = nullptr;
  decltype(&AOTInductorModelContainerRun) run = nullptr;
  AOTIRuntimeError (*last_error)(const char**) = nullptr;  // null in versions of torch that do not have it

  template <typename Function>
  Function find(const char* name) const {
    return reinterpret_cast<Function>(dlsym(handle, name));
  }
  template <typename Function>
  Function need(const char* name) const {
    const auto function = find<Function>(name);
    if (function == nullptr) throw bad_bundle(path + " is not an AOTInductor program: it has no " + name);
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

AotiLibrary::AotiLibrary(const std::filesystem::path& path, std::size_t inputs, std::size_t outputs,
                         const Device& device, int concurrency)
    : functions_(std::make_unique<Functions>()) {
  Functions& f = *functions_;
  f.path = path.string();
  f.handle = dlopen(f.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (f.handle == nullptr) {
    const char* error = dlerror();
    throw unavailable(f.path + " cannot be loaded: " + (error == nullptr ? "?" : error));
  }
  f.remove = f.need<decltype(f.remove)>("AOTInductorModelContainerDelete");
  // AOTInductorModelContainerRun queries CUDA events, which is an error during capture.
  f.run = f.need<decltype(f.run)>(device.is_concurrent() ? "AOTInductorModelContainerRun"
                                                         : "AOTInductorModelContainerRunSingleThreaded");
  f.last_error = f.find<decltype(f.last_error)>("AOTInductorGetLastError");
  const auto create =
      f.need<decltype(&AOTInductorModelContainerCreateWithDevice)>("AOTInductorModelContainerCreateWithDevice");
  f.check(create(&f.container, device.is_concurrent() ? static_cast<std::size_t>(concurrency) : 1, device.type(),
                 path.parent_path().c_str()),  // the folder of the .cubin files of a GPU's kernels
          "cannot be started");
  const auto count = [&](const char* name, std::size_t expected, const std::string& what) {
    std::size_t found = 0;
    f.check(f.need<decltype(&AOTInductorModelContainerGetNumInputs)>(name)(f.container, &found),
            "does not report its inputs and outputs");
    if (found != expected) {
      throw inconsistent(f.path + " has " + std::to_string(found) + " " + what + ", but the manifest says " +
                         std::to_string(expected));
    }
  };
  count("AOTInductorModelContainerGetNumInputs", inputs, "inputs");
  count("AOTInductorModelContainerGetNumOutputs", outputs, "outputs");
}

AotiLibrary::~AotiLibrary() = default;

void AotiLibrary::run(std::vector<AtenTensorHandle>& inputs, std::vector<AtenTensorHandle>& outputs,
                      void* cuda_stream) const {
  const Functions& f = *functions_;
  f.check(f.run(f.container, inputs.data(), inputs.size(), outputs.data(), outputs.size(),
                static_cast<AOTInductorStreamHandle>(cuda_stream), nullptr),
          "failed");
}

}  // namespace megalodon::impl
