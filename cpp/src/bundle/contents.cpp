#include "bundle/contents.hpp"

#include <algorithm>
#include <map>
#include <set>

#include "bundle/dtype.hpp"
#include "bundle/file.hpp"
#include "bundle/folder.hpp"
#include "bundle/json.hpp"
#include "bundle/label.hpp"
#include "bundle/layout.hpp"
#include "bundle/manifest.hpp"
#include "bundle/safetensors.hpp"
#include "error.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char *kConfig = "config.json", *kWeights = "model.safetensors", *kConstants = "constants.safetensors";
constexpr const char* kPackage = "aoti/model.pt2";
constexpr const char* kOnnxFiles[] = {"prefill.onnx", "decode.onnx", "onnx_constants.safetensors"};
constexpr const char* kAgain = "Export it again.";

std::string brief(const json& value) {
  if (value.is_discarded()) return "nothing";
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list of " + std::to_string(value.size());
  return repr(value);
}

json value_or_nothing(const json& owner, const std::string& key) {
  return owner.contains(key) ? owner[key] : json(json::value_t::discarded);
}

// ---- comparing ------------------------------------------------------------------------------------------------------

// A whole number is no truth value, and 1.0 is no whole number; 1 may be 1.0.
bool same(const json& expected, const json& found) {
  const bool same_type = expected.is_number_integer() ? found.is_number_integer()
                         : expected.is_number_float() ? found.is_number()
                                                      : expected.type() == found.type();
  return same_type && expected == found;
}

// Error MEGALODON_INVALID_ARGUMENT names the first place where two values differ.
void require_equal(const json& expected, const json& found, const std::string& where) {
  if (expected.is_object() && found.is_object()) {
    std::set<std::string> keys;
    for (const json* one : {&expected, &found}) {
      for (const auto& [key, value] : one->items()) keys.insert(key);
    }
    for (const std::string& key : keys) {
      require_equal(value_or_nothing(expected, key), value_or_nothing(found, key),
                    where.empty() ? key : where + "." + key);
    }
  } else if (expected.is_array() && found.is_array() && expected.size() == found.size()) {
    for (std::size_t i = 0; i < expected.size(); ++i) {
      require_equal(expected[i], found[i], where + "[" + std::to_string(i) + "]");
    }
  } else {
    require(same(expected, found), where + ": " + brief(expected) + " expected, " + brief(found) + " found");
  }
}

// ---- facts of the manifest alone ------------------------------------------------------------------------------------

void require_text(const json& owner, const std::string& key, const std::string& where) {
  const json value = value_or_nothing(owner, key);
  require(value.is_string(), where + ": a string expected, " + brief(value) + " found");
}

void require_object(const json& owner, const std::string& key, const std::string& where) {
  const json value = value_or_nothing(owner, key);
  require(value.is_object(), where + ": an object expected, " + brief(value) + " found");
}

void check_facts(const json& manifest) {
  require_text(manifest, "created", "created");
  require_object(manifest, "versions", "versions");
  std::set<std::string> names{"megalodon-export", "torch"};
  for (const auto& [name, version] : manifest["versions"].items()) names.insert(name);
  for (const std::string& name : names) require_text(manifest["versions"], name, "versions." + name);
  require_object(manifest, "programs", "programs");
}

void check_files(const json& manifest) {
  std::vector<std::string> wanted{kConfig, kWeights, kConstants};
  if (manifest["programs"].contains("aoti")) {
    wanted.emplace_back(kPackage);
    for (const std::string& name : library_names()) wanted.push_back("aoti/" + name);
  }
  if (manifest["programs"].contains("onnx")) wanted.insert(wanted.end(), std::begin(kOnnxFiles), std::end(kOnnxFiles));
  for (const std::string& name : wanted) {
    require(manifest["files"].contains(name), "files: " + name + " expected, none found");
  }
}

std::int64_t whole(const json& owner, const std::string& key, const std::string& where) {
  const json value = value_or_nothing(owner, key);
  require(value.is_number_integer(), where + "." + key + ": a whole number expected, " + brief(value) + " found");
  return value.get<std::int64_t>();
}

bool flag(const json& owner, const std::string& key, const std::string& where) {
  const json value = value_or_nothing(owner, key);
  require(value.is_boolean(), where + "." + key + ": True or False expected, " + brief(value) + " found");
  return value.get<bool>();
}

json limits_in(const json& programs, const json& config, const std::string& where) {
  require_object(programs, "limits", where + ".limits");
  const json& limits = programs["limits"];
  return limits_of(config, whole(limits, "max_batch", where + ".limits"),
                   whole(limits, "max_length", where + ".limits"));
}

// ---- what the files say ---------------------------------------------------------------------------------------------

struct StoredFile {
  explicit StoredFile(const fs::path& path) : mapped(path) {
    try {
      content = parse_safetensors(mapped.bytes(), path.string());
    } catch (const Error& error) {
      throw bad_bundle(std::string(error.what()) + ". " + kAgain);
    }
  }
  MappedFile mapped;
  Safetensors content;
};

using StoredFiles = std::map<std::string, StoredFile>;

json read_config(const fs::path& path) {
  const json values = parse_json(read_file(path), path, kAgain);
  try {
    require(values.is_object(), "a JSON object expected, " + brief(values) + " found");
    return config_fields(values);
  } catch (const Error& error) {
    throw bad_bundle(path.string() + ": " + error.what() + ". " + kAgain);
  }
}

std::string read_dtype(const fs::path& path, const Safetensors& weights) {
  std::string found = "nothing";
  for (const char* name : {"lm_head.weight", "model.embed.weight"}) {
    if (const auto tensor = weights.tensors.find(name); tensor != weights.tensors.end()) {
      found = tensor->second.dtype->name;
    }
  }
  if (found != "float32" && found != "bfloat16" && found != "float64" && found != "float16") {
    throw bad_bundle(path.string() + ": an embedding of float32 or bfloat16 or float64 or float16 expected, " + found +
                     " found. " + kAgain);
  }
  return found;
}

// The number of layers decides how long lists become, so it is checked before they are made.
void check_sizes(const fs::path& path, const json& config, const std::string& dtype, const Safetensors& weights) {
  constexpr std::string_view kPrefix = "model.layers.";
  std::set<std::string> layers;
  for (const auto& [name, tensor] : weights.tensors) {
    if (name.starts_with(kPrefix)) layers.insert(name.substr(kPrefix.size(), name.find('.', kPrefix.size()) - kPrefix.size()));
  }
  if (config["num_layers"] != layers.size()) {
    throw bad_bundle(path.string() + ": num_layers is " + repr(config["num_layers"]) + ", expected " +
                     std::to_string(layers.size()) + ". " + kAgain);
  }
  constexpr double kTerabyte = static_cast<double>(std::int64_t{1} << 40);
  double bytes = 0;
  for (const json& tensor : cache_of(config, dtype)) {
    double size = static_cast<double>(dtype_by_name(tensor["dtype"].get<std::string>())->size);
    for (const json& dim : tensor["row_shape"]) size *= dim.get<double>();
    bytes += size;
  }
  if (bytes >= kTerabyte) {
    throw bad_bundle(path.string() + ": a stream's cache would have a terabyte or more. " + kAgain);
  }
}

json expected_onnx(const fs::path& folder, const json& config, const std::string& dtype) {
  const json label = read_graph_labels(folder);
  if (label.value("config", json()) != config || label.value("dtype", json()) != dtype) {
    throw bad_bundle((folder / "prefill.onnx").string() + ": it was made for another " + kConfig +
                     " or other weights. Export the bundle again.");
  }
  const std::string where = "programs.onnx";
  const bool all_logits = flag(label, "all_logits", where);
  return {{"target", {{"device", "cpu or cuda"}, {"architecture", "any"}}},
          {"limits", limits_in(label, config, where)},
          {"opset", whole(label, "opset", where)},
          {"all_logits", all_logits},
          {"files", kOnnxFiles},
          {"graphs", graphs_of(config, dtype, all_logits)},
          {"versions", label.value("versions", json())}};
}

json expected_manifest(const fs::path& folder, const json& config, const std::string& dtype, const json& found) {
  json programs = json::object(), versions = found["versions"];
  bool all_logits = false;
  if (found["programs"].contains("aoti")) {
    const Labels labels = read_labels(folder);
    programs["aoti"] = labels.programs;
    programs["aoti"]["limits"] = limits_in(labels.programs, config, "programs.aoti");
    versions["torch"] = labels.torch;
    all_logits = flag(labels.programs, "all_logits", "programs.aoti");
  }
  if (found["programs"].contains("onnx")) {
    programs["onnx"] = expected_onnx(folder, config, dtype);
    all_logits = all_logits || programs["onnx"]["all_logits"].get<bool>();
  }
  return {{"format", "megalodon-export"},
          {"created", found["created"]},
          {"config", config},
          {"dtype", dtype},
          {"weight_format", config["weight_format"]},
          {"dimensions", dimensions_of(config)},
          {"cache", cache_of(config, dtype)},
          {"layout_id", layout_id_of(config)},
          {"boundary", boundary_of(dtype, all_logits)},
          {"weights", kWeights},
          {"derived_constants", kConstants},
          {"programs", programs},
          {"versions", versions},
          {"schema_version", found["schema_version"]},
          {"files", found["files"]},
          {"seal", found["seal"]}};
}

// ---- stages and weights ---------------------------------------------------------------------------------------------

void check_weight(const StageInput& input, std::int64_t layers, const StoredFiles& files, const std::string& place) {
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    const std::string name = numbered(input.tensor, layer);
    const auto file = files.find(input.file);
    const auto missing = [&] { return invalid(place + ": " + input.file + " has no tensor " + name); };
    if (file == files.end()) throw missing();
    const auto stored = file->second.content.tensors.find(name);
    if (stored == file->second.content.tensors.end()) throw missing();
    const auto describe = [](const DType& dtype, const std::vector<std::int64_t>& shape) {
      return std::string(dtype.name) + " " + list_text(shape);
    };
    require(stored->second.dtype == input.dtype && stored->second.shape == input.shape,
            place + ": " + name + " in " + input.file + " is " + describe(*stored->second.dtype, stored->second.shape) +
                "; " + describe(*input.dtype, input.shape) + " expected");
  }
}

// Every input of a stage must be there when the stage runs: in a file, in the cache, or computed.
void check_stages(const Manifest& manifest, const StoredFiles& files) {
  for (const char* program : {"prefill", "decode", "decode_one"}) {
    const ProgramEntry& entry = manifest.programs.at(program);
    std::set<std::pair<InputKind, std::string>> known{{InputKind::argument, "token_ids"}};
    known.emplace(InputKind::argument, std::string(program) == "prefill" ? "lengths" : "next_tokens");
    for (const Stage* stage : {&entry.begin, &entry.layer, &entry.end}) {
      const std::string place = "programs.aoti.stages: " + stage->file.substr(0, stage->file.find('.'));
      for (const StageInput& input : stage->inputs) {
        if (input.kind == InputKind::weight) {
          check_weight(input, stage == &entry.layer ? manifest.layers : 1, files, place);
        } else if (input.kind == InputKind::cache) {
          const auto found = std::ranges::find(manifest.cache, numbered(input.name, 0), &CacheTensor::name);
          require(found != manifest.cache.end() && found->dtype == input.dtype,
                  place + ": " + input.name + " is no " + std::string(input.dtype->name) + " tensor of the cache");
        } else {
          require(known.contains({input.kind, input.name}),
                  place + ": " + input.name + " is no " +
                      (input.kind == InputKind::stage ? "result of a stage before it" : "argument of its program"));
        }
      }
      for (const std::string& output : stage->outputs) known.emplace(InputKind::stage, output);
    }
    require(entry.end.outputs == std::vector<std::string>{"logits"},
            std::string("programs.aoti.stages: ") + program + "_end: logits expected from it and nothing else");
  }
}

}  // namespace

Manifest open_manifest(const fs::path& folder, bool check_hashes) {
  const json found = read_bundle(folder, check_hashes);
  try {
    check_facts(found);
    check_files(found);
    const json config = read_config(folder / kConfig);
    StoredFiles files;
    for (const char* name : {kWeights, kConstants}) files.try_emplace(name, folder / name);
    const Safetensors& weights = files.at(kWeights).content;
    const std::string dtype = read_dtype(folder / kWeights, weights);
    check_sizes(folder / kConfig, config, dtype, weights);
    require_equal(expected_manifest(folder, config, dtype, found), found, "");
    Manifest manifest = read_manifest(folder, found);
    check_stages(manifest, files);
    return manifest;
  } catch (const Error& error) {
    if (error.code != MEGALODON_INVALID_ARGUMENT) throw;
    throw bad_bundle((folder / "manifest.json").string() + ": " + error.what() + ". " + kAgain);
  }
}

}  // namespace megalodon::impl
