#include "http.hpp"

#include <algorithm>
#include <charconv>

namespace service {
namespace {

constexpr std::size_t kMaxLine = 8 << 10, kMaxHead = 32 << 10;  // bytes
constexpr std::string_view kBreaks("\r\n\0", 3);                // what no line holds
constexpr int kRetryAfter = 1;                                  // seconds

Refused bad(const std::string& why) { return {400, why}; }

std::string lower(std::string_view text) {
  std::string result(text);
  std::ranges::transform(result, result.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? c + ('a' - 'A') : c; });
  return result;
}

std::string_view trimmed(std::string_view text) {
  const auto begin = std::min(text.find_first_not_of(" \t"), text.size());
  return text.substr(begin, text.find_last_not_of(" \t") + 1 - begin);
}

bool is_token(std::string_view text) {
  return !text.empty() && std::ranges::all_of(text, [](char c) { return c > ' ' && c < 127 && c != ':' && c != '"'; });
}

std::size_t number(std::string_view text, int base, const std::string& name) {
  std::size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) throw bad("the " + name + " is not a number of bytes");
  return value;
}

const char* reason(int status) {
  static const std::map<int, const char*> reasons{{200, "OK"},
                                                  {400, "Bad Request"},
                                                  {404, "Not Found"},
                                                  {408, "Request Timeout"},
                                                  {413, "Content Too Large"},
                                                  {414, "URI Too Long"},
                                                  {415, "Unsupported Media Type"},
                                                  {417, "Expectation Failed"},
                                                  {431, "Request Header Fields Too Large"},
                                                  {500, "Internal Server Error"},
                                                  {501, "Not Implemented"},
                                                  {503, "Service Unavailable"},
                                                  {505, "HTTP Version Not Supported"}};
  const auto found = reasons.find(status);
  return found == reasons.end() ? "Error" : found->second;
}

std::string head(const HttpRequest* request, int status, const std::string& type) {
  const bool closes = request == nullptr || request->is_last;
  return "HTTP/1.1 " + std::to_string(status) + ' ' + reason(status) + "\r\nContent-Type: " + type +
         "\r\nCache-Control: no-store\r\n" + (closes ? "Connection: close\r\n" : "") +
         (status == 503 ? "Retry-After: " + std::to_string(kRetryAfter) + "\r\n" : "");
}

// The method, path and version of "GET /health?x HTTP/1.1".
HttpRequest read_request_line(std::string_view line) {
  if (line.find_first_of(kBreaks) != line.npos) throw bad("the request's first line is not METHOD PATH HTTP/1.1");
  const std::size_t first = line.find(' '), last = line.rfind(' ');
  const std::string_view version = last == line.npos ? "" : line.substr(last + 1);
  if (first == last || !version.starts_with("HTTP/")) throw bad("the request is not HTTP, expected HTTP/1.1");
  if (version != "HTTP/1.1" && version != "HTTP/1.0") throw Refused(505, "the version is unknown, expected HTTP/1.1");
  HttpRequest request;
  request.method = line.substr(0, first);
  request.path = line.substr(first + 1, last - first - 1);
  const bool is_path = std::ranges::all_of(request.path, [](char c) { return c > ' ' || c < 0; });
  if (!is_token(request.method) || !request.path.starts_with('/') || !is_path) {
    throw bad("the request's first line is not METHOD PATH HTTP/1.1");
  }
  request.path = request.path.substr(0, request.path.find('?'));
  request.is_http_1_0 = request.is_last = version == "HTTP/1.0";
  return request;
}

}  // namespace

// ---- requests -------------------------------------------------------------------------------------------------------

std::optional<HttpRequest> RequestReader::next() {
  if (!has_head_ && !read_head()) return std::nullopt;
  if (!(is_chunked_ ? read_chunks() : read_body())) return std::nullopt;
  has_head_ = is_chunked_ = in_trailer_ = asks_to_continue_ = false;
  length_ = 0;
  return std::exchange(request_, {});
}

void RequestReader::add(std::string_view bytes) {
  data_.erase(0, std::exchange(at_, 0));
  data_ += bytes;
}

std::string_view RequestReader::take(std::size_t bytes) {
  const std::string_view taken = rest().substr(0, bytes);
  at_ += bytes;
  return taken;
}

// Takes a line without its end, or nothing if its end is not there.
std::optional<std::string_view> RequestReader::take_line(std::size_t most) {
  const std::size_t end = rest().find("\r\n");
  if (std::min(end, rest().size()) > most) throw bad("a line is longer than " + std::to_string(most) + " bytes");
  if (end == std::string_view::npos) return std::nullopt;
  return take(end + 2).substr(0, end);
}

bool RequestReader::read_head() {
  while (rest().starts_with("\r\n")) take(2);  // allowed between two requests
  const std::size_t end = rest().find("\r\n\r\n");
  if (std::min(rest().find("\r\n"), rest().size()) > kMaxLine) {
    throw Refused(414, "the first line is longer than " + std::to_string(kMaxLine) + " bytes, send a shorter path");
  }
  if (std::min(end, rest().size()) > kMaxHead) {
    throw Refused(431, "the headers are longer than " + std::to_string(kMaxHead) + " bytes, send fewer");
  }
  if (end == std::string_view::npos) {
    if (rest().find("\n\n") != std::string_view::npos) throw bad("lines end with LF, expected CR LF");
    return false;
  }
  request_ = read_request_line(*take_line(kMaxLine));
  std::map<std::string, std::string> headers;
  for (std::string_view line = *take_line(kMaxHead); !line.empty(); line = *take_line(kMaxHead)) {
    const std::size_t colon = line.find(':');
    const std::string name = lower(line.substr(0, colon));
    if (colon == line.npos || !is_token(name) || line.find_first_of(kBreaks) != line.npos) {
      throw bad("a header is not NAME: VALUE");
    }
    std::string& value = headers[name];
    value += (value.empty() ? "" : ", ") + std::string(trimmed(line.substr(colon + 1)));
  }
  has_head_ = true;
  read_headers(std::move(headers));
  return true;
}

void RequestReader::read_headers(std::map<std::string, std::string> headers) {
  const std::string encoding = lower(headers["content-encoding"]), transfer = lower(headers["transfer-encoding"]);
  const std::string expected = lower(headers["expect"]), connection = lower(headers["connection"]);
  if (connection.find("close") != connection.npos) request_.is_last = true;
  if (!encoding.empty() && encoding != "identity") throw Refused(415, "the body is compressed, expected plain JSON");
  if (!transfer.empty() && transfer != "chunked") throw Refused(501, "Transfer-Encoding is unknown, expected chunked");
  is_chunked_ = !transfer.empty();
  const std::string& length = headers["content-length"];
  // Two answers to where a body ends would let a request hide in another one.
  if (is_chunked_ && (!length.empty() || request_.is_http_1_0)) throw bad("a chunked body has no Content-Length");
  if (!length.empty()) length_ = number(length, 10, "Content-Length");
  require_room(length_);
  if (!expected.empty() && expected != "100-continue") throw Refused(417, "the expectation is unknown, send none");
  asks_to_continue_ = !expected.empty() && !request_.is_http_1_0;
}

void RequestReader::require_room(std::size_t bytes) const {
  if (bytes <= body_bytes_ - request_.body.size()) return;
  throw Refused(413, "the body is larger than " + std::to_string(body_bytes_) + " bytes, send a shorter one");
}

bool RequestReader::read_body() {
  if (rest().size() < length_) return false;
  request_.body = take(length_);
  return true;
}

// Reads chunks: "5\r\nhello\r\n" for each, "0\r\n" for the last, and perhaps headers before an empty line.
bool RequestReader::read_chunks() {
  while (true) {
    if (length_ > 0) {  // the present chunk and the line end after it
      if (rest().size() < length_) return false;
      const std::string_view chunk = take(std::exchange(length_, 0));
      if (!chunk.ends_with("\r\n")) throw bad("a chunk of the body is longer than it says");
      request_.body += chunk.substr(0, chunk.size() - 2);
    }
    const std::optional<std::string_view> line = take_line(kMaxLine);
    if (!line) return false;
    if (in_trailer_) {
      if (line->empty()) return true;
      continue;
    }
    const std::size_t size = number(trimmed(line->substr(0, line->find(';'))), 16, "size of a chunk");
    require_room(size);
    in_trailer_ = size == 0;
    length_ = in_trailer_ ? 0 : size + 2;
  }
}

// ---- answers --------------------------------------------------------------------------------------------------------

std::string whole_answer(const HttpRequest* request, int status, const std::string& type, const std::string& body) {
  const bool has_body = request == nullptr || request->method != "HEAD";
  return head(request, status, type) + "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" +
         (has_body ? body : "");
}

std::string streamed_head(const HttpRequest& request) {
  return head(&request, 200, "text/event-stream") + (request.is_http_1_0 ? "" : "Transfer-Encoding: chunked\r\n") +
         "\r\n";
}

std::string streamed_piece(const HttpRequest& request, const std::string& text) {
  if (request.is_http_1_0) return text;
  char size[20];
  const auto end = std::to_chars(size, size + sizeof size, text.size(), 16).ptr;
  return std::string(size, end) + "\r\n" + text + "\r\n";
}

std::string streamed_end(const HttpRequest& request) { return request.is_http_1_0 ? "" : "0\r\n\r\n"; }

}  // namespace service
