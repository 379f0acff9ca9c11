// The config of a model: Python's model/config.py says what its fields mean.
#include <map>
#include <set>
#include <string>

#include "bundle/layout.hpp"
#include "error.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr std::int64_t kMost = INT32_MAX;

// The fields and their defaults, whose types are those of the values. `rope_base` may be a number, and the other fields
// that are null may be whole numbers.
const json& defaults() {
  static const json values = json::parse(R"({
    "vocab_size": 32000, "model_dim": 1024, "num_layers": 12, "num_heads": 1, "z_dim": 256, "value_dim": 2048,
    "ffn_hidden_dim": 2560, "cema_ndim": 16, "chunk_size": 2048, "norm_num_groups": 32, "norm_affine": true,
    "norm_eps": 1e-5, "norm_statistics": "megalodon", "rope_base": null, "swiglu": false, "rescale_nffn": false,
    "scale_emb": false, "share_emb": false, "output_size": -1, "projection_bias": false, "dropout": 0.0,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "drop_key": false, "init_mode": "he", "ema_prefill": "blocked",
    "use_cache": true, "max_cache_len": null, "cache_unbounded": false, "weight_format": "float", "group_size": 32,
    "bos_token_id": null, "eos_token_id": null, "pad_token_id": null})");
  return values;
}

// The value of a field, with whole numbers as floating-point numbers where the field is one.
json field_value(const std::string& name, const json& value, const json& standard) {
  const bool is_float = standard.is_number_float() || (name == "rope_base" && !value.is_null());
  const bool is_whole = standard.is_number_integer() || (standard.is_null() && !value.is_null());
  const bool right = is_float   ? value.is_number()
                     : is_whole ? value.is_number_integer()
                                : value.type() == standard.type();
  require(right, name + " is " + repr(value) + ", which is of another type");
  return is_float ? json(value.get<double>()) : value;
}

// Every rule of Python's `ModelConfig.check`, by the field that it is about.
void check_values(const json& config) {
  const auto size = [&](const char* name) { return config[name].get<std::int64_t>(); };
  const auto number = [&](const char* name) { return config[name].get<double>(); };
  const auto check = [&](bool right, const std::string& name) {
    require(right, "invalid Megalodon config: " + name + " is " + repr(config[name]));
  };
  for (const auto& [name, value] : config.items()) {
    if (!value.is_number_integer()) continue;
    const auto found = value.get<std::int64_t>();
    check(found <= kMost && (found >= 0 || (name == "output_size" && found == -1)), name);
    check(found != 0 || name.ends_with("_id"), name);
  }
  check(size("z_dim") % (2 * size("num_heads")) == 0, "z_dim");
  check(size("value_dim") % size("num_heads") == 0, "value_dim");
  check(size("model_dim") % size("norm_num_groups") == 0, "model_dim");
  check(config["share_emb"] == false || size("output_size") == -1 || size("output_size") == size("vocab_size"), "output_size");
  for (const char* name : {"dropout", "attention_dropout", "hidden_dropout"}) {
    check(number(name) >= 0.0 && number(name) < 1.0, name);
  }
  check(number("norm_eps") > 0, "norm_eps");
  check(config["rope_base"].is_null() || number("rope_base") > 0, "rope_base");
  const std::map<std::string, std::set<std::string>> choices{
      {"norm_statistics", {"megalodon", "megalodon-hf"}},
      {"ema_prefill", {"blocked", "fft"}},
      {"init_mode", {"he", "bert", "gaussian", "xavier", "none"}},
      {"weight_format", {"float", "int8", "int4"}},
  };
  for (const auto& [name, allowed] : choices) check(allowed.contains(config[name].get<std::string>()), name);
  for (const char* name : {"model_dim", "value_dim", "ffn_hidden_dim"}) {
    check(config["weight_format"] != "int4" || size(name) % (2 * size("group_size")) == 0, name);
  }
  // Programs attend inside chunks.
  check(config["max_cache_len"].is_null(), "max_cache_len");
  check(config["cache_unbounded"] == false, "cache_unbounded");
}

}  // namespace

json config_fields(const json& values) {
  json config = json::object();
  for (const auto& [name, standard] : defaults().items()) {
    config[name] = field_value(name, values.value(name, standard), standard);
  }
  if (config["max_cache_len"] == config["chunk_size"]) config["max_cache_len"] = nullptr;  // the same
  check_values(config);
  return config;
}

}  // namespace megalodon::impl
