// Greedy generation that runs ahead of its reader, as megalodon_export/decode_loop.py does and says why.
#pragma once

#include <array>
#include <cstdint>

#include "runtime/device.hpp"

namespace megalodon::impl {

class Ahead {
 public:
  // At most `steps` steps of a stream of `position` tokens, which begin with feeding `first`. `step` must outlive it.
  Ahead(RecordedStep& step, std::int64_t position, std::int64_t chunk, std::int64_t first, std::int64_t steps)
      : step_(step), position_(position), chunk_(chunk), first_(first), steps_(steps) {}

  // Feeds the token that was given out last, and waits for the next.
  std::int64_t next();
  // Takes back the steps that nobody asked for.
  void rewind();

 private:
  static constexpr std::int64_t kAhead = 2;  // one hides the host's turn between two steps, the second its hiccups
  static constexpr std::int64_t kKeepEvery = 8 + kAhead;  // by then the copy before was of a step that was asked for
  static_assert(kAhead + 2 <= RecordedStep::kPlaces);

  bool starts_a_chunk() const { return (position_ + issued_) % chunk_ == 0; }
  void issue();
  void keep();
  void start(std::int64_t number);

  RecordedStep& step_;
  const std::int64_t position_, chunk_, first_, steps_;
  std::int64_t fed_ = 0, issued_ = 0;         // steps that were asked for; those that were started
  std::array<std::int64_t, 2> kept_{-1, -1};  // the steps before which the states were kept
  bool last_ = false;                         // the place of the last of them
};

}  // namespace megalodon::impl
