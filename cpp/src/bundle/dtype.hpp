// Element types, by their names in torch and in safetensors files, and by their numbers in libtorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace megalodon::impl {

struct DType {
  std::string_view name;           // torch's name: "bfloat16"
  std::string_view safetensors;    // the name in a safetensors header: "BF16"
  std::size_t size;                // bytes of an element
  std::int32_t (*torch_number)();  // libtorch's number for it
};

const DType* dtype_by_name(std::string_view name);              // null for an unknown name
const DType* dtype_by_safetensors_name(std::string_view name);  // null for an unknown name
std::string dtype_text(std::int32_t torch_number);

}  // namespace megalodon::impl
