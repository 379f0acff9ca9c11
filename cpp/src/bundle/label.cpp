#include "bundle/label.hpp"

#include <cstdint>
#include <string_view>

#include "bundle/file.hpp"
#include "bundle/json.hpp"
#include "error.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char *kPrograms[] = {"prefill", "decode", "decode_one"}, *kStages[] = {"begin", "layer", "end"};
constexpr const char* kGraphs[] = {"prefill.onnx", "decode.onnx"};
constexpr std::string_view kMark = "megalodon-export";
constexpr const char* kExportTheBundle = "Export the bundle again.";

json read_label(const fs::path& path) {
  const MappedFile file(path);
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  std::uint64_t length = 0;
  const std::size_t tail = kMark.size() + sizeof length;
  if (text.size() >= tail) {
    for (std::size_t i = sizeof length; i-- > 0;) {
      length = (length << 8) | static_cast<unsigned char>(text[text.size() - tail + i]);
    }
  }
  if (!text.ends_with(kMark) || text.size() < tail || length > text.size() - tail) {
    throw bad_bundle(path.string() + ": a program with a label at its end expected, none found. " + kExportTheBundle);
  }
  return parse_json(text.substr(text.size() - tail - length, length), path, kExportTheBundle);
}

Error unreadable(const fs::path& path) {
  return bad_bundle(path.string() + ": its label cannot be read. " + kExportTheBundle);
}

json read_library_label(const fs::path& path) {
  const json label = read_label(path);
  if (!label.is_object() || !label.contains("origin") || !label["origin"].is_object() || !label.contains("stage") ||
      !label["stage"].is_object()) {
    throw unreadable(path);
  }
  return label;
}

}  // namespace

std::vector<std::string> library_names() {
  std::vector<std::string> names;
  for (const char* program : kPrograms) {
    for (const char* stage : kStages) names.push_back(std::string(program) + "_" + stage + ".so");
  }
  return names;
}

Labels read_labels(const fs::path& folder) {
  json first, stages;
  for (const char* program : kPrograms) {
    for (const char* stage : kStages) {
      const std::string name = std::string(program) + "_" + stage;
      const fs::path path = folder / "aoti" / (name + ".so");
      const json label = read_library_label(path);
      if (first.is_null()) first = label["origin"];
      if (label["origin"] != first || label["stage"].value("name", json()) != name ||
          label["stage"].value("library", json()) != name + ".so") {
        throw bad_bundle(path.string() + ": it belongs to another bundle or another stage. " + kExportTheBundle);
      }
      stages[program][stage] = label["stage"];
    }
  }
  const json torch = first.value("torch", json());
  if (!torch.is_string()) throw bad_bundle(folder.string() + ": its libraries do not name their torch. " + kExportTheBundle);
  return {{{"target", first.value("target", json())},
           {"limits", first.value("limits", json())},
           {"all_logits", first.value("all_logits", json())},
           {"package", "model.pt2"},
           {"stages", stages}},
          torch};
}

json read_graph_labels(const fs::path& folder) {
  json first;
  for (const char* name : kGraphs) {
    const fs::path path = folder / name;
    const json label = read_label(path);
    if (!label.is_object()) throw unreadable(path);
    if (first.is_null()) first = label;
    first["file"] = name;
    if (label != first) {
      throw bad_bundle(path.string() + ": it belongs to another bundle or another program. " + kExportTheBundle);
    }
  }
  return first;
}

}  // namespace megalodon::impl
