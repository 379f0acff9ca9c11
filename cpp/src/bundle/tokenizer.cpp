#include "bundle/tokenizer.hpp"

#include <algorithm>

#include "error.hpp"
#include "text_format.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr const char* kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// The printable character that stands for each byte: GPT-2's `bytes_to_unicode`.
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

bool is_off(const json& owner, const char* key) {
  const json value = owner.value(key, json());
  return value.is_null() || value == false || value == "";
}

std::string type_of(const json& owner, const char* key) {
  const json value = owner.is_object() ? owner.value(key, json()) : json();
  const json type = value.is_object() ? value.value("type", json()) : json();
  return type.is_string() ? type.get<std::string>() : "none";
}

// Whether a post-processor leaves the tokens as they are.
bool changes_nothing(const json& file) {
  const std::string type = type_of(file, "post_processor");
  if (type == "TemplateProcessing") {
    const json single = file["post_processor"].value("single", json());
    return single.is_array() && single.size() == 1 && single[0].is_object() && single[0].contains("Sequence");
  }
  return type == "ByteLevel" || is_off(file, "post_processor");
}

// Why a tokenizer is not one of bytes; empty if it is.
std::string other_kind(const json& file) {
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
  return changes_nothing(file) ? "" : "its post-processor is " + type_of(file, "post_processor");
}

// Whether `byte` may follow the bytes of an incomplete character (Unicode, table 3-7).
bool continues(const std::string& open, unsigned char byte) {
  const auto lead = static_cast<unsigned char>(open[0]);
  const unsigned char low = open.size() > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = open.size() > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  return byte >= low && byte <= high;
}

std::size_t length_of(unsigned char lead) { return lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4; }

}  // namespace

Tokenizer::Tokenizer(const json& file) {
  const auto refused = [](const std::string& why) {
    return unavailable("the bundle's tokenizer is not byte-level (" + why +
                       "), and this library reads no others; pass token ids");
  };
  if (const std::string why = other_kind(file); !why.empty()) throw refused(why);
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

// ---- stop strings ---------------------------------------------------------------------------------------------------

StopScanner::StopScanner(std::vector<std::string> stop) : stop_(std::move(stop)) {
  for (const std::string& one : stop_) {
    require(!one.empty(), "an empty stop string would end every text at once; expected non-empty strings, drop it");
    longest_ = std::max(longest_, one.size());
  }
}

std::string StopScanner::push(const std::string& text) {
  if (text.empty()) return "";
  held_ += text;
  const std::size_t match = first_match(), opening = first_opening();
  // One that began earlier would win, even if it is completed later.
  if (match <= opening && match < held_.size()) return stop_at(match);
  std::string piece = held_.substr(0, opening);
  held_.erase(0, opening);
  return piece;
}

std::string StopScanner::flush() { return stop_at(first_match()); }

std::string StopScanner::stop_at(std::size_t position) {
  stopped_ = stopped_ || position < held_.size();
  std::string piece = held_.substr(0, position);
  held_.clear();
  return piece;
}

std::size_t StopScanner::first_match() const {
  std::size_t first = held_.size();
  for (const std::string& one : stop_) first = std::min(first, held_.find(one));
  return first;
}

std::size_t StopScanner::first_opening() const {
  const std::size_t size = held_.size();
  for (std::size_t start = size + 1 > longest_ ? size + 1 - longest_ : 0; start < size; ++start) {
    const std::string_view tail = std::string_view(held_).substr(start);
    if (std::ranges::any_of(stop_, [&](const std::string& one) { return one.starts_with(tail); })) return start;
  }
  return size;
}

// ---- text -----------------------------------------------------------------------------------------------------------

std::string TextStream::push(std::int64_t token_id) {
  if (flushed_) throw invalid("push after flush: this stream has ended; make a new one for the next text");
  require(token_id >= 0,
          "token id is " + std::to_string(token_id) + ", expected >= 0; do not push padding or ignored labels");
  if (stopped()) return "";
  const int byte = tokenizer_.byte_of(token_id);
  return byte < 0 ? "" : stop_.push(decode(static_cast<unsigned char>(byte)));
}

std::string TextStream::flush() {
  if (flushed_ || stopped()) {
    flushed_ = true;
    return "";
  }
  flushed_ = true;
  const std::string rest = stop_.push(open_.empty() ? "" : kReplacement);
  return rest + stop_.flush();
}

std::string TextStream::decode(unsigned char byte) {
  std::string text;
  if (!open_.empty()) {
    if (continues(open_, byte)) {
      open_ += static_cast<char>(byte);
      if (open_.size() == length_of(static_cast<unsigned char>(open_[0]))) text.swap(open_);
      return text;
    }
    text = kReplacement;
    open_.clear();
  }
  if (byte < 0x80) {
    text += static_cast<char>(byte);
  } else if (byte >= 0xC2 && byte <= 0xF4) {
    open_ = static_cast<char>(byte);
  } else {
    text += kReplacement;
  }
  return text;
}

}  // namespace megalodon::impl
