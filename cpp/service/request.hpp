// Parses and checks the body of POST /v1/completions.
#pragma once

#include <cstdint>
#include <megalodon.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "http.hpp"

namespace service {

struct Limits {
  std::size_t body_bytes = std::size_t{1} << 20;
  std::size_t prompt_tokens = 32768;
  std::int64_t new_tokens = 4096;
  std::int64_t vocab_size = INT64_MAX;  // token ids are in 0..vocab_size-1
  std::size_t stop_strings = 16, stop_bytes = 256;  // stop_bytes: of each string
};

struct CompletionRequest {
  std::string model;
  std::string text;                     // the prompt, unless it is token ids
  std::vector<std::int64_t> token_ids;  // the prompt
  bool is_text = false, stream = false, ignore_eos = false;
  std::int64_t max_tokens = 16;
  megalodon_sampling sampling = {1.0, 0, 1.0, 0.0, 0};
  std::vector<std::string> stop;
};

// The refusal of a prompt with too many tokens.
Refused too_long(std::size_t found, std::size_t most);

// Throws Refused, with status 413 for a prompt that is too long and 400 otherwise. `seed` is for a request without one.
CompletionRequest parse_request(std::string_view body, const Limits& limits, std::uint64_t seed);

}  // namespace service
