// Greedy generation that launches decode steps before it knows whether anybody wants their tokens.
//
// A GPU waits for the host between two steps if the host launches each only after it has read the one before. Here the
// host launches up to two steps ahead. If generation then ends early, the stream has fed tokens that nobody asked for,
// so it rolls back: it restores a checkpoint of the states and replays the steps since. Python's DecodeLoop
// (`megalodon_export.generation.decode_loop`) does the same.
//
//     Lookahead lookahead(step, position, chunk, 7, 100);
//     lookahead.next();       // fed: 1 step, launched: 3; waits for the first step and returns its token
//     lookahead.next();       // fed: 2, launched: 4
//     lookahead.roll_back();  // fed: 2, launched: 2; the stream is as if it had fed two tokens
#pragma once

#include <array>
#include <cstdint>

#include "runtime/device.hpp"

namespace megalodon::impl {

class Lookahead {
 public:
  // Generates `steps` tokens at most. The first step feeds the token `first`. The stream has fed `position` tokens
  // before. `step` must outlive this.
  Lookahead(CapturedStep& step, std::int64_t position, std::int64_t chunk, std::int64_t first, std::int64_t steps)
      : step_(step), position_(position), chunk_(chunk), first_(first), steps_(steps) {}

  // Feeds the token that was returned last, at first `first`, and returns the next one.
  std::int64_t next();
  // Undoes the launched steps whose tokens `next` has not returned.
  void roll_back();

 private:
  static constexpr std::int64_t kAhead = 2;  // one step hides the host's work, the second one delays of the host
  // Steps between checkpoints. Saving one costs microseconds; rolling back replays up to this many steps. Because the
  // interval exceeds `kAhead`, at least one of the two checkpoints is at a step that has been fed.
  static constexpr std::int64_t kCheckpointInterval = 8 + kAhead;
  static_assert(kAhead + 2 <= CapturedStep::kResultSlots);

  bool next_launch_starts_chunk() const { return (position_ + launched_) % chunk_ == 0; }
  void launch_next();
  void checkpoint_if_due();
  void launch(std::int64_t number);

  CapturedStep& step_;
  const std::int64_t position_, chunk_, first_, steps_;
  std::int64_t fed_ = 0;       // steps that the caller has asked for
  std::int64_t launched_ = 0;  // steps that the device has been given, `fed_` or up to `kAhead` more
  // The number of steps before each checkpoint; -1 for none. `newest_` is the index of the newest one.
  std::array<std::int64_t, 2> checkpoints_{-1, -1};
  bool newest_ = false;
};

}  // namespace megalodon::impl
