#include "bundle/layout.hpp"

#include <array>
#include <iterator>
#include <numeric>
#include <sstream>
#include <vector>

#include "bundle/file.hpp"
#include "error.hpp"
#include "python_format.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr std::int64_t kBlock = 32;  // tokens: the programs take whole blocks
constexpr std::int64_t kMostBatch = 1 << 16, kMostLength = 1 << 24;

// One tensor of the cache: model/cache.py
struct Field {
  const char *name, *dims, *dtype, *meaning;
  double fill = 0.0;
};

constexpr std::array kLayerFields{
    Field{"key", "B H C dz", "model", "rotated keys of the current chunk, slot t mod C"},
    Field{"value", "B H C dv", "model", "values of the current chunk, slot t mod C"},
    Field{"ema_state", "B D N 2", "float32", "complex EMA state (real, imaginary)"},
    Field{"norm_mean", "B G", "float32", "running mean of the layer's TimestepNorm"},
    Field{"norm_var", "B G", "float32", "running variance of the layer's TimestepNorm", 1.0},
};
constexpr std::array kFinalFields{
    Field{"norm_mean", "B G", "float32", "running mean of the final TimestepNorm"},
    Field{"norm_var", "B G", "float32", "running variance of the final TimestepNorm", 1.0},
    Field{"position", "B", "int64", "tokens seen, per row"},
};

// Calls `use` with the name of every tensor of the cache, and with what it is.
template <typename Use>
void for_each_tensor(const json& config, Use use) {
  for (std::int64_t layer = 0; layer < config["num_layers"].get<std::int64_t>(); ++layer) {
    for (const Field& field : kLayerFields) use("layers." + std::to_string(layer) + "." + field.name, field);
  }
  for (const Field& field : kFinalFields) use(std::string("final.") + field.name, field);
}

std::vector<std::string> dims_of(const Field& field) {
  std::istringstream words(field.dims);
  return {std::istream_iterator<std::string>(words), {}};
}

std::vector<std::int64_t> row_shape_of(const Field& field, const json& dimensions) {
  std::vector<std::int64_t> shape;
  for (const std::string& dim : dims_of(field)) {
    if (dim != "B") shape.push_back(dimensions.contains(dim) ? dimensions[dim].get<std::int64_t>() : std::stoll(dim));
  }
  return shape;
}

std::string dtype_of(const Field& field, const std::string& model) {
  const std::string dtype = field.dtype;
  return dtype == "model" || (dtype == "float32" && model == "float64") ? model : dtype;
}

std::string logits_dtype(const std::string& model) { return model == "float64" ? "float64" : "float32"; }

json logits_dims(bool all_logits) { return all_logits ? json::array({"B", "L", "V"}) : json::array({"B", "V"}); }

}  // namespace

json dimensions_of(const json& config) {
  const auto size = [&](const char* name) { return config[name].get<std::int64_t>(); };
  return {{"H", size("num_heads")},
          {"C", size("chunk_size")},
          {"dz", size("z_dim") / size("num_heads")},
          {"dv", size("value_dim") / size("num_heads")},
          {"D", size("model_dim")},
          {"N", size("cema_ndim")},
          {"G", size("norm_num_groups")},
          {"V", size("output_size") == -1 ? size("vocab_size") : size("output_size")}};
}

json cache_of(const json& config, const std::string& dtype) {
  const json dimensions = dimensions_of(config);
  json cache = json::array();
  for_each_tensor(config, [&](const std::string& name, const Field& field) {
    cache.push_back({{"name", name},
                     {"dims", dims_of(field)},
                     {"row_shape", row_shape_of(field, dimensions)},
                     {"dtype", dtype_of(field, dtype)},
                     {"initial_value", field.fill},
                     {"meaning", field.meaning}});
  });
  return cache;
}

std::string layout_id_of(const json& config) {
  const json dimensions = dimensions_of(config);
  std::vector<std::string> tensors;
  for_each_tensor(config, [&](const std::string& name, const Field& field) {
    std::vector<std::int64_t> shape = row_shape_of(field, dimensions);
    shape.insert(shape.begin(), 1);
    tensors.push_back(json(name).dump() + ", " + list_text(shape) + ", " + json(field.dtype).dump());
  });
  std::string text = "[";
  for (const std::string& tensor : tensors) text.append(text.size() > 1 ? ", [" : "[").append(tensor) += ']';
  return sha256_of(std::string_view(text += ']')).substr(0, 16);
}

json boundary_of(const std::string& dtype, bool all_logits) {
  const auto tensor = [](const char* name, const json& dims, const std::string& type) {
    return json::array({name, dims, type});
  };
  const auto program = [&](const json& arguments, bool all) {
    json inputs = arguments;
    inputs.push_back("cache");
    const json logits = tensor("logits", logits_dims(all), logits_dtype(dtype));
    return json{{"inputs", inputs}, {"updated_in_place", json::array({"cache"})}, {"outputs", json::array({logits})}};
  };
  const json lengths = tensor("lengths", json::array({"B"}), "int64");
  return {{"prefill", program(json::array({tensor("token_ids", json::array({"B", "L"}), "int64"), lengths}), all_logits)},
          {"decode", program(json::array({tensor("token_ids", json::array({"B"}), "int64")}), false)}};
}

json limits_of(const json& config, std::int64_t max_batch, std::int64_t max_length) {
  const auto chunk = config["chunk_size"].get<std::int64_t>();
  const std::int64_t multiple = max_length <= chunk && chunk >= kBlock ? kBlock : std::lcm(kBlock, chunk);
  const auto say = [](const char* name, std::int64_t value, const std::string& expected) {
    return std::string(name) + " is " + std::to_string(value) + ", expected " + expected;
  };
  require(max_batch >= 1, say("max_batch", max_batch, "at least 1"));
  require(max_batch <= kMostBatch, say("max_batch", max_batch, "at most " + std::to_string(kMostBatch)));
  require(max_length <= kMostLength, say("max_length", max_length, "at most " + std::to_string(kMostLength)));
  require(max_length >= multiple && max_length % multiple == 0,
          say("max_length", max_length, "a multiple of " + std::to_string(multiple) + ", at least that"));
  return {{"max_batch", max_batch}, {"max_length", max_length}, {"length_multiple", multiple}};
}

json graphs_of(const json& config, const std::string& dtype, bool all_logits) {
  const auto tensor = [](const std::string& graph_name, const std::string& name, const json& dims,
                         const std::string& type) {
    return json{{"name", graph_name}, {"tensor", name}, {"dims", dims}, {"dtype", type}};
  };
  json past = json::array(), present = json::array();
  for_each_tensor(config, [&](const std::string& name, const Field& field) {
    const std::string short_name = name.starts_with("layers.") ? name.substr(7) : name;
    past.push_back(tensor("past_key_values." + short_name, name, dims_of(field), dtype_of(field, dtype)));
    present.push_back(tensor("present." + short_name, name, dims_of(field), dtype_of(field, dtype)));
  });
  const auto graph = [&](const std::string& program, json inputs, bool all) {
    json outputs = json::array({tensor("logits", "logits", logits_dims(all), logits_dtype(dtype))});
    inputs.insert(inputs.end(), past.begin(), past.end());
    outputs.insert(outputs.end(), present.begin(), present.end());
    return json{{"file", program + ".onnx"}, {"inputs", inputs}, {"outputs", outputs}};
  };
  const json ids = tensor("input_ids", "token_ids", json::array({"B", "L"}), "int64");
  const json lengths = tensor("lengths", "lengths", json::array({"B"}), "int64");
  return {{"prefill", graph("prefill", json::array({ids, lengths}), all_logits)},
          {"decode", graph("decode", json::array({tensor("input_ids", "token_ids", json::array({"B"}), "int64")}), false)}};
}

}  // namespace megalodon::impl
