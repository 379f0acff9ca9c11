#include "bundle/manifest.hpp"

#include <sys/utsname.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>

#include "error.hpp"
#include "text_format.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr const char* kLayerIndex = "{layer}";
constexpr const char* kChunk = "C";  // the letter of a chunk's tokens, which are a ring's slots

// Part of the manifest, with its place in it for messages.
class Node {
 public:
  Node(const json& value, std::string place) : value_(value), place_(std::move(place)) {}

  Node operator[](const std::string& key) const {
    if (!value_.is_object() || !value_.contains(key)) throw flaw("\"" + key + "\" expected, none found");
    return {value_[key], place_ + "." + key};
  }
  bool has(const std::string& key) const { return value_.is_object() && value_.contains(key); }
  std::string text() const {
    if (!value_.is_string()) throw flaw("a string expected, " + type_name(value_) + " found");
    return value_;
  }
  bool flag() const {
    if (!value_.is_boolean()) throw flaw("true or false expected, " + type_name(value_) + " found");
    return value_;
  }
  double number() const {
    if (!value_.is_number()) throw flaw("a number expected, " + type_name(value_) + " found");
    return value_;
  }
  std::int64_t whole(std::int64_t low, std::int64_t high) const {
    if (!value_.is_number_integer() || value_ < low || value_ > high) {
      throw flaw("a whole number in " + std::to_string(low) + ".." + std::to_string(high) + " expected, " +
                 repr(value_) + " found");
    }
    return value_;
  }
  std::optional<std::int64_t> optional_whole(std::int64_t low, std::int64_t high) const {
    return value_.is_null() ? std::nullopt : std::optional(whole(low, high));
  }
  const DType* dtype() const {
    const DType* found = dtype_by_name(text());
    if (found == nullptr) throw flaw("no dtype that this library knows: " + text());
    return found;
  }
  std::vector<Node> items() const {
    if (!value_.is_array()) throw flaw("a list expected, " + type_name(value_) + " found");
    std::vector<Node> nodes;
    for (std::size_t i = 0; i < value_.size(); ++i) {
      nodes.emplace_back(value_[i], place_ + "[" + std::to_string(i) + "]");
    }
    return nodes;
  }
  std::vector<std::pair<std::string, Node>> fields() const {
    if (!value_.is_object()) throw flaw("an object expected, " + type_name(value_) + " found");
    std::vector<std::pair<std::string, Node>> nodes;
    for (const auto& [key, value] : value_.items()) nodes.emplace_back(key, Node(value, place_ + "." + key));
    return nodes;
  }
  std::vector<std::string> texts() const {
    std::vector<std::string> values;
    for (const Node& item : items()) values.push_back(item.text());
    return values;
  }
  std::vector<std::int64_t> sizes() const {
    std::vector<std::int64_t> values;
    for (const Node& item : items()) values.push_back(item.whole(0, std::int64_t{1} << 40));
    return values;
  }
  Error flaw(const std::string& what) const {
    return bad_bundle("manifest.json: " + place_ + ": " + what + ". Export the bundle again.");
  }

 private:
  const json& value_;
  std::string place_;
};

std::string machine() {
  utsname name{};
  uname(&name);
  return name.machine;
}

std::set<std::string> cpu_flags() {
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

// As megalodon_export/runtimes/aoti.py, `_check_target`.
void check_target(const Node& target, const Node& versions, const std::string& device,
                  const std::string& architecture) {
  const std::string start = "the AOTInductor programs ";
  const std::string full = versions["torch"].text(), compiled = full.substr(0, full.find('+')), here = torch_version();
  if (minor_version(compiled) != minor_version(here)) {
    throw unavailable(start + "were compiled with torch " + compiled + ", this is " + here + kExportAgain);
  }
  if (device == "cuda") return;  // open_device checks the GPU
  if (device != "cpu") {
    throw unavailable(
        start + "are for " + device +
        ", and this library runs those for cpu and cuda; export it again: megalodon-export aoti --device");
  }
  if (architecture != machine()) {
    throw unavailable(start + "are for " + architecture + ", this is " + machine() + kExportAgain);
  }
  std::vector<std::string> missing;
  const std::set<std::string> flags = cpu_flags();
  for (const std::string& feature : target["cpu_features"].texts()) {
    if (!flags.contains(feature)) missing.push_back(feature);
  }
  std::ranges::sort(missing);
  if (!missing.empty()) {
    throw unavailable(start + "use CPU instructions that this machine lacks (" + with_commas(missing) + ")" +
                      kExportAgain + ", or export with --portable");
  }
}

// Programs trust the sizes of the cache, and no hash covers the manifest: what it says twice must agree.
std::vector<std::int64_t> read_row_shape(const Node& node, const Node& dimensions) {
  std::vector<std::int64_t> shape;
  for (const std::string& dim : node["dims"].texts()) {
    const bool is_number =
        !dim.empty() && dim.size() < 10 && std::ranges::all_of(dim, [](char c) { return c >= '0' && c <= '9'; });
    if (dim != "B") shape.push_back(is_number ? std::stoll(dim) : dimensions[dim].whole(1, std::int64_t{1} << 40));
  }
  const Node given = node["row_shape"];
  const std::vector<std::int64_t> found = given.sizes();
  if (found != shape) throw given.flaw(list_text(shape) + " expected, " + list_text(found) + " found");
  return shape;
}

CacheTensor read_cache_tensor(const Node& node, const Node& dimensions) {
  const Node fill = node["initial_value"];
  const std::vector<std::string> dims = node["dims"].texts();
  CacheTensor tensor{.name = node["name"].text(),
                     .row_shape = read_row_shape(node, dimensions),
                     .dtype = node["dtype"].dtype(),
                     .fill = fill.number(),
                     .ring = std::ranges::find(dims, kChunk) != dims.end(),
                     .row_bytes = 0};
  if (tensor.fill != 0.0 && tensor.dtype->name != "float32" && tensor.dtype->name != "int64") {
    throw fill.flaw("0 expected for " + std::string(tensor.dtype->name));
  }
  tensor.row_bytes = tensor.dtype->size;
  for (const std::int64_t size : tensor.row_shape) {
    if (__builtin_mul_overflow(tensor.row_bytes, static_cast<std::size_t>(size), &tensor.row_bytes) ||
        tensor.row_bytes > std::size_t{1} << 40) {
      throw node.flaw("a tensor of less than a terabyte expected");
    }
  }
  return tensor;
}

StageInput read_input(const Node& node) {
  static const std::map<std::string, InputKind> kinds{{"argument", InputKind::argument},
                                                      {"cache", InputKind::cache},
                                                      {"stage", InputKind::stage},
                                                      {"weight", InputKind::weight}};
  const Node named = node["kind"];
  const auto kind = kinds.find(named.text());
  if (kind == kinds.end()) throw named.flaw("argument, cache, stage or weight expected");
  StageInput input{kind->second, node["name"].text(), node["dtype"].dtype(), {}, "", ""};
  if (input.kind == InputKind::weight) {
    input.shape = node["shape"].sizes();
    input.file = node["file"].text();
    input.tensor = node["tensor"].text();
  }
  return input;
}

Stage read_stage(const Node& node, const std::map<std::string, std::int64_t>& files) {
  const Node library = node["library"];
  Stage stage{library.text(), {}, node["outputs"].texts()};
  if (!files.contains("aoti/" + stage.file)) {
    throw library.flaw("one of the files listed expected, aoti/" + stage.file + " found");
  }
  for (const Node& input : node["inputs"].items()) {
    stage.inputs.push_back(read_input(input));
    const std::string& file = stage.inputs.back().file;
    if (!file.empty() && !files.contains(file))
      throw input.flaw("one of the files listed expected, " + file + " found");
  }
  return stage;
}

}  // namespace

std::string numbered(std::string name, std::int64_t layer) {
  if (const auto at = name.find(kLayerIndex); at != std::string::npos) {
    name.replace(at, std::char_traits<char>::length(kLayerIndex), std::to_string(layer));
  }
  return name;
}

Manifest read_manifest(const std::filesystem::path& folder, const json& manifest) {
  const Node root(manifest, "the whole");
  const Node programs = root["programs"];
  if (!programs.has("aoti")) {
    throw unavailable(folder.string() + " has no AOTInductor programs; make them: megalodon-export aoti");
  }
  const Node entry = programs["aoti"], config = root["config"], limits = entry["limits"], target = entry["target"];
  const std::string device = target["device"].text(), architecture = target["architecture"].text();
  check_target(target, root["versions"], device, architecture);
  if (const std::string dtype = root["dtype"].text(); dtype != "float32" && dtype != "bfloat16") {
    throw unavailable("the model computes in " + dtype +
                      ", and this library runs float32 and bfloat16; export it again: megalodon-export aoti --dtype");
  }
  if (!root.has("layout_id")) {
    throw unavailable("the bundle is from before this library: its manifest has no layout_id" +
                      std::string(kExportAgain));
  }
  const Node dimensions = root["dimensions"], cache = root["cache"], stages = entry["stages"];
  constexpr std::int64_t most = std::int64_t{1} << 24;
  Manifest result{.device = device,
                  .architecture = architecture,
                  .vocab_size = config["vocab_size"].whole(1, most),
                  .logits_size = dimensions["V"].whole(1, most),
                  .max_batch = limits["max_batch"].whole(1, most),
                  .max_length = limits["max_length"].whole(1, most),
                  .granule = limits["granule"].whole(1, most),
                  .layers = config["num_layers"].whole(1, most),
                  .chunk = dimensions[kChunk].whole(1, most),
                  .bos = config["bos_token_id"].optional_whole(0, most),
                  .eos = config["eos_token_id"].optional_whole(0, most),
                  .layout_id = root["layout_id"].text(),
                  .all_logits = entry["all_logits"].flag(),
                  .files = {},
                  .cache = {},
                  .programs = {}};
  if (result.max_length % result.granule != 0) throw limits.flaw("max_length as a multiple of granule expected");
  for (const auto& [name, file] : root["files"].fields()) {
    result.files[name] = file["size"].whole(0, std::numeric_limits<std::int64_t>::max());
  }
  for (const Node& tensor : cache.items()) result.cache.push_back(read_cache_tensor(tensor, dimensions));
  const auto position = std::ranges::find(result.cache, kPosition, &CacheTensor::name);
  if (position == result.cache.end() || position->dtype->name != "int64" || !position->row_shape.empty()) {
    throw cache.flaw(std::string(kPosition) + ", int64, expected, none found");
  }
  for (const char* name : {"prefill", "decode", "decode_one"}) {
    if (std::string(name) == "decode_one" && !stages.has(name)) continue;
    const Node parts = stages[name];
    result.programs[name] = {read_stage(parts["begin"], result.files), read_stage(parts["layer"], result.files),
                             read_stage(parts["end"], result.files)};
  }
  return result;
}

}  // namespace megalodon::impl
