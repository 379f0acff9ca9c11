#include "generation/lookahead.hpp"

#include <algorithm>
#include <span>

namespace megalodon::impl {

std::int64_t Ahead::next() {
  if (issued_ == fed_) issue();
  ++fed_;
  while (issued_ < std::min(fed_ + kAhead, steps_)) {
    if (issued_ > fed_ && starts_a_chunk()) break;  // until the step before it was asked for: see `keep`
    issue();
  }
  std::int64_t token = 0;
  step_.read((fed_ - 1) % RecordedStep::kPlaces, {&token, 1});
  return token;
}

void Ahead::rewind() {
  if (issued_ == fed_) return;
  const bool place = kept_[last_] <= fed_ ? last_ : !last_;
  step_.put_back(place);
  for (std::int64_t number = kept_[place]; number < fed_; ++number) start(number);
  issued_ = fed_;
}

void Ahead::issue() {
  keep();
  start(issued_);
  ++issued_;
}

// Going back repeats steps, which then see the rings as they were: a step writes what it wrote. But at the start of a
// chunk it overwrites a slot that the chunk before sees, so nobody goes back to before such a step.
void Ahead::keep() {
  const std::int64_t last = kept_[last_];
  if (last >= 0 && issued_ - last < kKeepEvery && !starts_a_chunk()) return;
  last_ = !last_;
  step_.keep(last_);
  kept_[last_] = issued_;
}

// The first step's token comes from the host, the others' from the step before.
void Ahead::start(std::int64_t number) {
  step_.issue(number == 0 ? std::span<const std::int64_t>(&first_, 1) : std::span<const std::int64_t>{},
              number % RecordedStep::kPlaces);
}

}  // namespace megalodon::impl
