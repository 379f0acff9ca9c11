#include "runtime/weights.hpp"

#include "error.hpp"

namespace megalodon::impl {

const WeightStore::File& WeightStore::open(const std::string& name) {
  const auto found = files_.find(name);
  if (found != files_.end()) return found->second;
  File file{std::make_unique<MappedFile>(folder_ / name), {}};
  try {
    file.content = parse_safetensors(file.mapped->bytes(), (folder_ / name).string());
  } catch (const Error& error) {
    throw inconsistent(error.what());
  }
  return files_.emplace(name, std::move(file)).first->second;
}

Tensor WeightStore::find(const StageInput& input, std::int64_t layer) {
  const StoredTensor& tensor = open(input.file).content.tensors.at(numbered(input.tensor, layer));
  std::byte* data = tensor.data.data();
  if (std::string(device_.type()) != "cpu") {
    auto copy = gpu_copies_.find(data);
    if (copy == gpu_copies_.end()) {
      copy = gpu_copies_.emplace(data, DeviceMemory(device_, tensor.data.size())).first;
      device_.copy(copy->second.data(), data, tensor.data.size());
    }
    data = copy->second.data();
  }
  return device_.tensor_over(data, tensor.shape, *tensor.dtype);
}

}  // namespace megalodon::impl
