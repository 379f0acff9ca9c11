// Running ahead of the reader leaves a stream as stepping one by one does.
#include <gtest/gtest.h>

#include <array>
#include <vector>

#include "generation/lookahead.hpp"

namespace {

using megalodon::impl::Ahead;
using megalodon::impl::RecordedStep;

constexpr std::int64_t kChunk = 8;

// A stream as a device has it: a token depends on a small state and on the slots of the chunk that have been written,
// and only the small state can be kept.
class Stream final : public RecordedStep {
 public:
  struct State {
    std::int64_t position = 0, sum = 7, choice = 0;
    bool operator==(const State&) const = default;
  };

  void run(std::span<const std::int64_t> ids, std::span<float>, std::span<std::int64_t> greedy) override {
    issue(ids, 0);
    read(0, greedy);
  }
  void issue(std::span<const std::int64_t> ids, std::int64_t place) override {
    if (!ids.empty()) state.choice = ids[0];
    const auto slot = static_cast<std::size_t>(state.position % kChunk);
    ring[slot] = state.choice;
    state.sum = (state.sum * 31 + state.choice) % 10'007;
    std::int64_t token = state.sum;
    for (std::size_t i = 0; i <= slot; ++i) token += ring[i] * static_cast<std::int64_t>(i + 1);
    state.choice = token % 97;
    ++state.position;
    results.at(static_cast<std::size_t>(place)) = state.choice;
    ++steps;
  }
  void read(std::int64_t place, std::span<std::int64_t> greedy) override {
    greedy[0] = results.at(static_cast<std::size_t>(place));
  }
  void keep(bool place) override {
    kept[place] = state;
    ++copies;
  }
  void put_back(bool place) override { state = kept[place]; }

  // What the stream's future depends on.
  std::vector<std::int64_t> visible() const {
    std::vector<std::int64_t> values{state.position, state.sum};
    values.insert(values.end(), ring.begin(), ring.begin() + state.position % kChunk);
    return values;
  }

  State state;
  std::array<std::int64_t, kChunk> ring{};
  std::array<State, 2> kept;
  std::array<std::int64_t, kPlaces> results{};
  int steps = 0, copies = 0;
};

TEST(Ahead, StoppingAnywhereLeavesTheStreamOfStepping) {
  for (std::int64_t position = 0; position < 2 * kChunk; ++position) {
    for (std::int64_t count = 1; count < 5 * kChunk; ++count) {
      Stream plain, fast;
      std::array<std::int64_t, 1> token{5};
      for (std::int64_t i = 0; i < position; ++i) plain.run(token, {}, token);
      fast = plain;
      const std::int64_t first = token[0];
      Ahead ahead(fast, position, kChunk, first, 1000);
      for (std::int64_t i = 0; i < count; ++i) {
        plain.run(token, {}, token);
        ASSERT_EQ(ahead.next(), token[0]) << position << " " << i;
      }
      ahead.rewind();
      ASSERT_EQ(fast.visible(), plain.visible()) << position << " " << count;
      ahead.rewind();
      ASSERT_EQ(fast.visible(), plain.visible());
      for (std::int64_t i = 0; i < 3; ++i) {  // and it can go on
        plain.run(token, {}, token);
        ASSERT_EQ(ahead.next(), token[0]);
      }
    }
  }
}

TEST(Ahead, TakesNoMoreStepsThanItIsAllowedAndKeepsTheStateNowAndThen) {
  Stream stream;
  Ahead ahead(stream, 0, 1'000'000, 3, 100);
  for (int i = 0; i < 100; ++i) ahead.next();
  EXPECT_EQ(stream.steps, 100);
  EXPECT_LE(stream.copies, 11);
  ahead.rewind();  // there is nothing to take back
  EXPECT_EQ(stream.steps, 100);
}

}  // namespace
