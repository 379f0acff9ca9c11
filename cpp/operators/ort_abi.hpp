// The part of ONNX Runtime's C ABI that this library uses. ONNX Runtime's Python packages come without headers.
//
// OrtApi is a table of functions that only grows, so a function keeps its index. Version 18 of the table (ONNX Runtime
// 1.18) has all that is used here. The layout and the indices are those of onnxruntime_c_api.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megalodon::ort {

constexpr uint32_t kApiVersion = 18;
constexpr int kFail = 1;                       // ORT_FAIL
constexpr int kVariadic = 2;                   // INPUT_OUTPUT_VARIADIC
constexpr int kAnyType = 0;                    // ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED
constexpr int kMaxVersion = 0x7fffffff;

// Indices of functions in OrtApi.
enum Function : size_t {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeString = 87,
  kKernelContextGetInputCount = 88,
  kKernelContextGetOutputCount = 89,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelContextGetGpuComputeStream = 193,
};

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorTypeAndShapeInfo;
struct ShapeInferContext;
using Api = const void* const;  // an entry of the table

// OrtApiBase.
struct ApiBase {
  Api*(*get_api)(uint32_t version);
  const char* (*version)();
};

// OrtCustomOp: 26 fields, 208 bytes. The runtime calls the two creation functions and the two compute functions of
// version 16 and later; the older ones stay empty.
struct CustomOp {
  uint32_t version;
  void* create_kernel;
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider)(const CustomOp*);
  int (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  int (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void* compute;
  void (*destroy_kernel)(void*);
  int (*get_input_characteristic)(const CustomOp*, size_t);
  int (*get_output_characteristic)(const CustomOp*, size_t);
  int (*get_input_memory_type)(const CustomOp*, size_t);
  int (*get_least_inputs)(const CustomOp*);
  int (*get_inputs_homogeneous)(const CustomOp*);
  int (*get_least_outputs)(const CustomOp*);
  int (*get_outputs_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, Api* api, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_shapes)(const CustomOp*, ShapeInferContext*);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  size_t (*get_may_inplace)(int** inputs, int** outputs);
  void (*release_may_inplace)(int* inputs, int* outputs);
  size_t (*get_alias_map)(int** inputs, int** outputs);
  void (*release_alias_map)(int* inputs, int* outputs);
};
static_assert(sizeof(CustomOp) == 208, "OrtCustomOp has 26 fields");

// A function of the table, with the types of its result and its arguments.
template <typename Result, typename... Arguments>
Result call(Api* api, Function index, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api[index]))(arguments...);
}

}  // namespace megalodon::ort
