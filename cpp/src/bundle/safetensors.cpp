#include "bundle/safetensors.hpp"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "bundle/json.hpp"
#include "error.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxHeader = 100'000'000;  // the format's own limit

bool is_size(const json& value) { return value.is_number_integer() && value >= 0; }

// Reads the entry of one tensor. False if it is malformed or its data lies outside `data`.
bool read_entry(const json& entry, std::span<std::byte> data, StoredTensor& tensor) {
  if (!entry.is_object() || entry.size() != 3) return false;
  const json dtype = entry.value("dtype", json()), shape = entry.value("shape", json());
  const json offsets = entry.value("data_offsets", json());
  if (!dtype.is_string() || !shape.is_array() || !offsets.is_array() || offsets.size() != 2) return false;
  tensor.dtype = dtype_by_safetensors_name(dtype.get_ref<const std::string&>());
  if (tensor.dtype == nullptr || !is_size(offsets[0]) || !is_size(offsets[1])) return false;
  std::uint64_t bytes = tensor.dtype->size;
  for (const json& size : shape) {
    if (!is_size(size)) return false;
    const auto value = size.get<std::uint64_t>();
    if (__builtin_mul_overflow(bytes, value, &bytes) || bytes > INT64_MAX) return false;
    tensor.shape.push_back(static_cast<std::int64_t>(value));
  }
  const auto begin = offsets[0].get<std::uint64_t>(), end = offsets[1].get<std::uint64_t>();
  if (begin > end || end > data.size() || end - begin != bytes) return false;
  tensor.data = data.subspan(begin, bytes);
  return true;
}

// The format demands that tensors fill the data without holes and without shared bytes.
bool fill_data(const std::map<std::string, StoredTensor>& tensors, std::span<std::byte> data) {
  std::vector<std::span<std::byte>> ranges;
  for (const auto& [name, tensor] : tensors) ranges.push_back(tensor.data);
  std::ranges::sort(ranges, {}, [](const auto& range) { return std::pair(range.data(), range.size()); });
  const std::byte* end = data.data();
  for (const auto& range : ranges) {
    if (range.data() != end) return false;
    end += range.size();
  }
  return end == data.data() + data.size();
}

}  // namespace

Safetensors parse_safetensors(std::span<std::byte> bytes, const std::string& name) {
  const auto broken = [&](const std::string& why) { return invalid(name + " is no safetensors file: " + why); };
  std::uint64_t length = 0;
  if (bytes.size() < sizeof length) throw broken("it is shorter than a header");
  for (std::size_t i = 0; i < sizeof length; ++i) length |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
  if (length > std::min<std::uint64_t>(kMaxHeader, bytes.size() - sizeof length)) {
    throw broken("a header of " + std::to_string(length) + " bytes does not fit");
  }
  const auto* text = reinterpret_cast<const char*>(bytes.data() + sizeof length);
  json header;
  try {
    header = parse_json({text, length}, name);
  } catch (const Error& error) {
    throw broken("its header is not JSON");
  }
  if (!header.is_object()) throw broken("its header is not a JSON object");
  const std::span<std::byte> data = bytes.subspan(sizeof length + length);
  Safetensors content;
  for (const auto& [key, entry] : header.items()) {
    if (key == "__metadata__") {
      if (!entry.is_object()) throw broken("its metadata is not a JSON object");
      for (const auto& [field, value] : entry.items()) {
        if (!value.is_string()) throw broken("its metadata has values that are not strings");
        content.metadata[field] = value;
      }
    } else if (!read_entry(entry, data, content.tensors[key])) {
      throw broken("the entry of " + key + " is not one of a tensor inside the file");
    }
  }
  if (!fill_data(content.tensors, data)) throw broken("its tensors do not fill the file");
  return content;
}

std::vector<std::byte> write_safetensors(const Safetensors& content) {
  std::vector<std::pair<std::string, const StoredTensor*>> order;
  for (const auto& [name, tensor] : content.tensors) order.emplace_back(name, &tensor);
  std::ranges::stable_sort(order, std::greater{}, [](const auto& one) { return one.second->dtype->size; });
  nlohmann::ordered_json header;
  if (!content.metadata.empty()) header["__metadata__"] = content.metadata;
  std::size_t size = 0;
  for (const auto& [name, tensor] : order) {
    nlohmann::ordered_json entry;
    entry["dtype"] = tensor->dtype->safetensors;
    entry["shape"] = tensor->shape;
    entry["data_offsets"] = {size, size + tensor->data.size()};
    header[name] = entry;
    size += tensor->data.size();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::vector<std::byte> bytes(8 + text.size() + size);
  for (std::size_t i = 0; i < 8; ++i) bytes[i] = static_cast<std::byte>(text.size() >> (8 * i));
  std::memcpy(bytes.data() + 8, text.data(), text.size());
  std::byte* end = bytes.data() + 8 + text.size();
  for (const auto& [name, tensor] : order) {
    if (!tensor->data.empty()) std::memcpy(end, tensor->data.data(), tensor->data.size());
    end += tensor->data.size();
  }
  return bytes;
}

}  // namespace megalodon::impl
