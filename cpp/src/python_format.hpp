// Formats values in messages as Python does, so that both languages report the same words about the same bundle.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace megalodon::impl {

std::string repr(double value);             // 1.0, 0.3, 1e-05, inf, nan
std::string repr(const std::string& text);  // 'text'
std::string repr(const nlohmann::json& value);
std::string type_name(const nlohmann::json& value);         // int, str, list, NoneType, ...
// Whether a text holds control characters, which a terminal obeys instead of showing them.
bool has_control_characters(const std::string& text);
// A name for a message: control characters and bytes that are not UTF-8 become \xNN or \uNNNN.
std::string shown(const std::string& text);
std::string list_text(const std::vector<int64_t>& values);  // [1, 2, 3]
std::string with_commas(const std::vector<std::string>& items);

}  // namespace megalodon::impl
