// The CUDA driver's functions, found in libcuda.so.1 when the first kernel is loaded. Its headers are not needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace megalodon {

// CUlaunchAttribute and CUlaunchConfig (cuda.h, CUDA 11.8 and later).
struct LaunchAttribute {
  int id;
  int padding;
  union {
    char bytes[64];
    int flag;
  } value;
};
struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

class Driver {
 public:
  // The driver; Refusal where there is none, or one that is too old.
  static const Driver& get();

  // The CUDA context of this thread. ONNX Runtime's CUDA provider makes it current before it creates kernels.
  void* context() const;
  // 10 major + minor of the current context's GPU: 90 for sm_90.
  int compute_capability() const;
  // Loads machine code or PTX, and finds a kernel in it, which may then take so much shared memory.
  void* load(const void* image, const std::string& symbol, size_t shared_bytes, const std::string& name) const;
  void launch(const LaunchConfig& config, void* function, void** arguments, const std::string& name) const;
  void copy(void* destination, const void* source, size_t bytes, void* stream) const;

 private:
  Driver();
  void check(int error, const std::string& what) const;

  int (*init_)(unsigned);
  int (*context_current_)(void**);
  int (*context_device_)(int*);
  int (*device_attribute_)(int*, int, int);
  int (*module_load_)(void**, const void*);
  int (*module_function_)(void**, void*, const char*);
  int (*function_attribute_)(void*, int, int);
  int (*launch_)(const LaunchConfig*, void*, void**, void**);
  int (*copy_)(uint64_t, uint64_t, size_t, void*);
  int (*error_string_)(int, const char**);
};

}  // namespace megalodon
