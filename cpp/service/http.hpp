// HTTP/1.1 as the service speaks it: requests out of the bytes of a connection, and the bytes of answers.
#pragma once

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace service {

// A refused request: the message says why, and `status` is the HTTP status.
class Refused : public std::runtime_error {
 public:
  Refused(int status, const std::string& why) : std::runtime_error(why), status(status) {}
  int status;
};

struct HttpRequest {
  std::string method, path, body;
  bool is_http_1_0 = false;  // such a client knows neither chunks nor interim answers
  bool is_last = false;      // the connection ends after the answer
};

// Reads the requests of one connection, one after another. Ranges are ignored: no answer has any.
//
//     reader.add("GET /health HTTP/1.1\r\n");  reader.next() -> nothing
//     reader.add("\r\nGET /metr");             reader.next() -> GET /health, then nothing
class RequestReader {
 public:
  explicit RequestReader(std::size_t body_bytes) : body_bytes_(body_bytes) {}
  void add(std::string_view bytes);
  // The next request, if all of it is there. Throws Refused for one that cannot be read; then nothing after it can.
  std::optional<HttpRequest> next();
  // Whether the client waits for "100 Continue" before it sends the body. True once for each such request.
  bool asks_to_continue() { return std::exchange(asks_to_continue_, false); }
  std::size_t size() const { return rest().size(); }  // bytes that belong to no whole request yet
  bool is_between_requests() const { return !has_head_ && rest().empty(); }

 private:
  bool read_head();
  void read_headers(std::map<std::string, std::string> headers);
  bool read_body();
  bool read_chunks();
  void require_room(std::size_t bytes) const;
  std::string_view rest() const { return std::string_view(data_).substr(at_); }
  std::string_view take(std::size_t bytes);
  std::optional<std::string_view> take_line(std::size_t most);

  const std::size_t body_bytes_;
  std::string data_;
  std::size_t at_ = 0;  // bytes of `data_` that are read
  bool has_head_ = false, is_chunked_ = false, in_trailer_ = false, asks_to_continue_ = false;
  std::size_t length_ = 0;  // bytes of the body, or of the present chunk with the line end after it
  HttpRequest request_;
};

// A whole answer. `request` is null where there was none that could be read.
std::string whole_answer(const HttpRequest* request, int status, const std::string& type, const std::string& body);

// An answer in pieces: the head, each piece, and the end. A connection that ends without it tells of a failure.
std::string streamed_head(const HttpRequest& request);
std::string streamed_piece(const HttpRequest& request, const std::string& text);
std::string streamed_end(const HttpRequest& request);

}  // namespace service
