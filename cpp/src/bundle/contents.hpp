// Opens a bundle: checks its files, then that its manifest says what follows from them.
#pragma once

#include <filesystem>

#include "bundle/manifest.hpp"

namespace megalodon::impl {

// The manifest of a bundle. First the files must be those that it lists; see `read_bundle`. Then what it says must follow
// from them: the model's config from config.json, the dtype and the layers from the weights, the programs from the labels
// of their libraries, and everything else from the config. Python's `megalodon_export.bundles.contents` makes the same
// checks in the same words. Error MEGALODON_BAD_BUNDLE names the first difference. Nothing native is loaded.
Manifest open_manifest(const std::filesystem::path& folder, bool check_hashes);

}  // namespace megalodon::impl
