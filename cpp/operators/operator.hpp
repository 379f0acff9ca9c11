// The kernel behind one node: checks its tensors, then copies and launches on ONNX Runtime's CUDA stream.
#pragma once

#include <memory>
#include <vector>

#include "kernel_file.hpp"
#include "ort_abi.hpp"
#include "program.hpp"

namespace megalodon {

class Operator {
 public:
  // Reads the node's program and loads its kernels.
  Operator(ort::Api* api, const ort::KernelInfo* info);

  void run(ort::KernelContext* context) const;

 private:
  // One run: the tensors' addresses, and the values of the program's symbols.
  struct Run {
    std::vector<void*> inputs, outputs;
    std::vector<std::vector<int64_t>> input_shapes;
    std::vector<int64_t> symbols;
    void* stream = nullptr;
    bool needs_barrier = false;  // the next kernel may not start before all in front of it has ended
  };

  std::string attribute(const ort::KernelInfo* info, const char* name) const;
  void check(ort::Status* status) const;
  void read_inputs(ort::KernelContext* context, Run& run) const;
  void check_shapes(Run& run) const;
  void make_outputs(ort::KernelContext* context, Run& run) const;
  void* data(const ort::Value* value, const std::string& name) const;
  void copy(Run& run, void* destination, const void* source, size_t bytes) const;
  void launch(Run& run, const Step& step, const LoadedKernel& kernel) const;
  size_t bytes(const Tensor& tensor, const Run& run) const;
  [[noreturn]] void refuse(const std::string& what) const;

  ort::Api* api_;
  std::unique_ptr<Program> program_;
  std::vector<const LoadedKernel*> kernels_;  // of each step; null for a copy
};

// The message of an ONNX Runtime status. ONNX Runtime keeps the status.
struct StatusError {
  ort::Status* status;
};

}  // namespace megalodon
