#include "text/unigram.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "error.hpp"
#include "text/json_fields.hpp"
#include "text/unicode.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr double kUnknownPenalty = 10;

// A number as Python's `tokenizers` reads it. Its reader of JSON divides the digits by a power of ten, which can round
// to a neighbour of the nearest number. Sums of scores that are nearly equal depend on it. The digits of the text in
// the file are those of the shortest text of the nearest number, which `number` is.
double rust_number(double number) {
  std::array<char, 32> text{};
  const auto end =
      std::to_chars(text.data(), text.data() + text.size(), std::abs(number), std::chars_format::scientific).ptr;
  std::uint64_t digits = 0;
  int exponent = 0, decimals = 0;
  bool is_behind_point = false;
  for (const char* at = text.data(); at != end; ++at) {
    if (*at == 'e') {
      std::from_chars(at[1] == '+' ? at + 2 : at + 1, end, exponent);
      break;
    }
    if (*at == '.') {
      is_behind_point = true;
    } else {
      digits = 10 * digits + static_cast<std::uint64_t>(*at - '0');
      decimals += is_behind_point ? 1 : 0;
    }
  }
  exponent -= decimals;
  const double power = std::strtod(("1e" + std::to_string(std::abs(exponent))).c_str(), nullptr);
  const auto value = static_cast<double>(digits);
  return std::copysign(exponent < 0 ? value / power : value * power, number);
}

}  // namespace

struct Unigram::Memory final : Model::Memory {
  // The best way to a place in the word. It ends with the token that begins at `begin`.
  struct Path {
    double score = 0;
    std::size_t begin = 0;
    TokenId id = kNone;
    bool is_reached = false;
  };
  WordCache cache;
  std::vector<Path> paths;                         // to each place from `part_begin` on
  std::size_t part_begin = 0;                      // all before it is decided
  std::size_t reach = 0;                           // the last place that has a path
  std::size_t unknown_begin = 0, unknown_end = 0;  // unknown characters that are not written yet
  std::vector<Path> reversed;

  Path& path_to(std::size_t place) {
    if (place - part_begin >= paths.size()) paths.resize(place - part_begin + 1);
    return paths[place - part_begin];
  }
};

// ---- reading it -----------------------------------------------------------------------------------------------------

Unigram::Unigram(const json& file) : has_byte_fallback_(field_or<bool>(file, "byte_fallback", false)), nodes_(1) {
  first_.fill(kNone);
  const auto& vocabulary = part_of(file, "vocab");
  if (!vocabulary.is_array() || vocabulary.empty()) throw NotSupported("a Unigram model without a vocabulary");
  if (field_or<double>(file, "alpha", 0) != 0) throw NotSupported("a Unigram model that samples");
  double lowest = std::numeric_limits<double>::infinity();
  std::size_t bytes = 0;
  for (const json& one : vocabulary) {
    if (!one.is_array() || one.size() != 2 || !one[0].is_string() || !one[1].is_number()) {
      throw NotSupported("a token that is not a text and a score");
    }
    bytes += one[0].get_ref<const std::string&>().size();
  }
  children_ = FlatMap<std::uint32_t>(bytes);
  TokenId id = 0;
  for (const json& one : vocabulary) {
    const double score = rust_number(one[1].get<double>());
    vocabulary_.add(one[0].get<std::string>(), id);
    insert(one[0].get_ref<const std::string&>(), id, score);
    lowest = std::min(lowest, score);
    ++id;
  }
  unknown_score_ = lowest - kUnknownPenalty;
  if (file.contains("unk_id") && !file["unk_id"].is_null()) {
    unknown_id_ = field<TokenId>(file, "unk_id");
    if (*unknown_id_ >= vocabulary.size()) throw NotSupported("an unk_id outside the vocabulary");
  }
  for (std::size_t byte = 0; byte < byte_ids_.size(); ++byte) {
    byte_ids_[byte] = vocabulary_.id_of(byte_token(static_cast<unsigned char>(byte)));
  }
}

std::uint32_t Unigram::child_of(std::uint32_t node, char byte) const {
  const auto label = static_cast<unsigned char>(byte);
  if (node == 0) return first_[label];
  const std::uint32_t* child = children_.find((std::uint64_t{node} << 8) | label);
  return child == nullptr ? kNone : *child;
}

void Unigram::insert(std::string_view token, TokenId id, double score) {
  std::uint32_t node = 0;
  for (const char byte : token) {
    std::uint32_t child = child_of(node, byte);
    if (child == kNone) {
      child = static_cast<std::uint32_t>(nodes_.size());
      nodes_.emplace_back();
      const auto label = static_cast<unsigned char>(byte);
      if (node == 0) {
        first_[label] = child;
      } else {
        children_.put((std::uint64_t{node} << 8) | label, child);
      }
    }
    node = child;
  }
  if (node != 0) nodes_[node] = {id, score};
}

// ---- words ----------------------------------------------------------------------------------------------------------

std::unique_ptr<Model::Memory> Unigram::new_memory() const { return std::make_unique<Memory>(); }

void Unigram::tokenize(std::string_view word, Model::Memory& memory, TokenIds& ids) const {
  auto& own = static_cast<Memory&>(memory);
  if (word.size() > WordCache::kLongest) return compute(word, own, ids);
  const WordCache::Key key = WordCache::key_of(word);
  WordCache::Entry& entry = own.cache.entry(key);
  if (entry.key == key) {
    ids.insert(ids.end(), entry.ids.begin(), entry.ids.begin() + entry.count);
    return;
  }
  const std::size_t first = ids.size();
  compute(word, own, ids);
  WordCache::store(entry, key, std::span(ids).subspan(first));
}

// Where no token reaches over a place, the tokens before it are decided, and the memory for them is free again.
void Unigram::compute(std::string_view word, Memory& memory, TokenIds& ids) const {
  memory.paths.assign(1, {.is_reached = true});
  memory.part_begin = memory.reach = 0;
  memory.unknown_begin = memory.unknown_end = 0;
  for (std::size_t position = 0; position < word.size(); position += character_length(word[position])) {
    if (position > memory.part_begin && memory.reach == position) finish_part(word, position, memory, ids);
    extend_paths(word, position, memory);
  }
  finish_part(word, word.size(), memory, ids);
  put_unknown(word.substr(memory.unknown_begin, memory.unknown_end - memory.unknown_begin), ids);
}

void Unigram::extend_paths(std::string_view word, std::size_t position, Memory& memory) const {
  const double score = memory.path_to(position).score;
  const std::size_t one_character = position + character_length(word[position]);
  const auto offer = [&](std::size_t end, double candidate, TokenId id) {
    memory.reach = std::max(memory.reach, end);
    Memory::Path& path = memory.path_to(end);
    if (path.is_reached && candidate <= path.score) return false;
    path = {candidate, position, id, true};
    return true;
  };
  bool has_one_character = false;
  std::uint32_t node = 0;
  for (std::size_t end = position; end < word.size();) {
    node = child_of(node, word[end++]);
    if (node == kNone) break;
    if (nodes_[node].id == kNone) continue;
    offer(end, nodes_[node].score + score, nodes_[node].id);
    has_one_character = has_one_character || end == one_character;
  }
  if (!has_one_character && offer(one_character, unknown_score_ + score, unknown_id_.value_or(kNone)) && !unknown_id_) {
    throw invalid(
        "the text has a character that the tokenizer does not know, and the tokenizer has no unknown token; leave the "
        "character out, or pass token ids");
  }
}

void Unigram::finish_part(std::string_view word, std::size_t end, Memory& memory, TokenIds& ids) const {
  memory.reversed.clear();
  for (std::size_t place = end; place > memory.part_begin; place = memory.reversed.back().begin) {
    memory.reversed.push_back(memory.path_to(place));
  }
  std::size_t begin = memory.part_begin;
  for (auto at = memory.reversed.rbegin(); at != memory.reversed.rend(); ++at) {
    const std::size_t token_end = std::next(at) == memory.reversed.rend() ? end : std::next(at)->begin;
    if (unknown_id_ == at->id) {
      if (memory.unknown_begin == memory.unknown_end) memory.unknown_begin = begin;
      memory.unknown_end = token_end;
    } else {
      put_unknown(word.substr(memory.unknown_begin, memory.unknown_end - memory.unknown_begin), ids);
      memory.unknown_begin = memory.unknown_end = token_end;
      ids.push_back(at->id);
    }
    begin = token_end;
  }
  const double score = memory.path_to(end).score;
  memory.paths.assign(1, {.score = score, .is_reached = true});
  memory.part_begin = end;
}

// Unknown characters beside each other become one token, or the tokens of their bytes.
void Unigram::put_unknown(std::string_view text, TokenIds& ids) const {
  if (text.empty()) return;
  if (const auto id = vocabulary_.id_of(text)) return ids.push_back(*id);
  const auto id_of = [&](char byte) { return byte_ids_[static_cast<unsigned char>(byte)]; };
  if (!has_byte_fallback_ || !std::ranges::all_of(text, [&](char byte) { return id_of(byte).has_value(); }))
    return ids.push_back(*unknown_id_);
  for (const char byte : text) ids.push_back(*id_of(byte));
}

}  // namespace megalodon::impl
