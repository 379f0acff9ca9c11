// Snapshots: the state of a stream as the bytes of a safetensors file, which the Python package reads and writes too.
#pragma once

#include <filesystem>
#include <optional>
#include <vector>

#include "bundle/safetensors.hpp"
#include "runtime/cache.hpp"

namespace megalodon::impl {

class Snapshot {
 public:
  // A copy of one row.
  static Snapshot of(const Manifest& manifest, const CacheView& cache, std::optional<std::int64_t> pending);
  // Error MEGALODON_INVALID_ARGUMENT if the bytes are no snapshot; `name` stands for them in messages.
  static Snapshot parse(std::vector<std::byte> bytes, const std::string& name);
  static Snapshot load(const std::filesystem::path& path);
  void save(const std::filesystem::path& path) const;

  // Puts the state into a row; MEGALODON_INVALID_ARGUMENT, before anything is changed, if it is another model's.
  void copy_to(const Manifest& manifest, const CacheView& cache) const;
  std::optional<std::int64_t> pending() const { return pending_; }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
  Safetensors content_;  // in the bytes, which a move leaves where they are
  std::optional<std::int64_t> pending_;
};

}  // namespace megalodon::impl
