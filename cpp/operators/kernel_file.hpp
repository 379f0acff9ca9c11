// The file of compiled kernels that lies beside this library (exporters/onnx_kernels/machine_code.py writes it).
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace megalodon {

// A kernel that the driver has loaded into a context.
struct LoadedKernel {
  std::string name;
  void* function = nullptr;
  unsigned shared_bytes = 0;
  unsigned threads = 0;
  unsigned pointers = 0;  // null pointers behind its arguments
  bool pdl = false;
};

class KernelFile {
 public:
  // The file beside this library, read once; Refusal if it is not there or is no such file.
  static KernelFile& get();

  // A kernel for the GPU of the current context, loaded there once. Refusal if there is no code for that GPU.
  const LoadedKernel& load(const std::string& name);

 private:
  struct Code {
    std::string symbol;
    size_t offset, size;
    LoadedKernel kernel;
  };

  KernelFile();
  void read_lines(const std::string& lines, size_t start);
  // The code for a GPU: its own architecture's, an older one's of the 8.x family, or PTX.
  const Code& choose(const std::string& name, int compute_capability) const;

  std::string path_;
  std::vector<char> data_;
  std::map<std::string, std::map<int, Code>> kernels_;  // by name and 10 major + minor; PTX is 0
  std::map<std::pair<void*, std::string>, LoadedKernel> loaded_;  // by context and name
  std::mutex mutex_;
};

}  // namespace megalodon
