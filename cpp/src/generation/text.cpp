#include "generation/text.hpp"

#include <algorithm>

#include "error.hpp"
#include "utf8.hpp"

namespace megalodon::impl {

// ---- stop strings ---------------------------------------------------------------------------------------------------

StopScanner::StopScanner(std::vector<std::string> stop) : stop_(std::move(stop)) {
  for (std::size_t i = 0; i < stop_.size(); ++i) {
    const std::string& one = stop_[i];
    require_utf8(one, std::string("stop[").append(std::to_string(i)).append("]"));
    require(!one.empty(), "an empty stop string would end every text at once; expected non-empty strings, drop it");
    longest_ = std::max(longest_, one.size());
  }
}

std::string StopScanner::push(const std::string& text) {
  if (text.empty()) return "";
  held_ += text;
  const std::size_t match = first_match(), possible = first_possible_match();
  // A stop string that begins earlier wins, even if it is completed later.
  if (match <= possible && match < held_.size()) return end_at(match);
  std::string piece = held_.substr(0, possible);
  held_.erase(0, possible);
  return piece;
}

std::string StopScanner::flush() { return end_at(first_match()); }

std::string StopScanner::end_at(std::size_t position) {
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

std::size_t StopScanner::first_possible_match() const {
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
  const std::string* text = tokenizer_.text_of(token_id);
  return text == nullptr ? "" : stop_.push(decoder_.push(*text));
}

std::string TextStream::flush() {
  if (flushed_ || stopped()) {
    flushed_ = true;
    return "";
  }
  flushed_ = true;
  const std::string rest = stop_.push(decoder_.flush());
  return rest + stop_.flush();
}

}  // namespace megalodon::impl
