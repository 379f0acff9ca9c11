#include "bundle/tokenizer.hpp"

#include <algorithm>

#include "error.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

// The printable character that stands for each byte in a vocabulary, by GPT-2's `bytes_to_unicode`.
std::array<std::string, 256> byte_symbols() {
  std::array<std::string, 256> symbols;
  int replacement = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    const int character = printable ? byte : replacement++;
    std::string& symbol = symbols[static_cast<std::size_t>(byte)];
    if (character < 0x80) {
      symbol = static_cast<char>(character);
    } else {
      symbol = {static_cast<char>(0xC0 | (character >> 6)), static_cast<char>(0x80 | (character & 0x3F))};
    }
  }
  return symbols;
}

// Whether an option of a tokenizer file is absent, null, false or empty.
bool is_off(const json& owner, const char* key) {
  const json value = owner.value(key, json());
  return value.is_null() || value == false || value == "";
}

std::string type_of(const json& owner, const char* key) {
  const json value = owner.is_object() ? owner.value(key, json()) : json();
  const json type = value.is_object() ? value.value("type", json()) : json();
  return type.is_string() ? type.get<std::string>() : "none";
}

// Whether the post-processor leaves the tokens as they are.
bool post_processor_is_neutral(const json& file) {
  const std::string type = type_of(file, "post_processor");
  if (type == "TemplateProcessing") {
    const json single = file["post_processor"].value("single", json());
    return single.is_array() && single.size() == 1 && single[0].is_object() && single[0].contains("Sequence");
  }
  return type == "ByteLevel" || is_off(file, "post_processor");
}

// Why a tokenizer is not byte-level; empty if it is.
std::string why_not_byte_level(const json& file) {
  if (!file.is_object() || type_of(file, "model") != "BPE") return "its model is " + type_of(file, "model");
  const json& model = file["model"];
  const json merges = model.value("merges", json()), vocabulary = model.value("vocab", json());
  if (!merges.is_array() || !merges.empty()) return "it merges bytes";
  if (!vocabulary.is_object() || vocabulary.size() != 256) return "its vocabulary is not the 256 bytes";
  if (!is_off(model, "continuing_subword_prefix") || !is_off(model, "end_of_word_suffix")) return "it marks words";
  if (!is_off(file, "normalizer")) return "it normalizes text";
  if (!is_off(file, "truncation") || !is_off(file, "padding")) return "it truncates or pads";
  if (type_of(file, "pre_tokenizer") != "ByteLevel" || !is_off(file["pre_tokenizer"], "add_prefix_space")) {
    return "its pre-tokenizer is " + type_of(file, "pre_tokenizer") + ", or adds a space";
  }
  if (type_of(file, "decoder") != "ByteLevel") return "its decoder is " + type_of(file, "decoder");
  return post_processor_is_neutral(file) ? "" : "its post-processor is " + type_of(file, "post_processor");
}

}  // namespace

Tokenizer::Tokenizer(const json& file) {
  const auto refused = [](const std::string& why) {
    return unavailable("the bundle's tokenizer is not byte-level (" + why +
                       "), and this library reads no others; pass token ids");
  };
  if (const std::string why = why_not_byte_level(file); !why.empty()) throw refused(why);
  const std::array<std::string, 256> symbols = byte_symbols();
  for (int byte = 0; byte < 256; ++byte) {
    const json id = file["model"]["vocab"].value(symbols[static_cast<std::size_t>(byte)], json());
    if (!id.is_number_unsigned()) throw refused("byte " + std::to_string(byte) + " has no token");
    ids_[static_cast<std::size_t>(byte)] = id;
    bytes_[id] = byte;
  }
  const json added = file.value("added_tokens", json::array());
  for (const json& token : added) {
    const bool plain = token.is_object() && token.value("special", json()) == true && is_off(token, "single_word") &&
                       is_off(token, "lstrip") && is_off(token, "rstrip") && is_off(token, "normalized");
    const json id = plain ? token.value("id", json()) : json(),
               content = plain ? token.value("content", json()) : json();
    if (!id.is_number_unsigned() || !content.is_string() || content == "" || bytes_.contains(id)) {
      throw refused("an added token is more than special");
    }
    special_.emplace_back(content, id);
  }
  std::ranges::stable_sort(special_, std::greater{}, [](const auto& token) { return token.first.size(); });
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text) const {
  std::vector<std::int64_t> ids;
  while (!text.empty()) {
    const auto token = std::ranges::find_if(special_, [&](const auto& one) { return text.starts_with(one.first); });
    ids.push_back(token != special_.end() ? token->second : ids_[static_cast<unsigned char>(text[0])]);
    text.remove_prefix(token != special_.end() ? token->first.size() : 1);
  }
  return ids;
}

int Tokenizer::byte_of(std::int64_t token_id) const {
  const auto found = bytes_.find(token_id);
  return found == bytes_.end() ? -1 : found->second;
}

}  // namespace megalodon::impl
