// Any bytes give tensors that lie inside the file and that survive writing and reading again, or an Error.
#include "bundle/safetensors.hpp"

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "error.hpp"

using namespace megalodon::impl;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  std::vector<std::byte> file(bytes, bytes + size);
  try {
    const Safetensors content = parse_safetensors(file, "file");
    for (const auto& [name, tensor] : content.tensors) {
      if (tensor.data.data() < file.data() || tensor.data.data() + tensor.data.size() > file.data() + size)
        std::abort();
    }
    std::vector<std::byte> written = write_safetensors(content);
    const Safetensors again = parse_safetensors(written, "again");
    if (again.tensors.size() != content.tensors.size() || again.metadata != content.metadata) std::abort();
  } catch (const Error&) {
  }
  return 0;
}
