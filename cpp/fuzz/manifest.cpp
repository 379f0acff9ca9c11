// Any bytes are a manifest that makes sense, or an Error; as if of this machine, so that what is fuzzed is reached.
#include "bundle/manifest.hpp"

#include <sys/utsname.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>

#include "bundle/folder.hpp"
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

void make_local(json& manifest) {
  utsname name{};
  uname(&name);
  const json target{{"device", "cpu"}, {"architecture", name.machine}, {"cpu_features", json::array()}};
  try {
    manifest.at("versions").at("torch") = torch_version();
    manifest.at("programs").at("aoti").at("target") = target;
  } catch (const json::exception&) {  // it has no such parts
  }
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
    json manifest = parse_json(text, "manifest.json");
    if (!manifest.is_object() || !manifest.contains("files") || !manifest["files"].is_object()) return 0;
    make_local(manifest);
    const Manifest found = read_manifest("bundle", manifest);
    if (found.max_batch < 1 || found.max_length % found.granule != 0) std::abort();
  } catch (const Error&) {
  }
  return 0;
}
