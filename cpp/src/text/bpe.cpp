#include "text/bpe.hpp"

#include <algorithm>
#include <limits>
#include <queue>

#include "error.hpp"
#include "text/byte_symbols.hpp"
#include "text/json_fields.hpp"
#include "text/unicode.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr std::size_t kFew = 64;      // symbols that are merged by looking at all pairs each time
constexpr std::size_t kCutFrom = 12;  // bytes of a word that is worth cutting
constexpr std::uint32_t kNoRank = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

std::uint64_t pair_of(std::uint32_t left, std::uint32_t right) { return (std::uint64_t{left} << 32) | right; }

}  // namespace

struct Bpe::Memory final : Model::Memory {
  // Two neighbours of a long word that can merge.
  struct Candidate {
    std::uint32_t rank, position;
    TokenId left, right, id;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  WordCache cache;
  std::vector<TokenId> symbols;
  std::vector<std::uint32_t> ranks, before, after;

  template <class Compute>
  void remember(std::string_view word, TokenIds& ids, Compute compute);
};

// ---- reading it -----------------------------------------------------------------------------------------------------

Bpe::Bpe(const json& file, bool is_byte_level)
    : is_byte_level_(is_byte_level),
      ignores_merges_(field_or<bool>(file, "ignore_merges", false)),
      fuses_unknown_(field_or<bool>(file, "fuse_unk", false)),
      has_byte_fallback_(field_or<bool>(file, "byte_fallback", false)) {
  if (!field_or<std::string>(file, "continuing_subword_prefix", "").empty() ||
      !field_or<std::string>(file, "end_of_word_suffix", "").empty()) {
    throw NotSupported("a BPE model that marks parts of words");
  }
  if (field_or<double>(file, "dropout", 0) != 0) throw NotSupported("a BPE model with dropout, which is random");
  if (file.contains("unk_token") && !file["unk_token"].is_null()) unknown_ = field<std::string>(file, "unk_token");
  read_vocabulary(file);
  read_merges(file);
}

void Bpe::read_vocabulary(const json& file) {
  low_ids_.fill(-1);
  const auto& vocabulary = part_of(file, "vocab");
  if (!vocabulary.is_object()) throw NotSupported("a BPE model without a vocabulary");
  for (const auto& [token, id] : vocabulary.items()) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= kNone) throw NotSupported("the id of " + token);
    const auto number = id.get<TokenId>();
    vocabulary_.add(token, number);
    std::string text = token;
    if (is_byte_level_) {
      auto bytes = bytes_of_symbols(token);
      if (!bytes) continue;  // no byte-level text has it
      text = *bytes;
    }
    if (ignores_merges_) whole_words_.emplace(text, number);
    if (text.empty() || atom_at(text, 0).size != text.size()) continue;
    const std::uint32_t code = atom_at(text, 0).code;
    atom_ids_.put(code, number);
    if (code < low_ids_.size()) low_ids_[code] = number;
  }
  if (unknown_) unknown_id_ = vocabulary_.id_of(*unknown_);
  has_all_bytes_ = has_byte_fallback_;
  for (std::size_t byte = 0; byte < byte_ids_.size(); ++byte) {
    byte_ids_[byte] = vocabulary_.id_of(byte_token(static_cast<unsigned char>(byte)));
    has_all_bytes_ = has_all_bytes_ && byte_ids_[byte];
  }
}

void Bpe::read_merges(const json& file) {
  const auto& merges = part_of(file, "merges");
  if (!merges.is_array()) throw NotSupported("a BPE model without merges");
  merges_ = FlatMap<Merge>(merges.size());
  std::uint32_t rank = 0;
  for (const json& one : merges) {
    std::string left, right;
    if (one.is_string()) {  // "a b", as older files have it
      const auto text = one.get<std::string>();
      if (text.starts_with("#version")) continue;
      const std::size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
        throw NotSupported("the merge " + text);
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (one.is_array() && one.size() == 2 && one[0].is_string() && one[1].is_string()) {
      left = one[0].get<std::string>();
      right = one[1].get<std::string>();
    }
    const auto left_id = vocabulary_.id_of(left), right_id = vocabulary_.id_of(right),
               id = vocabulary_.id_of(left + right);
    if (!left_id || !right_id || !id) throw NotSupported("a merge of " + left + " and " + right + ", no tokens");
    merges_.put(pair_of(*left_id, *right_id), {rank++, *id});
    const auto is_other = [&](TokenId part) {
      return part == unknown_id_ || (has_byte_fallback_ && std::ranges::count(byte_ids_, part) > 0);
    };
    merges_unknown_ = merges_unknown_ || is_other(*left_id) || is_other(*right_id);
    add_neighbours(left + right);
  }
}

void Bpe::add_neighbours(const std::string& token) {
  const auto bytes = is_byte_level_ ? bytes_of_symbols(token) : token;
  if (!bytes) return;
  for (std::size_t position = 0;;) {
    const Atom left = atom_at(*bytes, position);
    position += left.size;
    if (position >= bytes->size()) return;
    const std::uint32_t right = atom_at(*bytes, position).code;
    if (left.code < 256 && right < 256) {
      low_neighbours_[left.code][right] = true;
    } else {
      neighbours_.put(pair_of(left.code, right), 1);
    }
  }
}

// ---- words ----------------------------------------------------------------------------------------------------------

Bpe::Atom Bpe::atom_at(std::string_view word, std::size_t position) const {
  const auto byte = static_cast<unsigned char>(word[position]);
  if (is_byte_level_ || byte < 0x80) return {byte, 1};
  std::size_t end = position;
  const char32_t character = next_character(word, end);
  return {character, end - position};
}

const TokenId* Bpe::id_of(std::uint32_t code) const { return atom_ids_.find(code); }

// Whether no token of the model has these atoms beside each other, so that merging left and right of here is
// independent. Unknown atoms that the model fuses, or puts behind others, stay together.
bool Bpe::may_cut(std::uint32_t left, std::uint32_t right) const {
  const bool is_low = left < 256 && right < 256;
  const bool knows_left = is_low ? low_ids_[left] >= 0 : id_of(left) != nullptr;
  const bool knows_right = is_low ? low_ids_[right] >= 0 : id_of(right) != nullptr;
  if (!knows_left || !knows_right) return !merges_unknown_ && (has_all_bytes_ || knows_left || knows_right);
  return is_low ? !low_neighbours_[left][right] : neighbours_.find(pair_of(left, right)) == nullptr;
}

std::unique_ptr<Model::Memory> Bpe::new_memory() const { return std::make_unique<Memory>(); }

void Bpe::tokenize(std::string_view word, Model::Memory& memory, TokenIds& ids) const {
  auto& own = static_cast<Memory&>(memory);
  ignores_merges_ ? tokenize_whole(word, own, ids) : tokenize_parts(word, own, ids);
}

// Looks in the cache, and remembers what `compute` gives for a short word.
template <class Compute>
void Bpe::Memory::remember(std::string_view word, TokenIds& ids, Compute compute) {
  if (word.size() > WordCache::kLongest) return compute();
  const WordCache::Key key = WordCache::key_of(word);
  WordCache::Entry& entry = cache.entry(key);
  if (entry.key == key) {
    ids.insert(ids.end(), entry.ids.begin(), entry.ids.begin() + entry.count);
    return;
  }
  const std::size_t first = ids.size();
  compute();
  WordCache::store(entry, key, std::span(ids).subspan(first));
}

// A word that is a token needs no merges. Its parts may not be cached: as whole words they can have other tokens.
void Bpe::tokenize_whole(std::string_view word, Memory& memory, TokenIds& ids) const {
  memory.remember(word, ids, [&] {
    const auto found = whole_words_.find(word);
    if (found != whole_words_.end()) return ids.push_back(found->second);
    merge(word, memory);
    ids.insert(ids.end(), memory.symbols.begin(), memory.symbols.end());
  });
}

void Bpe::tokenize_parts(std::string_view word, Memory& memory, TokenIds& ids) const {
  if (word.size() < kCutFrom) return tokenize_part(word, memory, ids);
  std::size_t begin = 0;
  Atom left = atom_at(word, 0);
  for (std::size_t position = left.size; position < word.size();) {
    const Atom right = atom_at(word, position);
    if (may_cut(left.code, right.code)) {
      tokenize_part(word.substr(begin, position - begin), memory, ids);
      begin = position;
    }
    position += right.size;
    left = right;
  }
  tokenize_part(word.substr(begin), memory, ids);
}

void Bpe::tokenize_part(std::string_view part, Memory& memory, TokenIds& ids) const {
  memory.remember(part, ids, [&] {
    merge(part, memory);
    ids.insert(ids.end(), memory.symbols.begin(), memory.symbols.end());
  });
}

void Bpe::merge(std::string_view part, Memory& memory) const {
  start_symbols(part, memory);
  memory.symbols.size() <= kFew ? merge_few(memory.symbols, memory) : merge_many(memory.symbols, memory);
}

// The tokens of the word's atoms. An unknown token comes behind the byte tokens that follow it, as in `tokenizers`.
void Bpe::start_symbols(std::string_view part, Memory& memory) const {
  memory.symbols.clear();
  bool is_pending = false;
  const auto put_pending = [&] {
    if (is_pending) memory.symbols.push_back(*unknown_id_);
    is_pending = false;
  };
  for (std::size_t position = 0; position < part.size();) {
    const Atom atom = atom_at(part, position);
    position += atom.size;
    const TokenId* id = id_of(atom.code);
    if (id != nullptr) {
      put_pending();
      memory.symbols.push_back(*id);
    } else if (!(has_byte_fallback_ && append_bytes(atom.code, memory.symbols)) && unknown_) {
      if (!unknown_id_) {
        throw invalid("the text has a character that the tokenizer does not know, and the vocabulary lacks its token " +
                      *unknown_ + "; leave the character out, or pass token ids");
      }
      if (!fuses_unknown_) put_pending();
      is_pending = true;
    }
  }
  put_pending();
}

bool Bpe::append_bytes(std::uint32_t code, std::vector<TokenId>& symbols) const {
  const std::string text = is_byte_level_ ? byte_symbols()[code] : to_utf8(code);
  const auto id = [&](char byte) { return byte_ids_[static_cast<unsigned char>(byte)]; };
  if (!std::ranges::all_of(text, [&](char byte) { return id(byte).has_value(); })) return false;
  for (const char byte : text) symbols.push_back(*id(byte));
  return true;
}

// ---- merging --------------------------------------------------------------------------------------------------------

void Bpe::merge_few(std::vector<TokenId>& symbols, Memory& memory) const {
  std::size_t count = symbols.size();
  std::vector<std::uint32_t>& ranks = memory.ranks;  // of the pair that begins at each symbol
  ranks.assign(count, kNoRank);
  const auto set_rank = [&](std::size_t i) {
    const Merge* merge = i + 1 < count ? merge_of(symbols[i], symbols[i + 1]) : nullptr;
    ranks[i] = merge == nullptr ? kNoRank : merge->rank;
  };
  for (std::size_t i = 0; i + 1 < count; ++i) set_rank(i);
  while (count > 1) {
    const auto end = ranks.begin() + static_cast<std::ptrdiff_t>(count);
    const auto lowest = std::min_element(ranks.begin(), end);
    if (*lowest == kNoRank) break;
    const auto i = lowest - ranks.begin();
    const auto at = static_cast<std::size_t>(i);
    symbols[at] = merge_of(symbols[at], symbols[at + 1])->id;
    std::move(symbols.begin() + i + 2, symbols.begin() + static_cast<std::ptrdiff_t>(count), symbols.begin() + i + 1);
    std::move(ranks.begin() + i + 2, end, ranks.begin() + i + 1);
    --count;
    set_rank(at);
    if (at > 0) set_rank(at - 1);
  }
  symbols.resize(count);
}

// Keeps the pairs in a heap, and the symbols in a list: n log n.
void Bpe::merge_many(std::vector<TokenId>& symbols, Memory& memory) const {
  const std::size_t count = symbols.size();
  if (count >= kNone) throw invalid("a word of the text is too long for the tokenizer; pass it in parts");
  auto &before = memory.before, &after = memory.after;
  before.resize(count);
  after.resize(count);
  std::priority_queue<Memory::Candidate, std::vector<Memory::Candidate>, std::greater<>> heap;
  const auto consider = [&](std::uint32_t left) {
    const std::uint32_t right = after[left];
    if (right == kNone) return;
    const Merge* merge = merge_of(symbols[left], symbols[right]);
    if (merge != nullptr) heap.push({merge->rank, left, symbols[left], symbols[right], merge->id});
  };
  for (std::uint32_t i = 0; i < count; ++i) {
    before[i] = i == 0 ? kNone : i - 1;
    after[i] = i + 1 == count ? kNone : i + 1;
  }
  for (std::uint32_t i = 0; i < count; ++i) consider(i);
  std::vector<bool> is_gone(count);
  while (!heap.empty()) {
    const Memory::Candidate top = heap.top();
    heap.pop();
    const std::uint32_t left = top.position, right = after[left];
    if (is_gone[left] || right == kNone || symbols[left] != top.left || symbols[right] != top.right) continue;
    symbols[left] = top.id;
    is_gone[right] = true;
    after[left] = after[right];
    if (after[left] != kNone) before[after[left]] = left;
    if (before[left] != kNone) consider(before[left]);
    consider(left);
  }
  std::size_t written = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (!is_gone[i]) symbols[written++] = symbols[i];
  }
  symbols.resize(written);
}

}  // namespace megalodon::impl
