// Byte-level tokenizers, and token ids to text, piece by piece, as megalodon_export/text.py does it.
#pragma once

#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::impl {

// A tokenizer.json whose tokens are the 256 bytes and special tokens.
class Tokenizer {
 public:
  // Error MEGALODON_UNAVAILABLE for any other kind of tokenizer.
  explicit Tokenizer(const nlohmann::json& file);

  std::vector<std::int64_t> encode(std::string_view text) const;
  // The byte of a token; -1 for special tokens, and ids that it does not know: they have no text.
  int byte_of(std::int64_t token_id) const;

 private:
  std::array<std::int64_t, 256> ids_{};
  std::map<std::int64_t, int> bytes_;
  std::vector<std::pair<std::string, std::int64_t>> special_;  // the longest first
};

// Passes text through up to the first stop string; holds back what may be the beginning of one.
class StopScanner {
 public:
  explicit StopScanner(std::vector<std::string> stop);
  std::string push(const std::string& text);
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  std::string stop_at(std::size_t position);
  std::size_t first_match() const;
  std::size_t first_opening() const;

  std::vector<std::string> stop_;
  std::size_t longest_ = 0;
  std::string held_;
  bool stopped_ = false;
};

// Decodes one stream of token ids and ends it at the first stop string. What is no UTF-8 becomes U+FFFD.
class TextStream {
 public:
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop)
      : tokenizer_(tokenizer), stop_(std::move(stop)) {}
  std::string push(std::int64_t token_id);
  std::string flush();
  bool stopped() const { return stop_.stopped(); }

 private:
  std::string decode(unsigned char byte);

  const Tokenizer& tokenizer_;
  StopScanner stop_;
  std::string open_;  // an incomplete character
  bool flushed_ = false;
};

}  // namespace megalodon::impl
