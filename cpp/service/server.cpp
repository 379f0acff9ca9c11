#include "server.hpp"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

namespace service {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kRequestTime{10};      // for a request to arrive, from its connection or the last answer
constexpr std::chrono::seconds kSendTime{30};         // for a client to take any of what waits for it
constexpr std::chrono::seconds kLingerTime{2};        // for a client to read the last answer before the connection ends
constexpr std::size_t kMaxUnsent = 256 << 10;         // bytes; with more, the client has to read first
constexpr std::size_t kMaxPipelined = 64 << 10;       // bytes of requests that wait for the answer before theirs
constexpr const char* kContinue = "HTTP/1.1 100 Continue\r\n\r\n";

}  // namespace

Descriptor::~Descriptor() {
  if (number_ >= 0) close(number_);
}

// ---- one connection -------------------------------------------------------------------------------------------------

class Server::Connection {
 public:
  Connection(Descriptor socket, Server& server)
      : socket_(std::move(socket)), server_(server), reader_(server.body_bytes_) {}

  pollfd wanted() const {
    const bool reads = !input_ended_ && (answer_ == nullptr || reader_.size() < kMaxPipelined);
    const int events = (reads ? POLLIN : 0) | (input_ended_ ? 0 : POLLRDHUP) | (unsent_.empty() ? 0 : POLLOUT);
    return {.fd = socket_.get(), .events = static_cast<short>(events), .revents = 0};
  }

  // Goes on as far as it can without waiting. Returns whether the connection is still open.
  bool serve(short events) {
    if ((events & (POLLERR | POLLHUP)) != 0) return false;  // the client is gone
    if ((events & (POLLIN | POLLRDHUP)) != 0) receive();
    bool had_room = false;
    do {
      if (!ended_) answer();
      had_room = unsent_.size() < kMaxUnsent;
      if (!send()) return false;
    } while (!had_room && unsent_.empty());
    if (ended_ && unsent_.empty()) return linger();
    if (input_ended_ && is_idle()) return false;
    return Clock::now() < deadline_ || expire();
  }

  // Whether nothing waits to be answered or sent.
  bool is_idle() const { return answer_ == nullptr && unsent_.empty(); }

 private:
  void receive() {
    std::array<char, 64 << 10> bytes;
    const ssize_t size = recv(socket_.get(), bytes.data(), bytes.size(), 0);
    if (size > 0 && !ended_) reader_.add({bytes.data(), static_cast<std::size_t>(size)});
    if (size != 0) return;
    input_ended_ = true;
    // A client that has ended its side may still read, or it is gone. Only sending something shows which, and before an
    // answer begins, an interim one is allowed. If nobody reads, the connection is reset.
    if (answer_ != nullptr && !answer_->has_begun() && !answer_->http().is_http_1_0) unsent_ += kContinue;
  }

  // Answers the requests that have arrived, one after another: the next one waits for the end of the present answer.
  void answer() {
    try {
      while (!ended_ && unsent_.size() < kMaxUnsent) {
        if (answer_ == nullptr && !begin_next()) return;
        if (answer_ == nullptr) continue;
        unsent_ += answer_->take();
        if (!answer_->is_over()) return;
        ended_ = answer_->is_last();
        answer_.reset();
        deadline_ = Clock::now() + kRequestTime;
      }
    } catch (const Refused& error) {  // bytes that are no request, so the next one cannot be found
      unsent_ += server_.api_.refuse(nullptr, error.status, error.what());
      ended_ = true;
    } catch (const std::exception& error) {  // out of memory, say
      answer_.reset();
      ended_ = true;
    }
  }

  // Begins the answer to the next request, if there is one.
  bool begin_next() {
    std::optional<HttpRequest> request = reader_.next();
    if (!request) {
      if (reader_.asks_to_continue()) unsent_ += kContinue;
      return false;
    }
    const bool is_last = request->is_last;
    auto answer = server_.api_.answer(std::move(*request), [&server = server_] { server.wake(); });
    if (auto* later = std::get_if<std::unique_ptr<Answer>>(&answer)) {
      answer_ = std::move(*later);
    } else {
      unsent_ += std::get<std::string>(answer);
      ended_ = is_last;
    }
    deadline_ = Clock::now() + kRequestTime;
    return true;
  }

  bool send() {
    while (!unsent_.empty()) {
      const ssize_t size = ::send(socket_.get(), unsent_.data(), unsent_.size(), MSG_NOSIGNAL);
      if (size < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return false;
        if (!std::exchange(is_stalled_, true)) deadline_ = Clock::now() + kSendTime;
        return true;
      }
      unsent_.erase(0, static_cast<std::size_t>(size));
      is_stalled_ = false;
      deadline_ = Clock::now() + kRequestTime;
    }
    return true;
  }

  // Ends our side and waits until the client has ended its own. If the connection closed at once while the client still
  // sends, it would lose the answer.
  bool linger() {
    if (!lingering_) {
      lingering_ = true;
      shutdown(socket_.get(), SHUT_WR);
      deadline_ = Clock::now() + kLingerTime;
    }
    return !input_ended_ && Clock::now() < deadline_;
  }

  // Called at the connection's deadline. An answer may go on for as long as it takes; a half-read request is refused.
  bool expire() {
    if (!unsent_.empty()) return false;
    if (answer_ != nullptr) return true;
    if (reader_.is_between_requests()) return false;
    unsent_ += server_.api_.refuse(nullptr, 408, "the request did not arrive in time; send all of it at once");
    ended_ = true;
    return send();
  }

  Descriptor socket_;
  Server& server_;
  RequestReader reader_;
  std::unique_ptr<Answer> answer_;
  std::string unsent_;
  bool input_ended_ = false, ended_ = false, lingering_ = false;  // ended_: no request is answered any more
  bool is_stalled_ = false;                                       // the client does not take what waits for it
  Clock::time_point deadline_ = Clock::now() + kRequestTime;
};

// ---- all connections ------------------------------------------------------------------------------------------------

Server::Server(Api& api, std::string host, int port, std::size_t body_bytes)
    : api_(api),
      host_(std::move(host)),
      port_(port),
      body_bytes_(body_bytes),
      waking_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

Server::~Server() = default;

int Server::bind() {
  addrinfo hints{};
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  sockaddr_storage bound{};
  socklen_t size = sizeof bound;
  if (getaddrinfo(host_.c_str(), std::to_string(port_).c_str(), &hints, &found) == 0) {
    const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> address(found, freeaddrinfo);
    listening_ = Descriptor(socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    const int on = 1;
    setsockopt(listening_.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (::bind(listening_.get(), found->ai_addr, found->ai_addrlen) == 0 && listen(listening_.get(), SOMAXCONN) == 0 &&
        getsockname(listening_.get(), reinterpret_cast<sockaddr*>(&bound), &size) == 0) {
      const bool is_ipv6 = bound.ss_family == AF_INET6;
      return ntohs(is_ipv6 ? reinterpret_cast<sockaddr_in6&>(bound).sin6_port
                           : reinterpret_cast<sockaddr_in&>(bound).sin_port);
    }
  }
  throw std::runtime_error(host_ + ":" + std::to_string(port_) +
                           " cannot be bound: is another service there? Choose another --port or --host.");
}

void Server::accept() {
  while (connections_.size() < most_) {
    Descriptor socket(accept4(listening_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (socket.get() < 0) {  // with no file descriptor left, wait until a connection has ended
      if (errno == EMFILE || errno == ENFILE) most_ = std::max<std::size_t>(connections_.size(), 1);
      return;
    }
    const int on = 1;
    setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(socket.get(), SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    connections_.push_back(std::make_unique<Connection>(std::move(socket), *this));
  }
}

void Server::run() {
  Clock::time_point end = Clock::time_point::max();
  while (!stopping_ || (!connections_.empty() && Clock::now() < end)) {
    const bool accepts = !stopping_ && connections_.size() < most_;
    std::vector<pollfd> polled{{.fd = waking_.get(), .events = POLLIN, .revents = 0},
                               {.fd = accepts ? listening_.get() : -1, .events = POLLIN, .revents = 0}};
    for (const auto& connection : connections_) polled.push_back(connection->wanted());
    poll(polled.data(), polled.size(), 200);  // ms, between looks at the deadlines
    std::uint64_t count = 0;
    [[maybe_unused]] const ssize_t size = read(waking_.get(), &count, sizeof count);
    for (std::size_t i = connections_.size(); i-- > 0;) {
      auto& connection = connections_[i];
      if (connection->serve(polled[i + 2].revents) && !(stopping_ && connection->is_idle())) continue;
      std::swap(connection, connections_.back());
      connections_.pop_back();
    }
    if (stopping_) end = std::min(end, Clock::now() + kLingerTime);
    if (polled[1].revents != 0) accept();
  }
  connections_.clear();
}

void Server::wake() const {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t size = write(waking_.get(), &one, sizeof one);
}

void Server::stop() {
  stopping_ = true;
  wake();
}

}  // namespace service
