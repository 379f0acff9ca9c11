// Turns token ids into text piece by piece, and ends the text at a stop string. Python's
// `megalodon_export.generation.text` gives the same pieces.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "text/tokenizer.hpp"

namespace megalodon::impl {

// Passes text through up to the first stop string. It holds text back while a stop string may have begun in it.
//
//     stop "END":  push("a E") -> "a "   push("X") -> "EX"   push("END") -> "", stopped
class StopScanner {
 public:
  explicit StopScanner(std::vector<std::string> stop);
  std::string push(const std::string& text);
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  std::string end_at(std::size_t position);
  std::size_t first_match() const;
  std::size_t first_possible_match() const;

  std::vector<std::string> stop_;
  std::size_t longest_ = 0;
  std::string held_;
  bool stopped_ = false;
};

// Decodes the token ids of one stream to UTF-8. Bytes that are not UTF-8 become U+FFFD. No piece ends inside a
// character.
class TextStream {
 public:
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop)
      : tokenizer_(tokenizer), decoder_(tokenizer.decoder()), stop_(std::move(stop)) {}
  std::string push(std::int64_t token_id);
  std::string flush();
  bool stopped() const { return stop_.stopped(); }

 private:
  const Tokenizer& tokenizer_;
  Decoder::Stream decoder_;
  StopScanner stop_;
  bool flushed_ = false;
};

}  // namespace megalodon::impl
