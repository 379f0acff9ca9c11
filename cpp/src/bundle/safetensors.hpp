// Reads and writes safetensors files. The reader checks every bound in the header. It does not copy tensors: they refer
// to the bytes of the file.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bundle/dtype.hpp"
#include "bundle/file.hpp"

namespace megalodon::impl {

struct StoredTensor {
  const DType* dtype;
  std::vector<std::int64_t> shape;
  std::span<std::byte> data;
};

struct Safetensors {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Messages call the bytes `name`. Error MEGALODON_INVALID_ARGUMENT if they are not a safetensors file.
Safetensors parse_safetensors(std::span<std::byte> bytes, const std::string& name);

// The bytes of a file. Tensors of large elements come first, as the safetensors library orders them, so that every tensor
// is aligned.
std::vector<std::byte> write_safetensors(const Safetensors& content);

}  // namespace megalodon::impl
