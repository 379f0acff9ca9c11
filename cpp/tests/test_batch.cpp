// Several sessions in one call give what each gives alone.
#include <algorithm>
#include <memory>
#include <string_view>

#include "sessions.hpp"

namespace {

using namespace megalodon::test;

TEST(Batch, ASessionThatCannotBeSampledFailsAlone) {
  const auto folder = broken_bundle();
  {
    const Engine broken(folder.string(), false);
    for (const double temperature : {0.0, 1.0}) {
      std::vector<Session> sessions;
      for (int i = 0; i < 3; ++i) sessions.emplace_back(broken);
      const std::vector<megalodon_sampling> samplings(3, options(1, temperature, 4).sampling);
      const std::vector<Session*> all{&sessions[0], &sessions[1], &sessions[2]};
      Ids next;
      EXPECT_EQ(status_of([&] { megalodon::step_batch(all, {1, 200, 3}, samplings, {0, 0, 0}, next); }),
                MEGALODON_FAILED);
      EXPECT_TRUE(std::string_view(megalodon_last_error()).starts_with("row 1 cannot be sampled: NaN in "));
      ASSERT_EQ(next.size(), 3U);
      EXPECT_EQ(next[1], -1);
      EXPECT_EQ(status_of([&] { sessions[1].decode(1); }), MEGALODON_POISONED);
      for (const std::size_t i : {std::size_t{0}, std::size_t{2}}) {
        Session alone(broken);
        EXPECT_EQ(next[i], megalodon::sample(alone.decode(i == 0 ? 1 : 3), samplings[i], 0));
        EXPECT_EQ(sessions[i].position(), 1);
      }
    }
  }
  std::filesystem::remove_all(folder);
}

TEST(Batch, RowsAreIndependentStreams) {
  std::vector<Session> batched, alone;
  for (const std::size_t length : {3U, 64U, 100U, 1U, 7U}) {
    batched.emplace_back(engine()).prefill(tokens(length, static_cast<std::int64_t>(length)));
    alone.push_back(batched.back().fork());
  }
  const auto step = [&](const std::vector<std::size_t>& rows, std::int64_t token) {
    std::vector<Session*> sessions;
    Ids ids;
    for (const std::size_t row : rows) {
      sessions.push_back(&batched[row]);
      ids.push_back(token + static_cast<std::int64_t>(row));
    }
    const auto logits = megalodon::decode_batch(sessions, ids);
    for (std::size_t i = 0; i < rows.size(); ++i) expect_close(logits[i], alone[rows[i]].decode(ids[i]));
  };
  for (std::int64_t token = 0; token < 70; ++token) step({0, 1, 2, 3, 4}, token);  // crosses a chunk
  step({1, 2, 3}, 80);  // consecutive rows, which do not move
  step({4, 2, 0}, 90);  // another order
  step({3}, 91);        // one row alone
  batched[2].reset();   // changes no other row
  alone[2].reset();
  step({0, 1, 2, 3, 4}, 92);
  batched.erase(batched.begin());  // the others keep their shared memory
  alone.erase(alone.begin());
  step({0, 1, 2, 3}, 100);
}

// New streams are appended, and the last stream takes the place of one that leaves. A service does the same.
TEST(Batch, StreamsJoinAndLeave) {
  std::vector<std::unique_ptr<Session>> batched, alone;
  const auto join = [&](std::size_t length) {
    batched.push_back(std::make_unique<Session>(engine()));
    batched.back()->prefill(tokens(length));
    alone.push_back(std::make_unique<Session>(batched.back()->fork()));
  };
  const auto leave = [&](std::size_t index) {
    for (auto* all : {&batched, &alone}) {
      std::swap((*all)[index], all->back());
      all->pop_back();
    }
  };
  for (std::size_t round = 0; round < 40; ++round) {
    if (batched.size() < 2 || (round % 3 != 0 && batched.size() < 7)) join(1 + round * 7 % 80);
    if (round % 4 == 3) leave(round % batched.size());
    std::vector<Session*> sessions;
    for (const auto& one : batched) sessions.push_back(one.get());
    const auto logits = megalodon::decode_batch(sessions, Ids(sessions.size(), static_cast<std::int64_t>(round)));
    for (std::size_t i = 0; i < alone.size(); ++i) {
      expect_close(logits[i], alone[i]->decode(static_cast<std::int64_t>(round)));
    }
  }
}

TEST(Batch, PromptsOfAnyLengthsAreFedSideBySide) {
  std::vector<Ids> prompts{tokens(3), tokens(200), tokens(64, 5), tokens(1), tokens(129)};
  std::vector<Session> sessions, alone;
  std::vector<Session*> batch;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    sessions.emplace_back(engine());
    alone.emplace_back(engine());
  }
  for (Session& session : sessions) batch.push_back(&session);
  for (int round = 0; round < 2; ++round) {  // the second time, streams are at different positions
    const auto logits = megalodon::prefill_batch(batch, prompts);
    for (std::size_t i = 0; i < prompts.size(); ++i) expect_close(logits[i], alone[i].prefill(prompts[i]));
    std::ranges::reverse(prompts);
  }
  for (std::size_t i = 0; i < alone.size(); ++i) EXPECT_EQ(sessions[i].position(), alone[i].position());
  EXPECT_EQ(status_of([&] { megalodon::prefill_batch({&sessions[0], &sessions[1]}, {{1}, {}}); }),
            MEGALODON_INVALID_ARGUMENT);
  EXPECT_EQ(sessions[0].position(), alone[0].position());
}

TEST(Batch, StepsSampleTheTokensThatEachStreamGeneratesAlone) {
  const std::vector<megalodon_sampling> samplings{
      MEGALODON_GREEDY, {0.8, 0, 0.9, 0.0, 7}, {1.2, 20, 1.0, 0.0, 8}, {1.0, 0, 1.0, 0.1, 9}};
  for (const bool greedy : {true, false}) {
    std::vector<Session> sessions, alone;
    std::vector<Session*> batch;
    std::vector<Ids> written(samplings.size());
    std::vector<megalodon_sampling> chosen;
    Ids fed;
    for (std::size_t i = 0; i < samplings.size(); ++i) {
      sessions.emplace_back(engine());
      alone.emplace_back(engine());
      chosen.push_back(greedy ? samplings[0] : samplings[i]);
      fed.push_back(megalodon::sample(sessions[i].prefill(tokens(5 + i)), chosen[i], 0));
      written[i].push_back(fed[i]);
    }
    for (Session& session : sessions) batch.push_back(&session);
    for (std::uint64_t index = 1; index < 20; ++index) {
      fed = megalodon::step_batch(batch, fed, chosen, std::vector<std::uint64_t>(batch.size(), index));
      for (std::size_t i = 0; i < fed.size(); ++i) written[i].push_back(fed[i]);
    }
    for (std::size_t i = 0; i < alone.size(); ++i) {
      GenerateOptions how = options(20);
      how.sampling = chosen[i];
      EXPECT_EQ(generate(alone[i], tokens(5 + i), how), written[i]) << i;
    }
  }
}

TEST(Batch, PendingTokensAreFedFirst) {
  Session session(engine()), other(engine()), same(engine());
  other.prefill({1});
  const Ids written = generate(session, tokens(5), options(6));
  same.prefill(tokens(5));
  for (const std::int64_t token : written) same.decode(token);
  const auto logits = megalodon::decode_batch({&session, &other}, {9, 9});
  expect_close(logits[0], same.decode(9));
  EXPECT_EQ(session.position(), same.position());
}

TEST(Batch, LargerThanTheBundleIsRefused) {
  std::vector<Session> sessions;
  std::vector<Session*> batch;
  const auto count = static_cast<std::size_t>(engine().info().max_batch + 1);
  for (std::size_t i = 0; i < count; ++i) sessions.emplace_back(engine());
  for (Session& session : sessions) batch.push_back(&session);
  EXPECT_EQ(status_of([&] { megalodon::decode_batch(batch, Ids(count, 1)); }), MEGALODON_INVALID_ARGUMENT);
}

}  // namespace
