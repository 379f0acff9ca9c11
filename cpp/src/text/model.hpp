// Models turn words into tokens.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "text/vocabulary.hpp"
#include "text/word_cache.hpp"

namespace megalodon::impl {

using TokenIds = std::vector<std::int64_t>;

class Model {
 public:
  // Buffers and results that a model reuses from word to word. One thread uses a Memory at a time.
  struct Memory {
    virtual ~Memory() = default;
  };

  virtual ~Model() = default;
  virtual std::unique_ptr<Memory> new_memory() const = 0;
  // Appends the tokens of a word that is not empty. The work is at most n log n for a word of n bytes.
  virtual void tokenize(std::string_view word, Memory& memory, TokenIds& ids) const = 0;
  virtual const Vocabulary& vocabulary() const = 0;
};

// The model of a tokenizer.json. Throws NotSupported for a kind that is not known here. In a byte-level tokenizer words
// are bytes, and the vocabulary names them by symbols.
std::unique_ptr<Model> read_model(const nlohmann::json& file, bool is_byte_level);

}  // namespace megalodon::impl
