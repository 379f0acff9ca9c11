// Pre-tokenizers split a text into words. No token crosses the border of a word.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/expression.hpp"

namespace megalodon::impl {

// A part of a text. `at_start` is how many bytes at its beginning stand for the beginning of the whole text.
struct Piece {
  std::string_view text;
  std::size_t at_start;
};

// Calls a function with pieces. It does not own the function.
class PieceSink {
 public:
  template <class Function>
  explicit PieceSink(const Function& function)
      : object_(&function),
        call_([](const void* object, const Piece& piece) { (*static_cast<const Function*>(object))(piece); }) {}
  void operator()(const Piece& piece) const { call_(object_, piece); }

 private:
  const void* object_;
  void (*call_)(const void*, const Piece&);
};

// One step of pre-tokenization.
class PreTokenizer {
 public:
  struct Match {
    Span span;
    bool is_match;
  };
  // Buffers that a step reuses from text to text.
  struct Memory {
    std::optional<Expression::Search> search;
    std::string text;
    std::vector<Match> matches;
  };

  virtual ~PreTokenizer() = default;
  virtual void split(const Piece& piece, Memory& memory, const PieceSink& sink) const = 0;
};

// The steps of a tokenizer.json.
class PreTokenizers {
 public:
  using Memory = std::vector<PreTokenizer::Memory>;

  // Throws NotSupported for a kind that is not known here.
  explicit PreTokenizers(const nlohmann::json& file);

  // Whether words are bytes: the vocabulary names them by symbols.
  bool is_byte_level() const { return is_byte_level_; }
  Memory new_memory() const { return Memory(steps_.size()); }
  void split(const Piece& piece, Memory& memory, const PieceSink& sink) const { run(0, piece, memory, sink); }

 private:
  void add(const nlohmann::json& file);
  void run(std::size_t step, const Piece& piece, Memory& memory, const PieceSink& sink) const;

  std::vector<std::unique_ptr<PreTokenizer>> steps_;
  bool is_byte_level_ = false;
};

}  // namespace megalodon::impl
