// Checks the folder of a bundle against its manifest before anything in it is used.
// Python's `megalodon_export.bundles` makes the same checks and reports them with the same messages.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>

namespace megalodon::impl {

inline constexpr int kSchemaVersion = 4;

// Returns the manifest if the folder holds exactly the files that it lists, with the sizes and the sha256 that it
// lists. With `check_hashes` false, the sizes alone are checked. Error MEGALODON_BAD_BUNDLE lists up to ten problems.
nlohmann::json read_bundle(const std::filesystem::path& folder, bool check_hashes);

}  // namespace megalodon::impl
