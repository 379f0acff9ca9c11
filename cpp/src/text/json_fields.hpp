// Fields of a tokenizer.json. A field that is missing or of another type is refused by name.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "text/refusal.hpp"

namespace megalodon::impl {

// The value of a field. Throws NotSupported unless it has this type.
template <class T>
T field(const nlohmann::json& owner, const char* name) {
  try {
    return owner.at(name).get<T>();
  } catch (const nlohmann::json::exception&) {
    throw NotSupported(std::string("a field ") + name + " that is missing or of another type");
  }
}

// The value of a field, or `otherwise` if it is missing or null. Throws NotSupported for another type.
template <class T>
T field_or(const nlohmann::json& owner, const char* name, T otherwise) {
  return owner.contains(name) && !owner[name].is_null() ? field<T>(owner, name) : otherwise;
}

// A part of the file, e.g. "normalizer". Null: there is none.
inline const nlohmann::json& part_of(const nlohmann::json& file, const char* name) {
  static const nlohmann::json none;
  return file.contains(name) ? file[name] : none;
}

// The pattern of Split and Replace: {"String": " "} or {"Regex": "\\s+"}.
struct PatternText {
  std::string text;
  bool is_expression;
};

inline PatternText pattern_of(const nlohmann::json& owner) {
  const auto pattern = field<nlohmann::json>(owner, "pattern");
  const bool is_expression = pattern.is_object() && pattern.contains("Regex");
  PatternText found{field<std::string>(pattern, is_expression ? "Regex" : "String"), is_expression};
  if (found.text.empty()) throw NotSupported("an empty pattern");
  return found;
}

}  // namespace megalodon::impl
