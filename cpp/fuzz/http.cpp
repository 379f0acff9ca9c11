// Fuzzes the service's reader of HTTP requests. However the bytes arrive, they are the same requests.
#include "http.hpp"

#include <cstdint>
#include <cstdlib>
#include <vector>

namespace {

constexpr std::size_t kBodyBytes = 64;

// The requests among the bytes as text, and whether a refusal ends them.
std::vector<std::string> read_all(std::string_view bytes, std::size_t piece) {
  service::RequestReader reader(kBodyBytes);
  std::vector<std::string> found;
  try {
    for (std::size_t at = 0; at < bytes.size(); at += piece) {
      reader.add(bytes.substr(at, piece));
      while (const auto request = reader.next()) {
        if (request->body.size() > kBodyBytes || !request->path.starts_with('/')) std::abort();
        found.push_back(request->method + ' ' + request->path + ' ' + request->body +
                        (request->is_http_1_0 ? " 1.0" : " 1.1") + (request->is_last ? " last" : ""));
      }
      reader.asks_to_continue();
    }
  } catch (const service::Refused& error) {
    if (error.status < 400 || error.status > 505) std::abort();
    for (const char c : std::string_view(error.what())) {
      if (c < ' ' || c > '~') std::abort();
    }
    found.emplace_back("refused");  // the status may be that of either fault, if there are two
  }
  return found;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto whole = read_all(bytes, size + 1);
  for (const std::size_t piece : {1, 3, 100}) {
    if (read_all(bytes, piece) != whole) std::abort();
  }
  return 0;
}
