// The bundle on disk, checked before anything in it is used: as megalodon_export/bundle.py, with the same messages.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>

namespace megalodon::impl {

inline constexpr int kSchemaVersion = 2;

// The manifest, after checking that the folder holds exactly the files it lists, unchanged. `check_hashes` false trusts
// contents of the right size. Error MEGALODON_BAD_BUNDLE lists up to ten problems.
nlohmann::json read_bundle(const std::filesystem::path& folder, bool check_hashes);

// A JSON text; Error MEGALODON_BAD_BUNDLE, with the path in it, for anything else, and for depths that nobody needs.
nlohmann::json parse_json(std::string_view text, const std::filesystem::path& path);

}  // namespace megalodon::impl
