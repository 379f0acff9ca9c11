#include "driver.hpp"

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include "refusal.hpp"

namespace megalodon {
namespace {

constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int kMostSharedBytes = 8;      // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr size_t kSharedWithoutAsking = 48 << 10;

#ifdef _WIN32
constexpr const char* kLibrary = "nvcuda.dll";
void* open_library() { return reinterpret_cast<void*>(LoadLibraryA(kLibrary)); }
void* find(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(reinterpret_cast<HMODULE>(library), name));
}
#else
constexpr const char* kLibrary = "libcuda.so.1";
void* open_library() { return dlopen(kLibrary, RTLD_NOW); }
void* find(void* library, const char* name) { return dlsym(library, name); }
#endif

template <typename Function>
void bind(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(find(library, name));
  if (function == nullptr) throw Refusal(std::string(kLibrary) + " has no " + name + ": CUDA 11.8 or newer is needed");
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver;  // a Refusal leaves it unmade, so that the next call tries again
  return driver;
}

Driver::Driver() {
  void* library = open_library();
  if (library == nullptr) throw Refusal(std::string("the kernels need the CUDA driver, and there is no ") + kLibrary);
  bind(library, "cuInit", init_);
  bind(library, "cuCtxGetCurrent", context_current_);
  bind(library, "cuCtxGetDevice", context_device_);
  bind(library, "cuDeviceGetAttribute", device_attribute_);
  bind(library, "cuModuleLoadData", module_load_);
  bind(library, "cuModuleGetFunction", module_function_);
  bind(library, "cuFuncSetAttribute", function_attribute_);
  bind(library, "cuLaunchKernelEx", launch_);
  bind(library, "cuMemcpyDtoDAsync_v2", copy_);
  bind(library, "cuGetErrorString", error_string_);
  check(init_(0), "the CUDA driver does not start");
}

void Driver::check(int error, const std::string& what) const {
  if (error == 0) return;
  const char* text = nullptr;
  error_string_(error, &text);
  throw Refusal(what + ": " + (text ? text : "an unknown error") + " (" + std::to_string(error) + ")");
}

void* Driver::context() const {
  void* context = nullptr;
  check(context_current_(&context), "the CUDA context cannot be read");
  if (context == nullptr) throw Refusal("no CUDA context is current where the kernels are loaded");
  return context;
}

int Driver::compute_capability() const {
  int device = 0, major = 0, minor = 0;
  check(context_device_(&device), "the context's GPU cannot be read");
  check(device_attribute_(&major, kMajor, device), "the GPU's architecture cannot be read");
  check(device_attribute_(&minor, kMinor, device), "the GPU's architecture cannot be read");
  return 10 * major + minor;
}

void* Driver::load(const void* image, const std::string& symbol, size_t shared_bytes, const std::string& name) const {
  void *module = nullptr, *function = nullptr;
  check(module_load_(&module, image), name + " cannot be loaded");
  check(module_function_(&function, module, symbol.c_str()), name + " has no kernel " + symbol);
  if (shared_bytes > kSharedWithoutAsking) {
    check(function_attribute_(function, kMostSharedBytes, static_cast<int>(shared_bytes)),
          name + " needs " + std::to_string(shared_bytes) + " bytes of shared memory, which this GPU does not give");
  }
  return function;
}

void Driver::launch(const LaunchConfig& config, void* function, void** arguments, const std::string& name) const {
  check(launch_(&config, function, arguments, nullptr), name + " cannot be launched");
}

void Driver::copy(void* destination, const void* source, size_t bytes, void* stream) const {
  const auto to = reinterpret_cast<uint64_t>(destination), from = reinterpret_cast<uint64_t>(source);
  check(copy_(to, from, bytes, stream), "a tensor cannot be copied");
}

}  // namespace megalodon
