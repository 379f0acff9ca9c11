#include "bundle/folder.hpp"

#include <algorithm>
#include <atomic>
#include <map>
#include <set>
#include <thread>
#include <vector>

#include "bundle/file.hpp"
#include "bundle/json.hpp"
#include "bundle/seal.hpp"
#include "error.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kManifest = "manifest.json";
constexpr const char* kParity = "parity.json";
constexpr std::size_t kMaxProblems = 10;

using Problems = std::map<std::string, std::string>;  // one per file, ordered by file name

struct FolderContent {
  std::map<std::string, fs::path> files;
  Problems irregular;  // links, devices, pipes and sockets
};

FolderContent scan(const fs::path& root) {
  FolderContent found;
  std::vector<fs::path> folders{root};
  while (!folders.empty()) {
    const fs::path folder = folders.back();
    folders.pop_back();
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
      const std::string name = entry.path().lexically_relative(root).generic_string();
      if (entry.is_symlink()) {
        found.irregular[name] = "a regular file expected, a symbolic link found; copy with `cp -rL`";
      } else if (entry.is_directory()) {
        folders.push_back(entry.path());
      } else if (entry.is_regular_file()) {
        found.files[name] = entry.path();
      } else {
        found.irregular[name] = "a regular file expected, a device, pipe or socket found";
      }
    }
  }
  return found;
}

json load_manifest(const fs::path& root) {
  const fs::path path = root / kManifest;
  if (!fs::is_directory(root)) {
    const std::string what = fs::exists(root) ? "a file" : "nothing";
    throw bad_bundle(root.string() + ": a bundle folder expected, " + what + " found.");
  }
  const fs::file_status status = fs::symlink_status(path);
  if (!fs::is_regular_file(status)) {
    const std::string what = fs::is_symlink(status) ? "is a symbolic link" : "is missing";
    throw bad_bundle(root.string() + " is not a complete bundle: " + kManifest + " " + what + ". " + kCopyAgain);
  }
  if (const auto size = size_of(path); !size.why_not.empty()) {
    throw bad_bundle(path.string() + ": a JSON object expected, found something unreadable (" + size.why_not + "). " +
                     kCopyAgain);
  }
  const std::string text = read_file(path);
  const Seal seal = check_seal(text);
  if (seal == Seal::broken) {
    throw bad_bundle(path.string() + ": its seal does not match its content, so it was damaged or edited. " +
                     kCopyAgain);
  }
  json manifest = parse_json(text, path);
  if (has_control_characters(manifest)) {
    throw bad_bundle(path.string() + ": a JSON object expected, found something unreadable (a control character in a " +
                     "string). " + kCopyAgain);
  }
  const std::string where = path.string() + ": ";
  if (!manifest.is_object()) {
    throw bad_bundle(where + "a JSON object expected, " + type_name(manifest) + " found. " + kCopyAgain);
  }
  const std::string expected = where + "schema_version " + std::to_string(kSchemaVersion) + " expected, ";
  const json version = manifest.value("schema_version", json());
  if (!version.is_number_integer()) throw bad_bundle(expected + repr(version) + " found. Export it again.");
  if (version != kSchemaVersion) {
    const std::string advice = version > kSchemaVersion ? "Upgrade this package." : "Export it again.";
    throw bad_bundle(expected + repr(version) + " found. " + advice);
  }
  if (seal == Seal::none) throw bad_bundle(where + "\"seal\" expected at its end, none found. " + kCopyAgain);
  if (!manifest.contains("files") || !manifest["files"].is_object()) {
    throw bad_bundle(where + "\"files\", an object of file names, expected; none found. " + kCopyAgain);
  }
  return manifest;
}

bool is_plain_path(const std::string& name) {
  if (name.find_first_of(std::string_view("\\\0", 2)) != std::string::npos) return false;
  for (std::size_t start = 0; start <= name.size();) {
    const std::size_t end = std::min(name.find('/', start), name.size());
    const std::string part = name.substr(start, end - start);
    if (part.empty() || part == "." || part == "..") return false;
    start = end + 1;
  }
  return true;
}

std::string entry_problem(const std::string& name, const json& entry) {
  const std::string in_manifest = std::string(" in ") + kManifest;
  if (!is_plain_path(name)) return std::string("listed") + in_manifest + ", but not a plain path inside the bundle";
  if (!entry.is_object() || !entry.contains("size") || !entry["size"].is_number_integer()) {
    return "no whole number as its size" + in_manifest;
  }
  const json sha256 = entry.value("sha256", json());
  const auto is_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (!sha256.is_string() || sha256.get_ref<const std::string&>().size() != 64 ||
      !std::ranges::all_of(sha256.get_ref<const std::string&>(), is_digit)) {
    return "no sha256 of 64 lower-case hexadecimal digits" + in_manifest;
  }
  if (name == kManifest || name == kParity) {
    return std::string("listed") + in_manifest + ", which lists neither itself nor " + kParity;
  }
  return entry.size() == 2 ? "" : "more than a size and a sha256" + in_manifest;
}

// Whether the path or a folder of it is a link, which has a problem of its own already.
bool lies_in_a_link(const std::string& name, const Problems& linked) {
  for (fs::path path = name; !path.empty(); path = path.parent_path()) {
    if (linked.contains(path.generic_string())) return true;
  }
  return false;
}

// Files that the manifest need not list. The last form is a temporary file that a crash leaves behind while parity.json
// is replaced; it must not make a good bundle unreadable.
bool may_be_unlisted(const std::string& name) {
  return name == kManifest || name == kParity || name.starts_with(std::string(".") + kParity + ".");
}

struct FileToHash {
  std::string name;
  fs::path path;
  std::uint64_t size;
  std::string sha256;   // expected
  std::string problem;  // empty if the hash is as expected
};

// Hashes files on up to 8 threads, the largest first: one thread hashes a file, and the weights take longest.
void hash(std::vector<FileToHash>& files) {
  std::ranges::sort(files, std::greater{}, &FileToHash::size);
  std::atomic<std::size_t> next = 0;
  const auto work = [&] {
    for (std::size_t i = next++; i < files.size(); i = next++) {
      FileToHash& one = files[i];
      try {
        const std::string digest = sha256_of(one.path);
        if (digest != one.sha256) one.problem = "sha256 " + one.sha256 + " expected, " + digest + " found";
      } catch (const std::exception& error) {
        one.problem = error.what();
      }
    }
  };
  std::vector<std::jthread> threads(std::min(8U, std::max(1U, std::thread::hardware_concurrency())) - 1);
  for (std::jthread& thread : threads) thread = std::jthread(work);
  work();
}

Error as_error(const fs::path& root, const Problems& problems) {
  std::string text = root.string() + " is not the bundle that was exported:\n";
  std::size_t count = 0;
  for (const auto& [name, problem] : problems) {
    if (++count <= kMaxProblems) text += "  " + shown(name) + ": " + problem + "\n";
  }
  if (count > kMaxProblems) text += "  ... and " + std::to_string(count - kMaxProblems) + " more\n";
  return bad_bundle(text + kCopyAgain);
}

}  // namespace

json read_bundle(const fs::path& folder, bool check_hashes) try {
  json manifest = load_manifest(folder);
  const FolderContent found = scan(folder);
  Problems problems = found.irregular;
  std::vector<FileToHash> to_hash;
  for (const auto& [name, entry] : manifest["files"].items()) {
    if (std::string problem = entry_problem(name, entry); !problem.empty()) {
      problems[name] = problem;
    } else if (const auto file = found.files.find(name); file != found.files.end()) {
      const auto [size, why_not] = size_of(file->second);
      if (!why_not.empty()) {
        problems[name] = "cannot be read: " + why_not;
      } else if (entry["size"] != size) {
        problems[name] = repr(entry["size"]) + " bytes expected, " + std::to_string(size) + " found";
      } else {
        to_hash.push_back({name, file->second, size, entry["sha256"], ""});
      }
    } else if (!lies_in_a_link(name, found.irregular)) {
      problems[name] = "a file of " + repr(entry["size"]) + " bytes expected, none found";
    }
  }
  for (const auto& [name, path] : found.files) {
    if (!manifest["files"].contains(name) && !may_be_unlisted(name)) {
      problems[name] = std::string("not listed in ") + kManifest + "; remove it if it was added by hand";
    }
  }
  if (check_hashes) {
    hash(to_hash);
    for (const FileToHash& one : to_hash) {
      if (!one.problem.empty()) problems[one.name] = one.problem;
    }
  }
  if (!problems.empty()) throw as_error(folder, problems);
  return manifest;
} catch (const fs::filesystem_error& error) {
  throw bad_bundle(folder.string() + " cannot be read: " + error.code().message() + " (" + error.path1().string() +
                   "). Check its permissions.");
}

}  // namespace megalodon::impl
