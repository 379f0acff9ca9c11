// Counters of the service, in Prometheus' format.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>

namespace service {

enum class Outcome { completed, cancelled, failed, refused, busy };
inline constexpr std::array kOutcomes{"completed", "cancelled", "failed", "refused", "busy"};

struct Metrics {
  std::array<std::atomic<std::uint64_t>, kOutcomes.size()> requests{};
  std::atomic<std::uint64_t> prompt_tokens = 0, generated_tokens = 0, decode_steps = 0;
  std::atomic<std::uint64_t> first_tokens = 0, first_token_microseconds = 0;
  std::atomic<std::int64_t> sessions = 0, queued = 0;

  void count(Outcome outcome) { ++requests[static_cast<std::size_t>(outcome)]; }
  std::string text() const;
};

}  // namespace service
