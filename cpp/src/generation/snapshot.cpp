#include "generation/snapshot.hpp"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>

#include "error.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

constexpr const char* kFormat = "megalodon-export snapshot 1";

// Rounds to nearest, ties to even, as torch does. NaN stays NaN.
std::uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7FC0;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Copies elements and converts between float32 and bfloat16, so that a model in either can restore states of the other.
void copy_converted(std::span<std::byte> to, const DType& to_dtype, std::span<const std::byte> from) {
  if (to.size() == from.size()) {
    if (!to.empty()) std::memcpy(to.data(), from.data(), to.size());
    return;
  }
  const std::size_t count = to.size() / to_dtype.size;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint16_t narrow = 0;
    float wide = 0.0F;
    if (to_dtype.size == sizeof wide) {
      std::memcpy(&narrow, from.data() + i * sizeof narrow, sizeof narrow);
      wide = std::bit_cast<float>(static_cast<std::uint32_t>(narrow) << 16);
      std::memcpy(to.data() + i * sizeof wide, &wide, sizeof wide);
    } else {
      std::memcpy(&wide, from.data() + i * sizeof wide, sizeof wide);
      narrow = to_bfloat16(wide);
      std::memcpy(to.data() + i * sizeof narrow, &narrow, sizeof narrow);
    }
  }
}

bool is_float(const DType& dtype) { return dtype.name == "float32" || dtype.name == "bfloat16"; }

// Whether a stored tensor has the shape of a row of the cache tensor, and its dtype or one that can be converted to it.
bool fits(const StoredTensor& stored, const CacheTensor& tensor) {
  const bool convertible = stored.dtype == tensor.dtype || (is_float(*stored.dtype) && is_float(*tensor.dtype));
  return convertible && stored.shape.size() == tensor.row_shape.size() + 1 && stored.shape[0] == 1 &&
         std::ranges::equal(std::span(stored.shape).subspan(1), tensor.row_shape);
}

std::optional<std::int64_t> parse_pending(const std::string& text, const std::string& name) {
  if (text == "null") return std::nullopt;
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  require(error == std::errc() && end == text.data() + text.size(),
          name + " is no snapshot: its pending token is " + repr(text) + ", expected a whole number or null");
  return value;
}

}  // namespace

Snapshot Snapshot::of(const Manifest& manifest, const CacheView& cache, std::optional<std::int64_t> pending) {
  Safetensors content;
  std::vector<std::vector<std::byte>> states;
  for (std::size_t i = 0; i < manifest.cache.size(); ++i) {
    const CacheTensor& tensor = manifest.cache[i];
    std::vector<std::int64_t> shape{1};
    shape.insert(shape.end(), tensor.row_shape.begin(), tensor.row_shape.end());
    content.tensors[tensor.name] = {tensor.dtype, shape, states.emplace_back(cache.read(i))};
  }
  content.metadata = {
      {"format", kFormat}, {"model", manifest.layout_id}, {"pending", pending ? std::to_string(*pending) : "null"}};
  return parse(write_safetensors(content), "the snapshot");
}

Snapshot Snapshot::parse(std::vector<std::byte> bytes, const std::string& name) {
  Snapshot snapshot;
  snapshot.bytes_ = std::move(bytes);
  try {
    snapshot.content_ = parse_safetensors(snapshot.bytes_, name);
  } catch (const Error& error) {
    throw invalid(name + " is no snapshot, or not a whole one: " + error.what());
  }
  const auto& metadata = snapshot.content_.metadata;
  const auto format = metadata.find("format");
  if (format == metadata.end() || format->second != kFormat) {
    throw invalid(name + " is no snapshot: its format is " +
                  (format == metadata.end() ? "None" : repr(format->second)) + ", expected " +
                  repr(std::string(kFormat)));
  }
  const auto pending = metadata.find("pending");
  require(pending != metadata.end() && metadata.contains("model"),
          name + " is no snapshot: it does not say of which model it is, or what is pending");
  snapshot.pending_ = parse_pending(pending->second, name);
  return snapshot;
}

Snapshot Snapshot::load(const std::filesystem::path& path) {
  const std::string content = read_file(path);
  const auto* data = reinterpret_cast<const std::byte*>(content.data());
  return parse({data, data + content.size()}, path.string());
}

void Snapshot::save(const std::filesystem::path& path) const { write_file(path, bytes_); }

void Snapshot::copy_to(const Manifest& manifest, const CacheView& cache) const {
  require(content_.metadata.at("model") == manifest.layout_id,
          "the snapshot is of a model with another cache layout; restore it in a session of that model");
  for (const CacheTensor& tensor : manifest.cache) {
    const auto found = content_.tensors.find(tensor.name);
    require(found != content_.tensors.end() && fits(found->second, tensor),
            "the snapshot has no " + tensor.name + " as the model's; take it again");
  }
  for (std::size_t i = 0; i < manifest.cache.size(); ++i) {
    const StoredTensor& stored = content_.tensors.at(manifest.cache[i].name);
    std::vector<std::byte> state(cache.memory(i).size());
    copy_converted(state, *manifest.cache[i].dtype, stored.data);
    cache.write(i, state);
  }
}

}  // namespace megalodon::impl
