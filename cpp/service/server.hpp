// The connections of the service: one thread waits for all of them.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "api.hpp"

namespace service {

// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~Descriptor();
  int get() const { return number_; }

 private:
  int number_;
};

class Server {
 public:
  Server(Api& api, std::string host, int port, std::size_t body_bytes);
  ~Server();

  // Binds and returns the port; port 0 is any free one. Throws std::runtime_error if it cannot.
  int bind();
  // Serves until another thread calls `stop`, and then sends what has been answered.
  void run();
  void stop();

 private:
  class Connection;

  void accept();
  void wake() const;

  Api& api_;
  const std::string host_;
  const int port_;
  const std::size_t body_bytes_;
  Descriptor listening_, waking_;
  std::size_t most_ = 4096;  // connections; further ones wait to be accepted
  std::vector<std::unique_ptr<Connection>> connections_;
  std::atomic<bool> stopping_ = false;
};

}  // namespace service
