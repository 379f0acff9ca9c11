// Any bytes give a request within the limits, or Refused with a message of printable characters.
#include "request.hpp"

#include <cstdint>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const service::Limits limits{.body_bytes = 1 << 16, .prompt_tokens = 100, .new_tokens = 100};
  try {
    const auto request = service::parse_request({reinterpret_cast<const char*>(data), size}, limits, 1);
    if (request.max_tokens < 1 || request.max_tokens > limits.new_tokens) std::abort();
    if (request.token_ids.size() > limits.prompt_tokens || request.stop.size() > limits.stop_strings) std::abort();
    if (request.is_text && !request.token_ids.empty()) std::abort();
    for (const std::int64_t id : request.token_ids) {
      if (id < 0) std::abort();
    }
    for (const std::string& stop : request.stop) {
      if (stop.empty() || stop.size() > limits.stop_bytes || stop.find('\0') != stop.npos) std::abort();
    }
  } catch (const service::Refused& error) {
    if (error.status != 400 && error.status != 413) std::abort();
    for (const char c : std::string_view(error.what())) {
      if (c < ' ' || c > '~') std::abort();
    }
  }
  return 0;
}
