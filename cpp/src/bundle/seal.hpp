// Seals of JSON files. A sealed file ends with the key "seal": the sha256 of the file, with zeros in its place.
// Python writes them: `megalodon_export.bundles.sealing`.
#pragma once

#include <string>

namespace megalodon::impl {

enum class Seal { none, broken, intact };

// Whether the file whose content is `text` ends with a seal, and whether the seal is that of its content.
Seal check_seal(std::string text);

}  // namespace megalodon::impl
