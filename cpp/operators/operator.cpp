#include "operator.hpp"

#include <algorithm>

#include "driver.hpp"
#include "refusal.hpp"

namespace megalodon {
namespace {

constexpr int kProgrammaticStreamSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr uintptr_t kAlignment = 16;                 // of every tensor: the kernels are compiled for it
constexpr size_t kMostPointers = 4;                  // null pointers behind a kernel's arguments

std::string shown(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

Operator::Operator(ort::Api* api, const ort::KernelInfo* info) : api_(api) {
  program_ = std::make_unique<Program>(attribute(info, "program"));
  for (const Step& step : program_->steps) {
    kernels_.push_back(step.is_copy ? nullptr : &KernelFile::get().load(step.kernel));
    if (!step.is_copy && kernels_.back()->pointers > kMostPointers) refuse(step.kernel + " takes too many pointers");
  }
}

void Operator::refuse(const std::string& what) const { throw Refusal(program_->name + ": " + what); }

void Operator::check(ort::Status* status) const {
  if (status != nullptr) throw StatusError{status};
}

std::string Operator::attribute(const ort::KernelInfo* info, const char* name) const {
  size_t size = 0;
  const auto get = [&](char* text) {
    check(ort::call<ort::Status*>(api_, ort::kKernelInfoGetAttributeString, info, name, text, &size));
  };
  get(nullptr);
  std::string text(size, '\0');
  get(text.data());
  text.resize(size ? size - 1 : 0);  // without the null behind it
  return text;
}

void Operator::run(ort::KernelContext* context) const {
  Run run;
  run.needs_barrier = program_->barrier;
  check(ort::call<ort::Status*>(api_, ort::kKernelContextGetGpuComputeStream,
                                static_cast<const ort::KernelContext*>(context), &run.stream));
  read_inputs(context, run);
  check_shapes(run);
  make_outputs(context, run);
  for (size_t i = 0; i < program_->steps.size(); ++i) {
    const Step& step = program_->steps[i];
    if (step.is_copy) {
      const auto address = [&](TensorPlace place) { return (place.output ? run.outputs : run.inputs)[place.index]; };
      const Tensor& tensor = (step.source.output ? program_->outputs : program_->inputs)[step.source.index];
      copy(run, address(step.destination), address(step.source), bytes(tensor, run));
    } else {
      launch(run, step, *kernels_[i]);
    }
  }
}

void Operator::read_inputs(ort::KernelContext* context, Run& run) const {
  for (size_t i = 0; i < program_->inputs.size(); ++i) {
    const Tensor& tensor = program_->inputs[i];
    const ort::Value* value = nullptr;
    ort::TensorTypeAndShapeInfo* info = nullptr;
    int dtype = 0;
    size_t rank = 0;
    check(ort::call<ort::Status*>(api_, ort::kKernelContextGetInput, static_cast<const ort::KernelContext*>(context), i,
                                  &value));
    if (value == nullptr) refuse("input " + tensor.name + " is missing");
    check(ort::call<ort::Status*>(api_, ort::kGetTensorTypeAndShape, value, &info));
    ort::call<ort::Status*>(api_, ort::kGetTensorElementType, static_cast<const void*>(info), &dtype);
    ort::call<ort::Status*>(api_, ort::kGetDimensionsCount, static_cast<const void*>(info), &rank);
    std::vector<int64_t> shape(rank);
    ort::call<ort::Status*>(api_, ort::kGetDimensions, static_cast<const void*>(info), shape.data(), rank);
    ort::call<void>(api_, ort::kReleaseTensorTypeAndShapeInfo, info);
    if (dtype != tensor.dtype) {
      refuse("input " + tensor.name + " is of ONNX type " + std::to_string(dtype) + ", expected " +
             std::to_string(tensor.dtype));
    }
    if (rank != tensor.shape.size()) {
      refuse("input " + tensor.name + " has the shape " + shown(shape) + ", expected " +
             std::to_string(tensor.shape.size()) + " dimensions");
    }
    run.inputs.push_back(data(value, tensor.name));
    run.input_shapes.push_back(std::move(shape));
  }
}

void Operator::check_shapes(Run& run) const {
  for (size_t i = 0; i < program_->symbols.size(); ++i) {
    const Symbol& symbol = program_->symbols[i];
    const int64_t size = run.input_shapes[symbol.input][symbol.axis];
    if (size % symbol.divisor != 0) {
      refuse("input " + program_->inputs[symbol.input].name + " has the shape " +
             shown(run.input_shapes[symbol.input]) + ", expected a multiple of " + std::to_string(symbol.divisor) +
             " in dimension " + std::to_string(symbol.axis));
    }
    run.symbols.push_back(size / symbol.divisor);
  }
  for (size_t i = 0; i < program_->inputs.size(); ++i) {
    const Tensor& tensor = program_->inputs[i];
    std::vector<int64_t> expected;
    for (const Size& size : tensor.shape) expected.push_back(size.value(run.symbols));
    if (run.input_shapes[i] != expected) {
      refuse("input " + tensor.name + " has the shape " + shown(run.input_shapes[i]) + ", expected " + shown(expected));
    }
  }
}

void* Operator::data(const ort::Value* value, const std::string& name) const {
  void* address = nullptr;
  check(ort::call<ort::Status*>(api_, ort::kGetTensorMutableData, const_cast<ort::Value*>(value), &address));
  if (reinterpret_cast<uintptr_t>(address) % kAlignment != 0) {
    refuse("tensor " + name + " does not begin at a multiple of 16 bytes, which the kernels need");
  }
  return address;
}

size_t Operator::bytes(const Tensor& tensor, const Run& run) const {
  size_t count = tensor.bytes;
  for (const Size& size : tensor.shape) count *= static_cast<size_t>(size.value(run.symbols));
  return count;
}

void Operator::make_outputs(ort::KernelContext* context, Run& run) const {
  for (size_t i = 0; i < program_->outputs.size(); ++i) {
    const Tensor& tensor = program_->outputs[i];
    std::vector<int64_t> shape;
    for (const Size& size : tensor.shape) shape.push_back(size.value(run.symbols));
    ort::Value* value = nullptr;
    check(ort::call<ort::Status*>(api_, ort::kKernelContextGetOutput, context, i,
                                  static_cast<const int64_t*>(shape.data()), shape.size(), &value));
    if (value == nullptr) refuse("output " + tensor.name + " is missing");
    run.outputs.push_back(data(value, tensor.name));
    if (tensor.begins_as >= 0) {
      copy(run, run.outputs.back(), run.inputs[static_cast<size_t>(tensor.begins_as)], bytes(tensor, run));
    }
  }
}

void Operator::copy(Run& run, void* destination, const void* source, size_t bytes) const {
  if (destination == source || bytes == 0) return;
  Driver::get().copy(destination, source, bytes, run.stream);
  run.needs_barrier = true;
}

void Operator::launch(Run& run, const Step& step, const LoadedKernel& kernel) const {
  LaunchConfig config{};
  for (size_t i = 0; i < 3; ++i) {
    const int64_t size = step.grid[i].value(run.symbols);
    if (size == 0) return;
    if (size < 0 || size > 0x7fffffff) refuse(step.kernel + " would have a grid of " + std::to_string(size));
    config.grid[i] = static_cast<unsigned>(size);
    config.block[i] = i == 0 ? kernel.threads : 1;
  }
  struct Slot {
    union {
      void* pointer;
      int64_t integer;
      int32_t small;
      float number;
    };
  };
  std::vector<Slot> slots(step.arguments.size() + kernel.pointers);
  std::vector<void*> addresses(slots.size());
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i].pointer = nullptr;
    addresses[i] = &slots[i];
    if (i >= step.arguments.size()) continue;
    const Argument& argument = step.arguments[i];
    switch (argument.kind) {
      case Argument::kTensor:
        slots[i].pointer = (argument.tensor.output ? run.outputs : run.inputs)[argument.tensor.index];
        break;
      case Argument::kInt32: slots[i].small = static_cast<int32_t>(argument.integer[0].value(run.symbols)); break;
      case Argument::kInt64: slots[i].integer = argument.integer[0].value(run.symbols); break;
      case Argument::kFloat: slots[i].number = argument.number;
    }
  }
  // A kernel loads some tensors before it waits for the kernel in front of it. A copy in front must have ended.
  LaunchAttribute pdl{kProgrammaticStreamSerialization, 0, {}};
  pdl.value.flag = 1;
  config.attributes = &pdl;
  config.attribute_count = kernel.pdl && !run.needs_barrier ? 1 : 0;
  config.shared_bytes = kernel.shared_bytes;
  config.stream = run.stream;
  Driver::get().launch(config, kernel.function, addresses.data(), step.kernel);
  run.needs_barrier = false;
}

}  // namespace megalodon
