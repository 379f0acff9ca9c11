// A node's tensors, and the copies and launches that the exporter recorded for it, read from the node's attribute
// `program` (exporters/onnx_kernels/operation.py writes it).
//
//   operation ema_step
//   barrier                                       its first kernel waits for the end of all before it; optional
//   size B 0 0 1                                  B is dimension 0 of input 0, divided by 1
//   input x bfloat16 B 192                        name, dtype and shape
//   output norm_mean float32 B 8 = 2              begins as input 2; both may be one buffer
//   output x_norm bfloat16 B 192
//   copy i2 o3                                    output 3 begins as a copy of input 2
//   launch megalodon_ema_step.ac9f297a0686 B 8 1 i0 i1 o0 n:B f:3727c5ac
//
// Sizes are in reverse Polish notation: "264,B,//" is 264 / B. Arguments of a launch are tensors (i0, o0), 32-bit and
// 64-bit integers (n:, l:) and the bits of float32 numbers (f:).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace megalodon {

// A size that depends on the symbols of a program.
class Size {
 public:
  Size(const std::string& text, const std::vector<std::string>& symbols);
  int64_t value(const std::vector<int64_t>& symbols) const;

 private:
  struct Token {
    enum Kind { kNumber, kSymbol, kAdd, kMultiply, kDivide, kRemainder, kLess, kGreater } kind;
    int64_t number;
  };
  std::vector<Token> tokens_;
};

struct Symbol {
  size_t input, axis;
  int64_t divisor;
};

struct Tensor {
  std::string name;
  int dtype = 0;  // of ONNX
  size_t bytes = 0;  // of an element
  std::vector<Size> shape;
  int begins_as = -1;  // of an output: the input that it is a new version of
};

struct TensorPlace {
  bool output = false;
  size_t index = 0;
};

struct Argument {
  enum Kind { kTensor, kInt32, kInt64, kFloat } kind = kTensor;
  TensorPlace tensor{};
  std::vector<Size> integer;  // one, for an integer
  float number = 0;
};

struct Step {
  bool is_copy;
  TensorPlace source{}, destination{};
  std::string kernel;
  std::vector<Size> grid;
  std::vector<Argument> arguments;
};

struct Program {
  explicit Program(const std::string& text);

  std::string name;
  bool barrier = false;
  std::vector<std::string> symbol_names;
  std::vector<Symbol> symbols;
  std::vector<Tensor> inputs, outputs;
  std::vector<Step> steps;

 private:
  void read_line(const std::string& line);
  Tensor read_tensor(const std::vector<std::string>& words) const;
  Argument read_argument(const std::string& word) const;
  TensorPlace read_place(const std::string& word) const;
};

}  // namespace megalodon
