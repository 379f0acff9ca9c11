// Decoders turn tokens into text, token by token.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::impl {

// Bytes to UTF-8. Bytes that are not UTF-8 become U+FFFD, one for each beginning of a character.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  std::string flush();

 private:
  std::string incomplete_;  // the bytes so far of a character that is not complete
};

// The decoder of a tokenizer.json.
class Decoder {
 public:
  // Throws NotSupported for a kind that is not known here.
  explicit Decoder(const nlohmann::json& file);

 private:
  enum class Kind { replace, byte_fallback, fuse, strip, metaspace, byte_level };
  struct Step {
    Kind kind;
    std::string from, to;      // replace; `from` is the character of strip and metaspace
    std::size_t count = 0;     // of the characters that strip removes at most
    bool drops_first = false;  // metaspace
    bool is_fused = false;     // all that comes to this step is one token
  };

  void add(const nlohmann::json& file);
  void require_tokens(const std::string& type) const;

  std::vector<Step> steps_;
  bool is_fused_ = false;
  bool has_spaces_ = false;  // there is no decoder: spaces stand between tokens

 public:
  // The tokens of one stream. The pieces, joined, are Python's `tokenizer.decode` of all tokens.
  class Stream {
   public:
    explicit Stream(const Decoder& decoder) : decoder_(&decoder), states_(decoder.steps_.size()) {}
    std::string push(const std::string& token);
    std::string flush();

   private:
    struct State {
      std::string bytes;      // byte_fallback: of the tokens so far
      Utf8Stream utf8;        // byte_level
      bool is_begun = false;  // metaspace: the first token is past; strip: the beginning is decided
      std::size_t count = 0;  // strip: characters that were removed
    };
    void run(std::size_t step, std::string token, std::string& out);
    void end_bytes(std::size_t step, std::string& out);

    const Decoder* decoder_;
    std::vector<State> states_;
    bool is_begun_ = false;
  };
};

}  // namespace megalodon::impl
