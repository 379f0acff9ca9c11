#include "runtime/target.hpp"

#include <sys/utsname.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include "error.hpp"
#include "python_format.hpp"
#include "runtime/tensor.hpp"

namespace megalodon::impl {
namespace {

std::string machine() {
  utsname name{};
  uname(&name);
  return name.machine;
}

std::set<std::string> cpu_features() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("flags") && !line.starts_with("Features")) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    return {std::istream_iterator<std::string>(words), {}};
  }
  return {};
}

std::string minor_version(const std::string& version) {
  return version.substr(0, version.find('.', version.find('.') + 1));
}

}  // namespace

void check_target(const Target& target) {
  const std::string start = "the AOTInductor programs ";
  if (const std::string here = torch_version(); minor_version(target.torch) != minor_version(here)) {
    throw unavailable(start + "were compiled with torch " + target.torch + ", this is " + here + kExportAgain);
  }
  if (target.device == "cuda") return;
  if (target.device != "cpu") {
    throw unavailable(
        start + "are for " + target.device +
        ", and this library runs those for cpu and cuda; export it again: megalodon-export aoti --device");
  }
  if (target.architecture != machine()) {
    throw unavailable(start + "are for " + target.architecture + ", this is " + machine() + kExportAgain);
  }
  std::vector<std::string> missing;
  const std::set<std::string> features = cpu_features();
  std::ranges::copy_if(target.cpu_features, std::back_inserter(missing),
                       [&](const std::string& feature) { return !features.contains(feature); });
  std::ranges::sort(missing);
  if (!missing.empty()) {
    throw unavailable(start + "use CPU instructions that this machine lacks (" + with_commas(missing) + ")" +
                      kExportAgain + ", or export with --portable");
  }
}

}  // namespace megalodon::impl
