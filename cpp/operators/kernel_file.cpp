#include "kernel_file.hpp"

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

#include "driver.hpp"
#include "refusal.hpp"

namespace megalodon {
namespace {

constexpr const char* kFile = "onnx_kernels.bin";
constexpr int kPtx = 0;

// The folder of this library.
std::filesystem::path own_folder() {
  static const int here = 0;
#ifdef _WIN32
  HMODULE module = nullptr;
  wchar_t name[32768];
  const DWORD flags = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
  GetModuleHandleExW(flags, reinterpret_cast<LPCWSTR>(&here), &module);
  GetModuleFileNameW(module, name, 32768);
  return std::filesystem::path(name).parent_path();
#else
  Dl_info info;
  if (dladdr(&here, &info) == 0) throw Refusal("the operator library does not find its own file");
  return std::filesystem::absolute(info.dli_fname).parent_path();
#endif
}

int architecture(const std::string& text) {
  if (text == "ptx") return kPtx;
  if (text.rfind("sm_", 0) != 0) throw Refusal("no architecture: " + text);
  return std::stoi(text.substr(3));
}

}  // namespace

KernelFile& KernelFile::get() {
  static KernelFile file;
  return file;
}

KernelFile::KernelFile() : path_((own_folder() / kFile).string()) {
  std::ifstream file(path_, std::ios::binary);
  if (!file) throw Refusal(path_ + " cannot be read: it lies beside the operator library in the bundle");
  data_.assign(std::istreambuf_iterator<char>(file), {});
  std::istringstream head(std::string(data_.begin(), data_.begin() + std::min<size_t>(data_.size(), 64)));
  std::string format;
  int version = 0;
  size_t start = 0;
  head >> format >> version >> start;
  if (!head || format != "megalodon-kernels" || version != 1 || start > data_.size()) {
    throw Refusal(path_ + " is no file of kernels that this library reads; export the bundle again");
  }
  read_lines(std::string(data_.begin(), data_.begin() + start), start);
}

void KernelFile::read_lines(const std::string& lines, size_t start) {
  std::istringstream text(lines);
  std::string line;
  std::getline(text, line);  // the head
  while (std::getline(text, line)) {
    if (line.empty()) continue;
    std::istringstream words(line);
    std::string kind, name, arch;
    Code code{};
    words >> kind >> name >> code.symbol >> arch >> code.offset >> code.size >> code.kernel.shared_bytes >>
        code.kernel.threads >> code.kernel.pointers >> code.kernel.pdl;
    const size_t room = data_.size() - start;
    if (!words || kind != "kernel" || code.offset > room || code.size > room - code.offset) {
      throw Refusal(path_ + " is damaged: " + line);
    }
    code.offset += start;
    code.kernel.name = name;
    kernels_[name][architecture(arch)] = code;
  }
}

const KernelFile::Code& KernelFile::choose(const std::string& name, int gpu) const {
  const auto found = kernels_.find(name);
  if (found == kernels_.end()) throw Refusal(path_ + " has no kernel " + name + "; it is of another export");
  const std::map<int, Code>& codes = found->second;
  if (const auto exact = codes.find(gpu); exact != codes.end()) return exact->second;
  // Machine code of sm_80 to sm_89 runs on later GPUs of that family. Later architectures' code is for one alone.
  auto older = codes.lower_bound(gpu);
  if (gpu / 10 == 8 && older != codes.begin() && (--older)->first / 10 == 8) return older->second;
  const auto ptx = codes.find(kPtx);
  const int oldest = codes.upper_bound(kPtx) == codes.end() ? 0 : codes.upper_bound(kPtx)->first;
  if (ptx == codes.end() || gpu < oldest) {
    throw Refusal("the kernels are for GPUs from sm_" + std::to_string(oldest) + " on, this one is sm_" +
                  std::to_string(gpu) + "; export the bundle with --kernels for it, or use the plain graphs");
  }
  return ptx->second;
}

const LoadedKernel& KernelFile::load(const std::string& name) {
  const Driver& driver = Driver::get();
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto key = std::make_pair(driver.context(), name);
  if (const auto found = loaded_.find(key); found != loaded_.end()) return found->second;
  const Code& code = choose(name, driver.compute_capability());
  LoadedKernel kernel = code.kernel;
  kernel.function = driver.load(data_.data() + code.offset, code.symbol, kernel.shared_bytes, name);
  return loaded_.emplace(key, kernel).first->second;
}

}  // namespace megalodon
