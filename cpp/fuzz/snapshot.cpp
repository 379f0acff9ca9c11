// Any bytes give a snapshot, which restores and can be taken again, or an Error. Their checksum is made right too, so that
// what comes after it is reached.
#include "generation/snapshot.hpp"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "error.hpp"

using namespace megalodon::impl;

namespace {

Manifest small_model() {
  const DType* float32 = dtype_by_name("float32");
  Manifest manifest{};
  manifest.model_id = "0123456789abcdef";
  manifest.vocab_size = 300;
  manifest.chunk = 2;
  manifest.cache = {{"layers.0.key", {1, 2, 2}, dtype_by_name("bfloat16"), 0.0, true, 8, 1},
                    {"layers.0.norm_var", {2}, float32, 1.0, false, 8},
                    {kPosition, {}, dtype_by_name("int64"), 0.0, false, 8}};
  return manifest;
}

std::vector<std::byte> sealed(std::vector<std::byte> bytes) {
  Safetensors content = parse_safetensors(bytes, "the snapshot");
  for (const char* key : {"format", "model", "pending"}) content.metadata.try_emplace(key);
  content.metadata["sha256"] = checksum(content);
  return write_safetensors(content);
}

void restore(const Manifest& manifest, const CacheView& cache, std::vector<std::byte> bytes) {
  const Snapshot snapshot = Snapshot::parse(std::move(bytes), "the snapshot");
  snapshot.check(manifest);
  snapshot.copy_to(manifest, cache);
  std::int64_t position = 0;
  std::memcpy(&position, cache.read(2, 0).data(), sizeof position);
  const Snapshot again = Snapshot::of(manifest, cache, position, snapshot.pending());
  const Snapshot parsed = Snapshot::parse({again.bytes().begin(), again.bytes().end()}, "again");
  parsed.check(manifest);
  if (parsed.pending() != snapshot.pending()) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Manifest manifest = small_model();
  static const std::unique_ptr<Device> device = open_device("cpu", "");
  const CacheView cache(std::make_shared<CacheBlock>(manifest.cache, *device, 1), 0, 1);
  cache.reset();
  const auto* start = reinterpret_cast<const std::byte*>(data);
  const std::vector<std::byte> bytes(start, start + size);
  try {
    restore(manifest, cache, bytes);
  } catch (const Error&) {
  }
  try {
    restore(manifest, cache, sealed(bytes));
  } catch (const Error&) {
  }
  return 0;
}
