// Byte-pair encoding: neighbours are merged, the pair of the lowest rank first.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "text/flat_map.hpp"
#include "text/model.hpp"

namespace megalodon::impl {

class Bpe final : public Model {
 public:
  Bpe(const nlohmann::json& file, bool is_byte_level);

  std::unique_ptr<Model::Memory> new_memory() const override;
  void tokenize(std::string_view word, Model::Memory& memory, TokenIds& ids) const override;
  const Vocabulary& vocabulary() const override { return vocabulary_; }

 private:
  struct Merge {
    std::uint32_t rank;
    TokenId id;
  };
  struct Memory;
  // A character of a word, or a byte in a byte-level tokenizer.
  struct Atom {
    std::uint32_t code;
    std::size_t size;
  };

  void read_vocabulary(const nlohmann::json& file);
  void read_merges(const nlohmann::json& file);
  void add_neighbours(const std::string& token);

  Atom atom_at(std::string_view word, std::size_t position) const;
  const TokenId* id_of(std::uint32_t code) const;
  bool may_cut(std::uint32_t left, std::uint32_t right) const;
  void tokenize_whole(std::string_view word, Memory& memory, TokenIds& ids) const;
  void tokenize_parts(std::string_view word, Memory& memory, TokenIds& ids) const;
  void tokenize_part(std::string_view part, Memory& memory, TokenIds& ids) const;
  void merge(std::string_view part, Memory& memory) const;
  void start_symbols(std::string_view part, Memory& memory) const;
  bool append_bytes(std::uint32_t code, std::vector<TokenId>& symbols) const;
  void merge_few(std::vector<TokenId>& symbols, Memory& memory) const;
  void merge_many(std::vector<TokenId>& symbols, Memory& memory) const;
  const Merge* merge_of(TokenId left, TokenId right) const { return merges_.find((std::uint64_t{left} << 32) | right); }

  bool is_byte_level_, ignores_merges_, fuses_unknown_, has_byte_fallback_;
  std::optional<std::string> unknown_;
  std::optional<TokenId> unknown_id_;
  Vocabulary vocabulary_;
  TextMap<TokenId> whole_words_;                      // of a byte-level vocabulary, as bytes
  std::array<std::optional<TokenId>, 256> byte_ids_;  // of the tokens for single bytes
  bool has_all_bytes_ = false;
  FlatMap<Merge> merges_;
  FlatMap<TokenId> atom_ids_;
  std::array<std::int64_t, 256> low_ids_{};  // of the atoms below 256; -1: none
  bool merges_unknown_ = false;              // whether tokens that stand for unknown atoms take part in merges
  // Pairs of atoms beside each other in some token. A word can be cut between two atoms that are no such pair.
  std::array<std::array<bool, 256>, 256> low_neighbours_{};
  FlatMap<char> neighbours_;
};

}  // namespace megalodon::impl
