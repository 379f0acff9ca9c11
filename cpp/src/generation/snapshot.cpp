#include "generation/snapshot.hpp"

#include <algorithm>
#include <cstring>

#include "error.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

constexpr const char* kFormat = "megalodon-export snapshot 2";
constexpr const char* kFormat1 = "megalodon-export snapshot 1";
constexpr std::int64_t kMaxPosition = (std::int64_t{1} << 53) - 1;  // every JSON reader and double hold it exactly
constexpr std::size_t kMaxDigits = 18;                              // of a pending token
constexpr std::size_t kSha256Digits = 64;

bool is_header_text(std::span<const std::byte> text) {
  return std::ranges::all_of(text, [](std::byte one) {
    const char c = static_cast<char>(one);
    return c >= ' ' && c <= '~' && c != '\\';
  });
}

std::span<const std::byte> header_of(std::span<const std::byte> bytes) {
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < sizeof length; ++i) length |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
  return bytes.subspan(sizeof length, length);
}

std::optional<std::int64_t> parse_pending(const std::string& text, const std::string& name) {
  if (text == "null") return std::nullopt;
  const bool is_number = !text.empty() && text.size() <= kMaxDigits && (text == "0" || text[0] != '0') &&
                         std::ranges::all_of(text, [](char c) { return c >= '0' && c <= '9'; });
  require(is_number, name + " is no whole snapshot: its pending token is " + repr(text) +
                         ", expected null or a token id");
  return std::stoll(text);
}

// Whether all elements are finite; integers are.
bool is_finite(const StoredTensor& tensor) {
  const auto all_finite = [&]<typename Bits>(Bits exponent) {
    std::size_t found = 0;
    for (std::size_t at = 0; at < tensor.data.size(); at += sizeof exponent) {
      Bits bits;
      std::memcpy(&bits, tensor.data.data() + at, sizeof bits);
      found += (bits & exponent) == exponent;
    }
    return found == 0;
  };
  if (tensor.dtype->name == "float32") return all_finite(std::uint32_t{0x7F800000});
  if (tensor.dtype->name == "bfloat16") return all_finite(std::uint16_t{0x7F80});
  return true;
}

bool has_negative(const StoredTensor& tensor) {
  for (std::size_t at = 0; at < tensor.data.size(); at += sizeof(float)) {
    float value = 0.0F;
    std::memcpy(&value, tensor.data.data() + at, sizeof value);
    if (value < 0.0F) return true;
  }
  return false;
}

std::vector<std::int64_t> batch_of_one(const CacheTensor& tensor) {
  std::vector<std::int64_t> shape{1};
  shape.insert(shape.end(), tensor.row_shape.begin(), tensor.row_shape.end());
  return shape;
}

// The axis of slots in the shape of a batch, for a ring.
std::size_t slot_axis(const CacheTensor& tensor) { return tensor.slot_axis + 1; }

void check_shape(const CacheTensor& tensor, const std::vector<std::int64_t>& found) {
  const std::vector<std::int64_t> shape = batch_of_one(tensor);
  bool right = found.size() == shape.size();
  std::vector<std::string> expected;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const bool slots = tensor.ring && i == slot_axis(tensor);
    right = right && (slots ? found[i] < shape[i] : found[i] == shape[i]);
    expected.push_back(slots ? "0.." + std::to_string(shape[i] - 1) : std::to_string(shape[i]));
  }
  require(right, tensor.name + " of the snapshot has the shape " + list_text(found) + ", expected [" +
                     with_commas(expected) + "]; take it again");
}

}  // namespace

std::string checksum(const Safetensors& content) {
  const auto& metadata = content.metadata;
  std::vector<std::string> texts{metadata.at("format") + "\n" + metadata.at("model") + "\n" + metadata.at("pending") +
                                 "\n"};
  for (const auto& [name, tensor] : content.tensors) {
    std::string shape;
    for (const std::int64_t size : tensor.shape) shape.append(shape.empty() ? "" : ",").append(std::to_string(size));
    texts.push_back(name + " " + std::string(tensor.dtype->name) + " " + shape + "\n");
  }
  std::vector<std::string_view> pieces{texts[0]};
  for (std::size_t i = 1; const auto& [name, tensor] : content.tensors) {
    pieces.emplace_back(texts[i++]);
    pieces.emplace_back(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
  }
  return sha256_of(pieces);
}

Snapshot Snapshot::of(const Manifest& manifest, const CacheView& cache, std::int64_t position,
                      std::optional<std::int64_t> pending) {
  Safetensors content;
  std::vector<std::vector<std::byte>> states;
  for (std::size_t i = 0; i < manifest.cache.size(); ++i) {
    const CacheTensor& tensor = manifest.cache[i];
    const std::int64_t slots = position % manifest.chunk;
    std::vector<std::int64_t> shape = batch_of_one(tensor);
    if (tensor.ring) shape[slot_axis(tensor)] = slots;
    content.tensors[tensor.name] = {tensor.dtype, shape, states.emplace_back(cache.read(i, slots))};
  }
  content.metadata = {{"format", kFormat},
                      {"model", manifest.model_id},
                      {"pending", pending ? std::to_string(*pending) : "null"},
                      {"sha256", std::string(kSha256Digits, '0')}};
  Snapshot snapshot;
  snapshot.bytes_ = write_safetensors(content);
  snapshot.content_ = parse_safetensors(snapshot.bytes_, "the snapshot");
  snapshot.pending_ = pending;
  snapshot.unsealed_ = std::make_unique<std::once_flag>();
  return snapshot;
}

Snapshot Snapshot::parse(std::vector<std::byte> bytes, const std::string& name) {
  Snapshot snapshot;
  snapshot.bytes_ = std::move(bytes);
  const std::string unreadable =
      name + " is no snapshot, or not a whole one: it cannot be read as a safetensors file";
  try {
    snapshot.content_ = parse_safetensors(snapshot.bytes_, name);
  } catch (const Error& error) {
    throw invalid(unreadable);
  }
  require(is_header_text(header_of(snapshot.bytes_)), unreadable);
  const auto& metadata = snapshot.content_.metadata;
  const auto format = metadata.find("format");
  const std::string found = format == metadata.end() ? "None" : repr(format->second);
  require(found != repr(std::string(kFormat1)),
          name + " is a snapshot of format 1, and this version reads format 2; take it again");
  require(found == repr(std::string(kFormat)),
          name + " is no snapshot: its format is " + found + ", expected " + repr(std::string(kFormat)));
  std::vector<std::string> keys;
  for (const auto& [key, value] : metadata) keys.push_back(key);
  const std::vector<std::string> expected{"format", "model", "pending", "sha256"};
  require(keys == expected, name + " is no whole snapshot: its metadata has " + with_commas(keys) + ", expected " +
                                with_commas(expected) + "; take it again");
  require(metadata.at("sha256") == checksum(snapshot.content_),
          name + " is damaged: its checksum is not that of its contents; copy it again, or take it again");
  snapshot.pending_ = parse_pending(metadata.at("pending"), name);
  return snapshot;
}

Snapshot Snapshot::load(const std::filesystem::path& path) {
  std::error_code error;
  require(!std::filesystem::exists(path, error) || std::filesystem::is_regular_file(path, error),
          path.string() + " is no snapshot: a regular file expected");
  const std::string content = read_file(path);
  const auto* data = reinterpret_cast<const std::byte*>(content.data());
  return parse({data, data + content.size()}, path.string());
}

std::span<const std::byte> Snapshot::bytes() const {
  if (!unsealed_) return bytes_;
  std::call_once(*unsealed_, [&] {
    const std::string digest = checksum(content_);
    const std::span header = header_of(bytes_);
    const std::string_view text(reinterpret_cast<const char*>(header.data()), header.size());
    const std::string key = R"("sha256":")";
    const std::size_t at = text.find(key) + key.size();
    // The bytes are this object's own. `const` callers see them only through this function.
    std::memcpy(const_cast<std::byte*>(header.data()) + at, digest.data(), digest.size());
  });
  return bytes_;
}

void Snapshot::check(const Manifest& manifest) const {
  require(content_.metadata.at("model") == manifest.model_id,
          "the snapshot is of another model; restore it in a session of the model that it is of");
  check_names(manifest);
  for (const CacheTensor& tensor : manifest.cache) check_shape(tensor, content_.tensors.at(tensor.name).shape);
  for (const CacheTensor& tensor : manifest.cache) {
    const DType* found = content_.tensors.at(tensor.name).dtype;
    require(found == tensor.dtype, tensor.name + " of the snapshot is " + std::string(found->name) + ", expected " +
                                       std::string(tensor.dtype->name) + "; take it again");
  }
  check_values(manifest);
  require(!pending_ || *pending_ < manifest.vocab_size,
          "the snapshot's pending token is " + std::to_string(pending_.value_or(0)) +
              ", expected none or a token id in 0.." + std::to_string(manifest.vocab_size - 1) + "; take it again");
}

void Snapshot::check_names(const Manifest& manifest) const {
  for (const CacheTensor& tensor : manifest.cache) {
    require(content_.tensors.contains(tensor.name), "the snapshot has no " + tensor.name + "; take it again");
  }
  for (const auto& [name, tensor] : content_.tensors) {
    require(std::ranges::find(manifest.cache, name, &CacheTensor::name) != manifest.cache.end(),
            "the snapshot has a tensor " + repr(name) + ", and the model's cache has none; take it again");
  }
}

void Snapshot::check_values(const Manifest& manifest) const {
  for (const CacheTensor& tensor : manifest.cache) {
    require(is_finite(content_.tensors.at(tensor.name)),
            tensor.name + " of the snapshot has values that are not finite; take it again");
  }
  for (const CacheTensor& tensor : manifest.cache) {
    require(!tensor.name.ends_with(kVariance) || !has_negative(content_.tensors.at(tensor.name)),
            tensor.name + " of the snapshot has a negative variance; take it again");
  }
  require(0 <= position() && position() <= kMaxPosition,
          std::string(kPosition) + " of the snapshot is " + std::to_string(position()) + ", expected 0.." +
              std::to_string(kMaxPosition) + "; take it again");
  for (const CacheTensor& tensor : manifest.cache) {
    if (!tensor.ring) continue;
    const std::int64_t found = content_.tensors.at(tensor.name).shape[slot_axis(tensor)];
    require(found == position() % manifest.chunk,
            tensor.name + " of the snapshot has " + std::to_string(found) + " slots, expected " +
                std::to_string(position() % manifest.chunk) + " of " + std::to_string(manifest.chunk) +
                " at position " + std::to_string(position()) + "; take it again");
  }
}

void Snapshot::copy_to(const Manifest& manifest, const CacheView& cache) const {
  for (std::size_t i = 0; i < manifest.cache.size(); ++i) {
    cache.write(i, position() % manifest.chunk, content_.tensors.at(manifest.cache[i].name).data);
  }
}

std::int64_t Snapshot::position() const {
  std::int64_t position = 0;
  std::memcpy(&position, content_.tensors.at(kPosition).data.data(), sizeof position);
  return position;
}

}  // namespace megalodon::impl
