#include "bundle/dtype.hpp"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>

namespace megalodon::impl {
namespace {

constexpr std::array kDTypes{
    DType{"float32", "F32", 4, aoti_torch_dtype_float32}, DType{"bfloat16", "BF16", 2, aoti_torch_dtype_bfloat16},
    DType{"float64", "F64", 8, aoti_torch_dtype_float64}, DType{"float16", "F16", 2, aoti_torch_dtype_float16},
    DType{"int64", "I64", 8, aoti_torch_dtype_int64},     DType{"int32", "I32", 4, aoti_torch_dtype_int32},
    DType{"int16", "I16", 2, aoti_torch_dtype_int16},     DType{"int8", "I8", 1, aoti_torch_dtype_int8},
    DType{"uint8", "U8", 1, aoti_torch_dtype_uint8},      DType{"bool", "BOOL", 1, aoti_torch_dtype_bool},
};

}  // namespace

const DType* dtype_by_name(std::string_view name) {
  const auto found = std::ranges::find(kDTypes, name, &DType::name);
  return found == kDTypes.end() ? nullptr : &*found;
}

const DType* dtype_by_safetensors_name(std::string_view name) {
  const auto found = std::ranges::find(kDTypes, name, &DType::safetensors);
  return found == kDTypes.end() ? nullptr : &*found;
}

std::string dtype_text(std::int32_t torch_number) {
  const auto has_number = [&](const DType& dtype) { return dtype.torch_number() == torch_number; };
  const auto found = std::ranges::find_if(kDTypes, has_number);
  return found == kDTypes.end() ? "dtype " + std::to_string(torch_number) : std::string(found->name);
}

}  // namespace megalodon::impl
