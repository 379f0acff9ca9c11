#include "text/tokenizer.hpp"

#include "error.hpp"
#include "text/bpe.hpp"
#include "text/json_fields.hpp"
#include "text/unicode.hpp"
#include "text/unigram.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr std::size_t kLongestKept = std::size_t{1} << 20;  // bytes of a text whose memory is kept for the next one

// Appends the tokens that a post-processor puts before and after a text.
void add_post_processor(const json& file, TokenIds& before, TokenIds& after);

void add_template(const json& file, TokenIds& before, TokenIds& after) {
  const auto tokens = field<json>(file, "special_tokens");
  std::size_t texts = 0;
  for (const json& piece : field<json>(file, "single")) {
    if (piece.contains("Sequence")) {
      if (field<std::string>(piece["Sequence"], "id") != "A" || ++texts > 1) {
        throw NotSupported("a template that has the text more than once");
      }
      continue;
    }
    const auto token = field<json>(tokens, field<std::string>(field<json>(piece, "SpecialToken"), "id").c_str());
    for (const json& id : field<json>(token, "ids")) (texts == 0 ? before : after).push_back(id.get<TokenId>());
  }
  if (texts == 0) throw NotSupported("a template without the text");
}

void add_sequence(const json& file, TokenIds& before, TokenIds& after) {
  for (const json& one : field<json>(file, "processors")) {
    const bool has_tokens = !before.empty() || !after.empty();
    const std::size_t count = before.size() + after.size();
    add_post_processor(one, before, after);
    if (has_tokens && before.size() + after.size() > count) throw NotSupported("two post-processors that add tokens");
  }
}

void add_post_processor(const json& file, TokenIds& before, TokenIds& after) {
  if (file.is_null()) return;
  const auto type = field<std::string>(file, "type");
  if (type == "ByteLevel") return;  // it changes offsets alone
  if (type == "TemplateProcessing") return add_template(file, before, after);
  if (type == "Sequence") return add_sequence(file, before, after);
  if (type == "BertProcessing" || type == "RobertaProcessing") {
    before.push_back(field<std::pair<std::string, TokenId>>(file, "cls").second);
    after.push_back(field<std::pair<std::string, TokenId>>(file, "sep").second);
    return;
  }
  throw NotSupported("the post-processor " + type);
}

}  // namespace

std::unique_ptr<Model> read_model(const json& file, bool is_byte_level) {
  if (!file.is_object()) throw NotSupported("no model");
  // Older files do not name the type.
  const auto type = field_or<std::string>(file, "type", file.contains("merges") ? "BPE" : "of no type");
  if (type == "BPE") return std::make_unique<Bpe>(file, is_byte_level);
  if (type != "Unigram") throw NotSupported("the model " + type);
  if (is_byte_level) throw NotSupported("the model Unigram behind ByteLevel");
  return std::make_unique<Unigram>(file);
}

// ---- reading it -----------------------------------------------------------------------------------------------------

struct Tokenizer::Memory {
  NormalizedText normalized;
  PreTokenizers::Memory pre_tokenizers;
  std::unique_ptr<Model::Memory> model;
};

Tokenizer::Parts Tokenizer::read(const json& file) {
  try {
    if (!file.is_object()) throw NotSupported("something other than an object");
    for (const char* name : {"truncation", "padding"}) {
      if (!part_of(file, name).is_null()) throw NotSupported(std::string(name));
    }
    auto normalizer = read_normalizer(part_of(file, "normalizer"));
    PreTokenizers pre_tokenizers(part_of(file, "pre_tokenizer"));
    auto model = read_model(part_of(file, "model"), pre_tokenizers.is_byte_level());
    auto added = std::make_unique<AddedTokens>(part_of(file, "added_tokens"), model->vocabulary(), normalizer.get());
    TokenIds before, after;
    add_post_processor(part_of(file, "post_processor"), before, after);
    return {
        std::move(normalizer), std::move(pre_tokenizers),        std::move(model), std::move(added), std::move(before),
        std::move(after),      Decoder(part_of(file, "decoder"))};
  } catch (const NotSupported& error) {
    throw unavailable(std::string("this library does not read the bundle's tokenizer.json, which has ") + error.what() +
                      "; pass token ids");
  } catch (const json::exception& error) {
    throw unavailable(std::string("this library does not read the bundle's tokenizer.json (") + error.what() +
                      "); pass token ids");
  }
}

Tokenizer::Tokenizer(const json& file) : parts_(read(file)) {}

Tokenizer::~Tokenizer() = default;

// ---- text to ids ----------------------------------------------------------------------------------------------------

std::unique_ptr<Tokenizer::Memory> Tokenizer::take_memory() const {
  {
    const std::lock_guard lock(mutex_);
    if (!free_memories_.empty()) {
      auto memory = std::move(free_memories_.back());
      free_memories_.pop_back();
      return memory;
    }
  }
  return std::make_unique<Memory>(NormalizedText{}, parts_.pre_tokenizers.new_memory(), parts_.model->new_memory());
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text) const {
  auto memory = take_memory();
  TokenIds ids = parts_.before;
  parts_.added->before_normalizing().split(text, [&](const TokenFinder::Part& part) {
    if (part.token != nullptr) return ids.push_back(part.token->id);
    encode_plain(text.substr(part.begin, part.end - part.begin), part.begin == 0, *memory, ids);
  });
  ids.insert(ids.end(), parts_.after.begin(), parts_.after.end());
  if (text.size() <= kLongestKept) {
    const std::lock_guard lock(mutex_);
    free_memories_.push_back(std::move(memory));
  }
  return ids;
}

// A text without added tokens that are found before it is normalized.
void Tokenizer::encode_plain(std::string_view text, bool is_start, Memory& memory, TokenIds& ids) const {
  const std::size_t first = is_start ? character_length(text[0]) : 0;
  Piece whole{text, first};
  if (parts_.normalizer) {
    memory.normalized.text.assign(text);
    memory.normalized.at_start = first;
    parts_.normalizer->apply(memory.normalized);
    whole = {memory.normalized.text, memory.normalized.at_start};
  }
  const auto tokenize = [&](const Piece& word) { parts_.model->tokenize(word.text, *memory.model, ids); };
  const PieceSink sink(tokenize);
  parts_.added->after_normalizing().split(whole.text, [&](const TokenFinder::Part& part) {
    if (part.token != nullptr) return ids.push_back(part.token->id);
    const std::size_t at_start = part.begin < whole.at_start ? std::min(whole.at_start, part.end) - part.begin : 0;
    parts_.pre_tokenizers.split({whole.text.substr(part.begin, part.end - part.begin), at_start}, memory.pre_tokenizers,
                                sink);
  });
}

// ---- ids to text ----------------------------------------------------------------------------------------------------

const std::string* Tokenizer::text_of(std::int64_t token_id) const {
  const AddedToken* added = parts_.added->token_of(token_id);
  if (added != nullptr && added->is_special) return nullptr;
  const std::string* token = added != nullptr ? &added->content : parts_.model->vocabulary().token_of(token_id);
  return token == nullptr || parts_.added->is_special(*token) ? nullptr : token;
}

}  // namespace megalodon::impl
