#include "text/decoder.hpp"

#include <optional>

#include "text/byte_symbols.hpp"
#include "text/json_fields.hpp"
#include "text/unicode.hpp"
#include "utf8.hpp"

namespace megalodon::impl {
namespace {

using nlohmann::json;

constexpr const char* kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// The byte of a token such as <0x0A>. Rust reads the digits, so a sign is one of them.
std::optional<char> byte_of(const std::string& token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  const auto digit = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
  };
  const int high = token[3] == '+' ? 0 : digit(token[3]), low = digit(token[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<char>(16 * high + low);
}

std::string replace_all(const std::string& text, const std::string& from, const std::string& to) {
  std::string changed;
  std::size_t done = 0;
  for (std::size_t at = 0; (at = text.find(from, done)) != std::string::npos; done = at + from.size()) {
    changed.append(text, done, at - done).append(to);
  }
  return changed.append(text, done);
}

std::string one_character(const json& file, const char* name) {
  auto text = field<std::string>(file, name);
  if (text.empty() || character_length(text[0]) != text.size()) {
    throw NotSupported(std::string("a decoder whose ") + name + " is not one character");
  }
  return text;
}

}  // namespace

// ---- bytes ----------------------------------------------------------------------------------------------------------

std::string Utf8Stream::push(std::string_view bytes) {
  std::string text;
  for (const char one : bytes) {
    const auto byte = static_cast<unsigned char>(one);
    if (!incomplete_.empty()) {
      const auto lead = static_cast<unsigned char>(incomplete_[0]);
      if (utf8_continues(lead, incomplete_.size(), byte)) {
        incomplete_ += one;
        if (incomplete_.size() == utf8_length(lead)) {
          text += incomplete_;
          incomplete_.clear();
        }
        continue;
      }
      text += kReplacement;
      incomplete_.clear();
    }
    switch (utf8_length(byte)) {
      case 0:
        text += kReplacement;
        break;
      case 1:
        text += one;
        break;
      default:
        incomplete_ = one;
    }
  }
  return text;
}

std::string Utf8Stream::flush() {
  const bool is_open = !incomplete_.empty();
  incomplete_.clear();
  return is_open ? kReplacement : "";
}

// ---- reading it -----------------------------------------------------------------------------------------------------

Decoder::Decoder(const json& file) {
  if (file.is_null()) {
    has_spaces_ = true;
  } else {
    add(file);
  }
}

void Decoder::require_tokens(const std::string& type) const {
  if (is_fused_) throw NotSupported("the decoder " + type + " behind one that joins tokens");
}

void Decoder::add(const json& file) {
  const auto type = field<std::string>(file, "type");
  Step step{.kind = Kind::fuse, .from = "", .to = "", .is_fused = is_fused_};
  if (type == "Sequence") {
    for (const json& one : field<json>(file, "decoders")) add(one);
    return;
  }
  if (type == "Fuse") {
    is_fused_ = true;
  } else if (type == "ByteLevel") {
    require_tokens(type);
    step.kind = Kind::byte_level;
    is_fused_ = true;
  } else if (type == "ByteFallback") {
    require_tokens(type);
    step.kind = Kind::byte_fallback;
  } else if (type == "Replace") {
    require_tokens(type);
    const PatternText pattern = pattern_of(file);
    if (pattern.is_expression) throw NotSupported("the decoder Replace with an expression");
    step.kind = Kind::replace;
    step.from = pattern.text;
    step.to = field<std::string>(file, "content");
  } else if (type == "Strip") {
    if (field<std::size_t>(file, "stop") != 0) throw NotSupported("the decoder Strip that removes an end");
    step.kind = Kind::strip;
    step.from = one_character(file, "content");
    step.count = field<std::size_t>(file, "start");
  } else if (type == "Metaspace") {
    require_tokens(type);
    step.kind = Kind::metaspace;
    step.from = one_character(file, "replacement");
    step.drops_first = field_or<bool>(file, "add_prefix_space", true) &&
                       field_or<std::string>(file, "prepend_scheme", "always") != "never";
  } else {
    throw NotSupported("the decoder " + type);
  }
  steps_.push_back(std::move(step));
}

// ---- streams --------------------------------------------------------------------------------------------------------

std::string Decoder::Stream::push(const std::string& token) {
  std::string out;
  if (decoder_->has_spaces_ && is_begun_) out = ' ';
  is_begun_ = true;
  run(0, token, out);
  return out;
}

std::string Decoder::Stream::flush() {
  std::string out;
  for (std::size_t step = 0; step < states_.size(); ++step) {
    if (decoder_->steps_[step].kind == Kind::byte_fallback) end_bytes(step, out);
    if (decoder_->steps_[step].kind == Kind::byte_level) {
      std::string rest = states_[step].utf8.flush();
      if (!rest.empty()) run(step + 1, std::move(rest), out);
    }
  }
  return out;
}

// A run of byte tokens is one text if it is UTF-8. Otherwise each of them becomes U+FFFD, a token of its own.
void Decoder::Stream::end_bytes(std::size_t step, std::string& out) {
  std::string bytes;
  bytes.swap(states_[step].bytes);
  if (bytes.empty()) return;
  if (is_utf8(bytes)) return run(step + 1, std::move(bytes), out);
  for (std::size_t i = 0; i < bytes.size(); ++i) run(step + 1, kReplacement, out);
}

void Decoder::Stream::run(std::size_t step, std::string token, std::string& out) {
  if (step == states_.size()) {
    out += token;
    return;
  }
  const Step& own = decoder_->steps_[step];
  State& state = states_[step];
  switch (own.kind) {
    case Kind::fuse:
      break;
    case Kind::byte_level:
      token = state.utf8.push(bytes_of_symbols(token).value_or(token));
      break;
    case Kind::replace:
      token = replace_all(token, own.from, own.to);
      break;
    case Kind::metaspace:
      token = replace_all(token, own.from, state.is_begun || !own.drops_first ? " " : "");
      state.is_begun = true;
      break;
    case Kind::byte_fallback:
      if (const auto byte = byte_of(token)) {
        state.bytes += *byte;
        return;
      }
      end_bytes(step, out);
      break;
    case Kind::strip: {
      if (!own.is_fused) state = {};
      std::size_t begin = 0;
      while (!state.is_begun && begin < token.size()) {
        state.is_begun = state.count == own.count || !std::string_view(token).substr(begin).starts_with(own.from);
        if (state.is_begun) break;
        ++state.count;
        begin += own.from.size();
      }
      token.erase(0, begin);
    }
  }
  run(step + 1, std::move(token), out);
}

}  // namespace megalodon::impl
