// Normalizers change a text before it is split.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

namespace megalodon::impl {

// A text that is being changed.
struct NormalizedText {
  std::string text;
  // How many bytes at its beginning stand for the beginning of what the caller gave. The scheme "first" of the
  // pre-tokenizer Metaspace depends on it.
  std::size_t at_start = 0;
};

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual void apply(NormalizedText& text) const = 0;
};

// The normalizer of a tokenizer.json. Null: there is none. Throws NotSupported for a kind that is not known here.
std::unique_ptr<Normalizer> read_normalizer(const nlohmann::json& file);

}  // namespace megalodon::impl
