// Parses JSON files of a bundle, by the rules of Python's `megalodon_export.bundles.strict_json`: UTF-8 without a byte
// order mark, unique keys, finite numbers, whole numbers of 64 bits, no lone surrogates, a bounded depth.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>

namespace megalodon::impl {

// The end of messages about a damaged bundle.
inline constexpr const char* kCopyAgain = "Copy the bundle again, or export it again.";

// Error MEGALODON_BAD_BUNDLE, which names `path` and ends with `advice`, if the text is not such JSON.
nlohmann::json parse_json(std::string_view text, const std::filesystem::path& path, const char* advice = kCopyAgain);

// Whether a string of the value, or a key, holds characters that a terminal obeys instead of showing them.
bool has_control_characters(const nlohmann::json& value);

}  // namespace megalodon::impl
