// Labels of programs: what a manifest says about a library or an ONNX graph, at the end of the program's own file.
// Python writes them at export: `megalodon_export.bundles.labels`. Nothing here loads a program.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace megalodon::impl {

// The libraries of a bundle with AOTInductor programs, in its folder aoti.
std::vector<std::string> library_names();

struct Labels {
  nlohmann::json programs;  // what the manifest must say about the programs
  std::string torch;        // the version that compiled them
};

// Error MEGALODON_BAD_BUNDLE names a library that has no label, or that of another bundle.
Labels read_labels(const std::filesystem::path& folder);

// The label of a bundle's ONNX graphs, which differ in "file" alone. This library does not run them, but a manifest
// that contradicts them is refused here too. Error MEGALODON_BAD_BUNDLE as above.
nlohmann::json read_graph_labels(const std::filesystem::path& folder);

}  // namespace megalodon::impl
