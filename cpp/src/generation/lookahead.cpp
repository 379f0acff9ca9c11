#include "generation/lookahead.hpp"

#include <algorithm>
#include <span>

namespace megalodon::impl {

std::int64_t Lookahead::next() {
  if (launched_ == fed_) launch_next();
  ++fed_;
  while (launched_ < std::min(fed_ + kAhead, steps_)) {
    // The first step of a chunk overwrites a slot of the chunk before. The stream needs that slot if generation ends
    // there, so the step waits until all steps before it have been asked for.
    if (launched_ > fed_ && next_launch_starts_chunk()) break;
    launch_next();
  }
  std::int64_t token = 0;
  step_.read((fed_ - 1) % CapturedStep::kResultSlots, {&token, 1});
  return token;
}

void Lookahead::roll_back() {
  if (launched_ == fed_) return;
  const bool which = checkpoints_[newest_] <= fed_ ? newest_ : !newest_;
  step_.roll_back(which);
  for (std::int64_t number = checkpoints_[which]; number < fed_; ++number) launch(number);
  launched_ = fed_;
}

void Lookahead::launch_next() {
  checkpoint_if_due();
  launch(launched_);
  ++launched_;
}

// A checkpoint leaves out the rings, which are large. A replay needs no copy of them: each replayed step writes to its
// slot what it wrote there the first time. The first step of a chunk overwrites a slot that earlier steps read, so no
// replay may begin before it. Therefore a checkpoint always precedes it.
void Lookahead::checkpoint_if_due() {
  const std::int64_t last = checkpoints_[newest_];
  if (last >= 0 && launched_ - last < kCheckpointInterval && !next_launch_starts_chunk()) return;
  newest_ = !newest_;
  step_.checkpoint(newest_);
  checkpoints_[newest_] = launched_;
}

void Lookahead::launch(std::int64_t number) {
  const std::span<const std::int64_t> first(&first_, 1);
  step_.launch(number == 0 ? first : std::span<const std::int64_t>{}, number % CapturedStep::kResultSlots);
}

}  // namespace megalodon::impl
