// Any bytes give a snapshot, which restores and can be taken again, or an Error.
#include "generation/snapshot.hpp"

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "error.hpp"

using namespace megalodon::impl;

namespace {

Manifest small_model() {
  const DType* float32 = dtype_by_name("float32");
  Manifest manifest{};
  manifest.layout_id = "0123456789abcdef";
  manifest.cache = {{"layers.0.key", {1, 2, 2}, dtype_by_name("bfloat16"), 0.0, true, 8},
                    {"layers.0.norm_var", {2}, float32, 1.0, false, 8},
                    {kPosition, {}, dtype_by_name("int64"), 0.0, false, 8}};
  return manifest;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Manifest manifest = small_model();
  static const std::unique_ptr<Device> device = open_device("cpu", "");
  const CacheView cache(std::make_shared<CacheBlock>(manifest.cache, *device, 1), 0, 1);
  cache.reset();
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  try {
    const Snapshot snapshot = Snapshot::parse({bytes, bytes + size}, "the snapshot");
    snapshot.copy_to(manifest, cache);
    const Snapshot again = Snapshot::of(manifest, cache, snapshot.pending());
    if (again.pending() != snapshot.pending()) std::abort();
  } catch (const Error&) {
  }
  return 0;
}
