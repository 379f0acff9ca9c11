// Derives parts of the manifest from a model's config, as JSON: the cache, the programs' inputs and outputs, and their
// limits. Python derives the same from `model/cache.py` and `exporters/programs.py` when it writes the manifest.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace megalodon::impl {

// The fields of a ModelConfig in the content of a config.json, with defaults for those that are missing.
// Error MEGALODON_INVALID_ARGUMENT for values that Python's ModelConfig refuses.
nlohmann::json config_fields(const nlohmann::json& values);

nlohmann::json dimensions_of(const nlohmann::json& config);
nlohmann::json cache_of(const nlohmann::json& config, const std::string& dtype);
std::string layout_id_of(const nlohmann::json& config);
nlohmann::json boundary_of(const std::string& dtype, bool all_logits);
// Error MEGALODON_INVALID_ARGUMENT for sizes that Python's Limits refuses.
nlohmann::json limits_of(const nlohmann::json& config, std::int64_t max_batch, std::int64_t max_length);
// The inputs and outputs of the ONNX graphs of both programs.
nlohmann::json graphs_of(const nlohmann::json& config, const std::string& dtype, bool all_logits);

}  // namespace megalodon::impl
