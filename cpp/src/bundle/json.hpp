// Parses JSON files of a bundle.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>

namespace megalodon::impl {

// The end of messages about a damaged bundle.
inline constexpr const char* kCopyAgain = "Copy the bundle again, or export it again.";

// Error MEGALODON_BAD_BUNDLE, which names `path`, if the text is not JSON or is nested more than 900 levels deep.
nlohmann::json parse_json(std::string_view text, const std::filesystem::path& path);

}  // namespace megalodon::impl
