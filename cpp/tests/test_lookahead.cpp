// A stream that rolls back its lookahead is as if it had stepped one by one.
#include <gtest/gtest.h>

#include <array>
#include <vector>

#include "generation/lookahead.hpp"

namespace {

using megalodon::impl::CapturedStep;
using megalodon::impl::Lookahead;

constexpr std::int64_t kChunk = 8;

// A stream that behaves like one on a device: a token depends on a small state and on the slots of the chunk that have
// been written, and checkpoints copy the small state alone.
class FakeStep final : public CapturedStep {
 public:
  struct State {
    std::int64_t position = 0, sum = 7, next_token = 0;
    bool operator==(const State&) const = default;
  };

  void run(std::span<const std::int64_t> ids, std::span<float>, std::span<std::int64_t> next_tokens) override {
    launch(ids, 0);
    read(0, next_tokens);
  }
  void launch(std::span<const std::int64_t> ids, std::int64_t result_slot) override {
    if (!ids.empty()) state.next_token = ids[0];
    const auto slot = static_cast<std::size_t>(state.position % kChunk);
    ring[slot] = state.next_token;
    state.sum = (state.sum * 31 + state.next_token) % 10'007;
    std::int64_t token = state.sum;
    for (std::size_t i = 0; i <= slot; ++i) token += ring[i] * static_cast<std::int64_t>(i + 1);
    state.next_token = token % 97;
    ++state.position;
    results.at(static_cast<std::size_t>(result_slot)) = state.next_token;
    ++steps;
  }
  void read(std::int64_t result_slot, std::span<std::int64_t> next_tokens) override {
    next_tokens[0] = results.at(static_cast<std::size_t>(result_slot));
  }
  void checkpoint(bool which) override {
    saved[which] = state;
    ++checkpoints;
  }
  void roll_back(bool which) override { state = saved[which]; }

  // All that the future of the stream depends on.
  std::vector<std::int64_t> visible() const {
    std::vector<std::int64_t> values{state.position, state.sum};
    values.insert(values.end(), ring.begin(), ring.begin() + state.position % kChunk);
    return values;
  }

  State state;
  std::array<std::int64_t, kChunk> ring{};
  std::array<State, 2> saved;
  std::array<std::int64_t, kResultSlots> results{};
  int steps = 0, checkpoints = 0;
};

TEST(Lookahead, EndingAnywhereLeavesTheStreamAsSteppingDoes) {
  for (std::int64_t position = 0; position < 2 * kChunk; ++position) {
    for (std::int64_t count = 1; count < 5 * kChunk; ++count) {
      FakeStep plain, fast;
      std::array<std::int64_t, 1> token{5};
      for (std::int64_t i = 0; i < position; ++i) plain.run(token, {}, token);
      fast = plain;
      const std::int64_t first = token[0];
      Lookahead lookahead(fast, position, kChunk, first, 1000);
      for (std::int64_t i = 0; i < count; ++i) {
        plain.run(token, {}, token);
        ASSERT_EQ(lookahead.next(), token[0]) << position << " " << i;
      }
      lookahead.roll_back();
      ASSERT_EQ(fast.visible(), plain.visible()) << position << " " << count;
      lookahead.roll_back();
      ASSERT_EQ(fast.visible(), plain.visible());
      for (std::int64_t i = 0; i < 3; ++i) {  // generation can continue
        plain.run(token, {}, token);
        ASSERT_EQ(lookahead.next(), token[0]);
      }
    }
  }
}

TEST(Lookahead, LaunchesNoMoreStepsThanItMayAndSavesFewCheckpoints) {
  FakeStep step;
  Lookahead lookahead(step, 0, 1'000'000, 3, 100);
  for (int i = 0; i < 100; ++i) lookahead.next();
  EXPECT_EQ(step.steps, 100);
  EXPECT_LE(step.checkpoints, 11);
  lookahead.roll_back();  // all launched steps have been fed
  EXPECT_EQ(step.steps, 100);
}

}  // namespace
