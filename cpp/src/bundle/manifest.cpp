#include "bundle/manifest.hpp"

#include <algorithm>
#include <limits>

#include "error.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr const char* kLayerIndex = "{layer}";
constexpr const char* kLengthMultiple = "length_multiple";  // the manifest's key for Manifest::length_multiple
constexpr const char* kChunk = "C";                 // the dimension that rings alone have: tokens of a chunk
constexpr std::int64_t kMost = std::int64_t{1} << 24;
constexpr std::int64_t kMostSize = std::int64_t{1} << 40;

// A value in the manifest, with its path for messages: `limits.max_batch`, `cache[0].dtype`.
class Node {
 public:
  explicit Node(const json& value, std::string path = "") : value_(value), path_(std::move(path)) {}

  Node operator[](const std::string& key) const {
    if (!value_.is_object() || !value_.contains(key)) throw problem("\"" + key + "\" expected, none found");
    return field(key, value_[key]);
  }
  bool has(const std::string& key) const { return value_.is_object() && value_.contains(key); }
  std::string text() const {
    if (!value_.is_string()) throw problem("a string expected, " + type_name(value_) + " found");
    return value_;
  }
  bool flag() const {
    if (!value_.is_boolean()) throw problem("true or false expected, " + type_name(value_) + " found");
    return value_;
  }
  double number() const {
    if (!value_.is_number()) throw problem("a number expected, " + type_name(value_) + " found");
    return value_;
  }
  std::int64_t whole(std::int64_t low, std::int64_t high) const {
    if (!value_.is_number_integer() || value_ < low || value_ > high) {
      throw problem("a whole number in " + std::to_string(low) + ".." + std::to_string(high) + " expected, " +
                    repr(value_) + " found");
    }
    return value_;
  }
  std::optional<std::int64_t> optional_whole(std::int64_t low, std::int64_t high) const {
    return value_.is_null() ? std::nullopt : std::optional(whole(low, high));
  }
  const DType* dtype() const {
    const DType* found = dtype_by_name(text());
    if (found == nullptr) throw problem("no dtype that this library knows: " + text());
    return found;
  }
  std::vector<Node> items() const {
    if (!value_.is_array()) throw problem("a list expected, " + type_name(value_) + " found");
    std::vector<Node> nodes;
    for (std::size_t i = 0; i < value_.size(); ++i) {
      nodes.emplace_back(value_[i], path_ + "[" + std::to_string(i) + "]");
    }
    return nodes;
  }
  std::vector<std::pair<std::string, Node>> fields() const {
    if (!value_.is_object()) throw problem("an object expected, " + type_name(value_) + " found");
    std::vector<std::pair<std::string, Node>> nodes;
    for (const auto& [key, value] : value_.items()) nodes.emplace_back(key, field(key, value));
    return nodes;
  }
  std::vector<std::string> texts() const {
    std::vector<std::string> values;
    for (const Node& item : items()) values.push_back(item.text());
    return values;
  }
  std::vector<std::int64_t> sizes() const {
    std::vector<std::int64_t> values;
    for (const Node& item : items()) values.push_back(item.whole(0, kMostSize));
    return values;
  }
  Error problem(const std::string& what) const {
    return bad_bundle("manifest.json: " + (path_.empty() ? "" : path_ + ": ") + what + ". Export the bundle again.");
  }

 private:
  Node field(const std::string& key, const json& value) const {
    return Node(value, path_.empty() ? key : path_ + "." + key);
  }

  const json& value_;
  std::string path_;
};

// Programs trust the sizes of the cache, and no hash covers the manifest. So the shape that the manifest gives must be
// the one that follows from the names of its dimensions.
std::vector<std::int64_t> read_row_shape(const Node& node, const Node& dimensions) {
  std::vector<std::int64_t> shape;
  for (const std::string& dim : node["dims"].texts()) {
    const bool is_number =
        !dim.empty() && dim.size() < 10 && std::ranges::all_of(dim, [](char c) { return c >= '0' && c <= '9'; });
    if (dim != "B") shape.push_back(is_number ? std::stoll(dim) : dimensions[dim].whole(1, kMostSize));
  }
  const Node given = node["row_shape"];
  const std::vector<std::int64_t> found = given.sizes();
  if (found != shape) throw given.problem(list_text(shape) + " expected, " + list_text(found) + " found");
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
  for (const std::string& dim : dims) {
    if (dim == kChunk) break;
    if (dim != "B") ++tensor.slot_axis;
  }
  if (tensor.fill != 0.0 && tensor.dtype->name != "float32" && tensor.dtype->name != "int64") {
    throw fill.problem("0 expected for " + std::string(tensor.dtype->name));
  }
  tensor.row_bytes = tensor.dtype->size;
  for (const std::int64_t size : tensor.row_shape) {
    if (__builtin_mul_overflow(tensor.row_bytes, static_cast<std::size_t>(size), &tensor.row_bytes) ||
        tensor.row_bytes > std::size_t{kMostSize}) {
      throw node.problem("a tensor of less than a terabyte expected");
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
  if (kind == kinds.end()) throw named.problem("argument, cache, stage or weight expected");
  StageInput input{kind->second, node["name"].text(), node["dtype"].dtype(), {}, "", ""};
  if (input.kind == InputKind::weight) {
    input.shape = node["shape"].sizes();
    input.file = node["file"].text();
    input.tensor = node["tensor"].text();
  }
  return input;
}

Stage read_stage(const Node& node) {
  Stage stage{node["library"].text(), {}, node["outputs"].texts()};
  for (const Node& input : node["inputs"].items()) stage.inputs.push_back(read_input(input));
  return stage;
}

Target read_target(const Node& target, const Node& versions) {
  const std::string torch = versions["torch"].text();
  return {.device = target["device"].text(),
          .architecture = target["architecture"].text(),
          .cpu_features = target.has("cpu_features") ? target["cpu_features"].texts() : std::vector<std::string>{},
          .torch = torch.substr(0, torch.find('+'))};
}

std::vector<CacheTensor> read_cache(const Node& node, const Node& dimensions) {
  std::vector<CacheTensor> cache;
  for (const Node& tensor : node.items()) cache.push_back(read_cache_tensor(tensor, dimensions));
  const auto position = std::ranges::find(cache, kPosition, &CacheTensor::name);
  if (position == cache.end() || position->dtype->name != "int64" || !position->row_shape.empty()) {
    throw node.problem(std::string(kPosition) + ", int64, expected, none found");
  }
  return cache;
}

std::map<std::string, ProgramEntry> read_programs(const Node& stages) {
  const auto read = [&](const Node& program) {
    return ProgramEntry{read_stage(program["begin"]), read_stage(program["layer"]), read_stage(program["end"])};
  };
  std::map<std::string, ProgramEntry> programs{{"prefill", read(stages["prefill"])},
                                               {"decode", read(stages["decode"])}};
  if (stages.has("decode_one")) programs.emplace("decode_one", read(stages["decode_one"]));
  return programs;
}

std::string read_model_id(const Node& root) {
  const Node weights = root["weights"], files = root["files"];
  if (!files.has(weights.text())) throw weights.problem("one of the files listed expected, " + weights.text() + " found");
  return files[weights.text()]["sha256"].text();
}

}  // namespace

std::string numbered(std::string name, std::int64_t layer) {
  if (const auto at = name.find(kLayerIndex); at != std::string::npos) {
    name.replace(at, std::char_traits<char>::length(kLayerIndex), std::to_string(layer));
  }
  return name;
}

Manifest read_manifest(const std::filesystem::path& folder, const json& manifest) {
  const Node root(manifest);
  const Node programs = root["programs"];
  if (!programs.has("aoti")) {
    throw unavailable(folder.string() + " has no AOTInductor programs; make them: megalodon-export aoti");
  }
  if (const std::string dtype = root["dtype"].text(); dtype != "float32" && dtype != "bfloat16") {
    throw unavailable("the model computes in " + dtype +
                      ", and this library runs float32 and bfloat16; export it again: megalodon-export aoti --dtype");
  }
  const Node entry = programs["aoti"], config = root["config"], limits = entry["limits"];
  const Node dimensions = root["dimensions"];
  Manifest result{.target = read_target(entry["target"], root["versions"]),
                  .vocab_size = config["vocab_size"].whole(1, kMost),
                  .logits_size = dimensions["V"].whole(1, kMost),
                  .max_batch = limits["max_batch"].whole(1, kMost),
                  .max_length = limits["max_length"].whole(1, kMost),
                  .length_multiple = limits[kLengthMultiple].whole(1, kMost),
                  .layers = config["num_layers"].whole(1, kMost),
                  .chunk = dimensions[kChunk].whole(1, kMost),
                  .bos_token_id = config["bos_token_id"].optional_whole(0, kMost),
                  .eos_token_id = config["eos_token_id"].optional_whole(0, kMost),
                  .layout_id = root["layout_id"].text(),
                  .all_logits = entry["all_logits"].flag(),
                  .model_id = read_model_id(root),
                  .files = {},
                  .cache = read_cache(root["cache"], dimensions),
                  .programs = {}};
  if (result.max_length % result.length_multiple != 0) {
    throw limits.problem("max_length as a multiple of " + std::string(kLengthMultiple) + " expected");
  }
  for (const auto& [name, file] : root["files"].fields()) {
    result.files[name] = file["size"].whole(0, std::numeric_limits<std::int64_t>::max());
  }
  result.programs = read_programs(entry["stages"]);
  return result;
}

}  // namespace megalodon::impl
