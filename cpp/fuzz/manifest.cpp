// Any bytes give a consistent manifest, or an Error.
#include "bundle/manifest.hpp"

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>

#include "bundle/folder.hpp"
#include "bundle/json.hpp"
#include "error.hpp"

using namespace megalodon::impl;
using nlohmann::json;

namespace {

const std::filesystem::path& folder() {
  static const std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("megalodon-fuzz-" + std::to_string(getpid()));
  std::filesystem::create_directories(path);
  return path;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    std::ofstream(folder() / "manifest.json") << text;
    read_bundle(folder(), true);
  } catch (const Error&) {
  }
  try {
    const json manifest = parse_json(text, "manifest.json");
    if (!manifest.is_object() || !manifest.contains("files") || !manifest["files"].is_object()) return 0;
    const Manifest found = read_manifest("bundle", manifest);
    if (found.max_batch < 1 || found.max_length % found.length_multiple != 0) std::abort();
  } catch (const Error&) {
  }
  return 0;
}
