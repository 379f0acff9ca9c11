#include "text/added_tokens.hpp"

#include <algorithm>

#include "text/json_fields.hpp"
#include "text/unicode.hpp"

namespace megalodon::impl {

using nlohmann::json;

// ---- finding them ---------------------------------------------------------------------------------------------------

std::uint32_t TokenFinder::child_of(std::uint32_t node, char byte) const {
  const auto& children = nodes_[node].children;
  const auto at = std::ranges::lower_bound(children, byte, {}, [](const auto& child) { return child.first; });
  return at == children.end() || at->first != byte ? 0 : at->second;
}

void TokenFinder::add(const AddedToken& token) {
  std::uint32_t node = 0;
  for (const char byte : token.content) {
    std::uint32_t child = child_of(node, byte);
    if (child == 0) {
      child = static_cast<std::uint32_t>(nodes_.size());
      nodes_.emplace_back();
      auto& children = nodes_[node].children;
      const auto at = std::ranges::lower_bound(children, byte, {}, [](const auto& one) { return one.first; });
      children.insert(at, {byte, child});
    }
    node = child;
  }
  if (nodes_[node].token != nullptr) throw NotSupported("two added tokens that read " + token.content);
  nodes_[node].token = &token;
  begins_[static_cast<unsigned char>(token.content[0])] = true;
}

const AddedToken* TokenFinder::longest_at(std::string_view text, std::size_t position) const {
  const AddedToken* longest = nullptr;
  for (std::uint32_t node = 0; position < text.size(); ++position) {
    node = child_of(node, text[position]);
    if (node == 0) break;
    if (nodes_[node].token != nullptr) longest = nodes_[node].token;
  }
  return longest;
}

bool TokenFinder::place(std::string_view text, Part& found, State& state) {
  const AddedToken& token = *found.token;
  if (token.single_word) {
    std::size_t next = found.end;
    if (found.begin > 0 && has_flag(last_character(text.substr(0, found.begin)), kIsRustWord)) return false;
    if (found.end < text.size() && has_flag(next_character(text, next), kIsRustWord)) return false;
  }
  while (token.strips_left && found.begin > state.done) {
    const char32_t last = last_character(text.substr(0, found.begin));
    if (!has_flag(last, kIsSpace)) break;
    found.begin -= to_utf8(last).size();
  }
  if (token.strips_left) found.begin = std::max(found.begin, state.done);
  if (token.strips_right && found.end >= state.spaces_begin && found.end < state.spaces_end) {
    found.end = state.spaces_end;  // this run was gone through before
  } else if (token.strips_right) {
    state.spaces_begin = found.end;
    for (std::size_t next = found.end; next < text.size(); found.end = next) {
      if (!has_flag(next_character(text, next), kIsSpace)) break;
    }
    state.spaces_end = found.end;
  }
  return true;
}

// ---- reading them ---------------------------------------------------------------------------------------------------

// Python gives a token that the model's vocabulary has the id there, and others the next free ids, whatever the file
// says.
AddedTokens::AddedTokens(const json& file, const Vocabulary& vocabulary, const Normalizer* normalizer) {
  if (!file.is_null() && !file.is_array()) throw NotSupported("added tokens that are no list");
  std::unordered_map<std::string, TokenId> known;
  auto next = static_cast<TokenId>(vocabulary.size());
  for (const json& one : file) {
    AddedToken token{0,
                     field<std::string>(one, "content"),
                     field<bool>(one, "single_word"),
                     field<bool>(one, "lstrip"),
                     field<bool>(one, "rstrip"),
                     field<bool>(one, "normalized"),
                     field<bool>(one, "special")};
    if (token.content.empty()) continue;
    const std::string content = token.content;
    const auto found = vocabulary.id_of(content);
    const auto again = known.find(content);
    token.id = again != known.end() ? again->second : found ? *found : next++;
    known[content] = token.id;
    if (token.is_normalized && normalizer != nullptr) {
      NormalizedText text{content, 0};
      normalizer->apply(text);
      token.content = text.text;
      if (token.content.empty()) throw NotSupported("an added token that the normalizer removes: " + content);
    }
    if (token.is_special) special_.insert(content);
    tokens_.insert_or_assign(token.id, std::move(token));
  }
  for (const auto& [id, token] : tokens_) (token.is_normalized ? normalized_ : plain_).add(token);
}

const AddedToken* AddedTokens::token_of(std::int64_t id) const {
  const auto found = id < 0 || id > 0xFFFFFFFF ? tokens_.end() : tokens_.find(static_cast<TokenId>(id));
  return found == tokens_.end() ? nullptr : &found->second;
}

}  // namespace megalodon::impl
