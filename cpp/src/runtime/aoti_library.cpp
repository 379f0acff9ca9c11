#include "runtime/aoti_library.hpp"

#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <torch/csrc/inductor/aoti_runtime/interface.h>

#include <cerrno>
#include <cstring>

#include "error.hpp"

namespace megalodon::impl {
namespace {

// A path of the same library that contains the number of its file: "/." for every binary 1, "/" for every 0.
// glibc takes a library for loaded if it has loaded one of that name, even where another file is now. It never unloads
// the first library that defines a "unique" symbol, and those of Inductor define some. A process that opened a bundle,
// and opens it again after an export has replaced it, would therefore run old programs on new weights.
std::string spelled_for_loader(const std::filesystem::path& path) {
  struct stat status{};
  if (stat(path.c_str(), &status) != 0) {
    throw io_error(path.string() + " cannot be opened: " + std::strerror(errno));
  }
  std::string number;
  for (auto rest = status.st_ino; rest != 0; rest /= 2) number.insert(0, rest % 2 == 1 ? "/." : "/");
  return path.parent_path().string() + number + "/" + path.filename().string();
}

std::string load_error(const std::filesystem::path& path) {
  const char* error = dlerror();
  struct statvfs status{};
  if (statvfs(path.c_str(), &status) == 0 && (status.f_flag & ST_NOEXEC) != 0) {
    return path.parent_path().string() +
           " is on a file system mounted noexec; copy the bundle to one that programs may run from";
  }
  return error == nullptr ? "?" : error;
}

}  // namespace

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
  f.handle = dlopen(spelled_for_loader(path).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (f.handle == nullptr) throw unavailable(f.path + " cannot be loaded: " + load_error(path));
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
