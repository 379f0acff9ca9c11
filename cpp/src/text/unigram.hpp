// The unigram model of SentencePiece: the tokens of the greatest sum of scores.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "text/flat_map.hpp"
#include "text/model.hpp"

namespace megalodon::impl {

class Unigram final : public Model {
 public:
  explicit Unigram(const nlohmann::json& file);

  std::unique_ptr<Model::Memory> new_memory() const override;
  void tokenize(std::string_view word, Model::Memory& memory, TokenIds& ids) const override;
  const Vocabulary& vocabulary() const override { return vocabulary_; }

 private:
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;
  // A node of the tree of all tokens. The tokens of a node's children begin with its text.
  struct Node {
    TokenId id = kNone;  // of the token that ends here
    double score = 0;
  };
  struct Memory;

  void insert(std::string_view token, TokenId id, double score);
  std::uint32_t child_of(std::uint32_t node, char byte) const;
  void compute(std::string_view word, Memory& memory, TokenIds& ids) const;
  void extend_paths(std::string_view word, std::size_t position, Memory& memory) const;
  void finish_part(std::string_view word, std::size_t end, Memory& memory, TokenIds& ids) const;
  void put_unknown(std::string_view text, TokenIds& ids) const;

  Vocabulary vocabulary_;
  std::optional<TokenId> unknown_id_;
  double unknown_score_ = 0;
  bool has_byte_fallback_;
  std::array<std::optional<TokenId>, 256> byte_ids_;
  std::vector<Node> nodes_;
  FlatMap<std::uint32_t> children_;
  std::array<std::uint32_t, 256> first_;  // the children of the root
};

}  // namespace megalodon::impl
