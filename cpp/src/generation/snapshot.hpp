// Snapshots: the state of a stream as a safetensors file. Python reads and writes the same files.
#pragma once

#include <filesystem>
#include <optional>
#include <vector>

#include "bundle/safetensors.hpp"
#include "runtime/cache.hpp"

namespace megalodon::impl {

class Snapshot {
 public:
  // Copies the state of one row. `pending` is a token that was generated but not fed yet.
  static Snapshot of(const Manifest& manifest, const CacheView& cache, std::optional<std::int64_t> pending);
  // Messages call the bytes `name`. Error MEGALODON_INVALID_ARGUMENT if they are not a snapshot.
  static Snapshot parse(std::vector<std::byte> bytes, const std::string& name);
  static Snapshot load(const std::filesystem::path& path);
  void save(const std::filesystem::path& path) const;

  // Overwrites the state of a row. Error MEGALODON_INVALID_ARGUMENT, with the row unchanged, if the snapshot is of
  // another model.
  void copy_to(const Manifest& manifest, const CacheView& cache) const;
  std::optional<std::int64_t> pending() const { return pending_; }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
  Safetensors content_;  // refers to `bytes_`; moving a vector does not move its elements
  std::optional<std::int64_t> pending_;
};

}  // namespace megalodon::impl
