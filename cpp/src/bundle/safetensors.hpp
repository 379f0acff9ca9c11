// safetensors: the header is parsed with every bound checked; tensors lie in the file's bytes and are not copied.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bundle/file.hpp"
#include "runtime/tensor.hpp"

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

// `name` stands for the bytes in messages. Error MEGALODON_INVALID_ARGUMENT if they are no safetensors file.
Safetensors parse_safetensors(std::span<std::byte> bytes, const std::string& name);

// A file in memory; tensors of large elements first, so that all are aligned.
std::vector<std::byte> write_safetensors(const Safetensors& content);

}  // namespace megalodon::impl
