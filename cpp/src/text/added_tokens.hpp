// Tokens that are found in a text before it is split, e.g. "<|endoftext|>".
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "text/normalizer.hpp"
#include "text/vocabulary.hpp"

namespace megalodon::impl {

struct AddedToken {
  TokenId id;
  std::string content;  // as it is found in a text: normalized if the token asks for it
  bool single_word, strips_left, strips_right, is_normalized, is_special;
};

// Finds the longest of several tokens at the first place where one is.
class TokenFinder {
 public:
  // A part of a text. `token` is null for a part without a token.
  struct Part {
    std::size_t begin, end;
    const AddedToken* token;
  };

  void add(const AddedToken& token);
  bool empty() const { return nodes_.size() == 1; }
  // Calls `take` for the parts of a text, in order.
  template <class Take>
  void split(std::string_view text, Take take) const;

 private:
  struct Node {
    const AddedToken* token = nullptr;
    std::vector<std::pair<char, std::uint32_t>> children;
  };
  struct State {
    std::size_t done = 0;        // all before it is given
    std::size_t spaces_end = 0;  // the end of the last run of spaces that was stripped
    std::size_t spaces_begin = 0;
  };

  const AddedToken* longest_at(std::string_view text, std::size_t position) const;
  std::uint32_t child_of(std::uint32_t node, char byte) const;
  // The place of a token with the spaces that it takes. False: it is not a single word.
  static bool place(std::string_view text, Part& found, State& state);

  std::vector<Node> nodes_{1};
  std::array<bool, 256> begins_{};  // whether a token begins with this byte
};

class AddedTokens {
 public:
  // Throws NotSupported for tokens that `tokenizers` refuses too.
  AddedTokens(const nlohmann::json& file, const Vocabulary& vocabulary, const Normalizer* normalizer);
  AddedTokens(const AddedTokens&) = delete;
  AddedTokens& operator=(const AddedTokens&) = delete;

  const TokenFinder& before_normalizing() const { return plain_; }
  const TokenFinder& after_normalizing() const { return normalized_; }
  // Null: no added token has this id.
  const AddedToken* token_of(std::int64_t id) const;
  bool is_special(const std::string& token) const { return special_.contains(token); }

 private:
  std::unordered_map<TokenId, AddedToken> tokens_;
  std::unordered_set<std::string> special_;
  TokenFinder plain_, normalized_;
};

template <class Take>
void TokenFinder::split(std::string_view text, Take take) const {
  State state;
  for (std::size_t position = empty() ? text.size() : 0; position < text.size();) {
    const AddedToken* token =
        begins_[static_cast<unsigned char>(text[position])] ? longest_at(text, position) : nullptr;
    if (token == nullptr) {
      ++position;
      continue;
    }
    Part found{position, position + token->content.size(), token};
    position = found.end;
    if (!place(text, found, state)) continue;
    if (state.done < found.begin) take(Part{state.done, found.begin, nullptr});
    take(found);
    state.done = found.end;
  }
  if (state.done != text.size()) take(Part{state.done, text.size(), nullptr});
}

}  // namespace megalodon::impl
