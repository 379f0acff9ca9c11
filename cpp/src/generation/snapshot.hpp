// Snapshots: the state of a stream as a safetensors file. Python reads and writes the same bytes.
//
// A snapshot holds the filled slots of each ring alone, position mod C of them. A ring is empty where a chunk ends, so a
// snapshot is small there.
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "bundle/safetensors.hpp"
#include "runtime/cache.hpp"

namespace megalodon::impl {

class Snapshot {
 public:
  // Copies the state of one row, at `position`. `pending` is a token that was generated but not fed yet.
  static Snapshot of(const Manifest& manifest, const CacheView& cache, std::int64_t position,
                     std::optional<std::int64_t> pending);
  // Messages call the bytes `name`. Error MEGALODON_INVALID_ARGUMENT unless they are a safetensors file of this format
  // with the right checksum. Python (megalodon_export/generation/snapshot_file.py) makes the same checks, in the same
  // order and words.
  static Snapshot parse(std::vector<std::byte> bytes, const std::string& name);
  static Snapshot load(const std::filesystem::path& path);
  void save(const std::filesystem::path& path) const { write_file(path, bytes()); }

  // Error MEGALODON_INVALID_ARGUMENT unless this is a state of the manifest's model. Python
  // (megalodon_export/generation/snapshot.py) makes the same checks, in the same order and words.
  void check(const Manifest& manifest) const;
  // Overwrites the state of a row with this one, which `check` has accepted.
  void copy_to(const Manifest& manifest, const CacheView& cache) const;
  std::optional<std::int64_t> pending() const { return pending_; }
  // The content of the snapshot's file.
  std::span<const std::byte> bytes() const;

 private:
  void check_names(const Manifest& manifest) const;
  void check_values(const Manifest& manifest) const;
  std::int64_t position() const;

  std::vector<std::byte> bytes_;
  Safetensors content_;  // refers to `bytes_`; moving a vector does not move its elements
  std::optional<std::int64_t> pending_;
  std::unique_ptr<std::once_flag> unsealed_;  // of a state copied from memory, whose checksum is made on first use
};

// The sha256 over everything that a restored session depends on: "format\nmodel\npending\n" and then, for each tensor in
// the order of its name, "NAME DTYPE D0,D1,...\n" and its data.
std::string checksum(const Safetensors& content);

}  // namespace megalodon::impl
