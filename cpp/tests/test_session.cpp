// Sessions through the public interface. The environment variable MEGALODON_TEST_BUNDLE names the bundle.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <megalodon.hpp>
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>

namespace {

using megalodon::Engine;
using megalodon::Error;
using megalodon::GenerateOptions;
using megalodon::Session;
using Ids = std::vector<std::int64_t>;

const char* bundle() { return std::getenv("MEGALODON_TEST_BUNDLE"); }

const Engine& engine() {
  static const Engine one(bundle());
  return one;
}

Ids tokens(std::size_t count, std::int64_t start = 0) {
  Ids ids(count);
  std::iota(ids.begin(), ids.end(), start);
  for (std::int64_t& id : ids) id = id * 37 % 251;
  return ids;
}

GenerateOptions options(std::int64_t count, double temperature = 0.0, std::uint64_t seed = 0) {
  GenerateOptions result;
  result.max_new_tokens = count;
  result.sampling.temperature = temperature;
  result.sampling.seed = seed;
  result.eos_token_id = MEGALODON_NO_EOS;
  return result;
}

Ids generate(Session& session, const Ids& prompt, const GenerateOptions& how) {
  Ids written;
  session.generate(prompt, how, [&](std::int64_t token) { written.push_back(token); });
  return written;
}

megalodon_status status_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_STRNE(error.what(), "");
    return error.status;
  }
  return MEGALODON_OK;
}

void expect_close(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-3) << i;
}

TEST(Session, AnySplitGivesTheSameLogits) {
  const Ids ids = tokens(300);  // crosses chunks, and more than one call of the program takes
  Session whole(engine());
  const auto expected = whole.prefill(ids);
  for (const std::size_t size : {std::size_t{1}, std::size_t{31}, std::size_t{64}, std::size_t{129}}) {
    Session session(engine());
    std::vector<float> logits;
    for (std::size_t at = 0; at < ids.size(); at += size) {
      const auto end = std::min(at + size, ids.size());
      const Ids part(ids.begin() + static_cast<std::ptrdiff_t>(at), ids.begin() + static_cast<std::ptrdiff_t>(end));
      logits = part.size() == 1 ? session.decode(part[0]) : session.prefill(part);
    }
    SCOPED_TRACE(size);
    expect_close(logits, expected);
    EXPECT_EQ(session.position(), 300);
  }
}

TEST(Session, GenerateIsALoopOverPrefillAndDecode) {
  Session session(engine()), by_hand(engine());
  const Ids written = generate(session, tokens(5), options(40, 0.9, 3));
  auto logits = by_hand.prefill(tokens(5));
  for (std::uint64_t index = 0; index < written.size(); ++index) {
    const std::int64_t token = megalodon::sample(logits, options(1, 0.9, 3).sampling, index);
    ASSERT_EQ(token, written[index]);
    logits = by_hand.decode(token);
  }
}

TEST(Session, GenerationContinuesWhereItStopped) {
  Session whole(engine()), parts(engine());
  const Ids expected = generate(whole, tokens(5), options(20));
  Ids written = generate(parts, tokens(5), options(7));
  EXPECT_EQ(parts.position(), 5 + 6);  // the last token is generated, but not fed yet
  const Ids rest = generate(parts, {}, options(13));
  written.insert(written.end(), rest.begin(), rest.end());
  EXPECT_EQ(written, expected);
}

TEST(Session, ForkSnapshotAndResetGiveTheStatesThatTheyPromise) {
  Session session(engine());
  generate(session, tokens(70), options(9));
  const auto snapshot = session.snapshot();
  Session fork = session.fork();
  const Ids expected = generate(session, {}, options(12));
  EXPECT_EQ(generate(fork, {}, options(12)), expected);
  session.restore(snapshot);
  EXPECT_EQ(generate(session, {}, options(12)), expected);
  Session other(engine());
  other.restore(megalodon::Snapshot::from_bytes(snapshot.bytes()));
  EXPECT_EQ(generate(other, {}, options(12)), expected);
  session.reset();
  EXPECT_EQ(session.position(), 0);
  Session fresh(engine());
  EXPECT_EQ(generate(session, tokens(3), options(5)), generate(fresh, tokens(3), options(5)));
}

TEST(Session, ChangedSnapshotIsRefused) {
  Session session(engine());
  session.prefill(tokens(3));
  std::string bytes(session.snapshot().bytes());
  const auto at = bytes.find("\"model\":\"") + 9;
  bytes[at] = bytes[at] == '0' ? '1' : '0';
  EXPECT_EQ(status_of([&] { megalodon::Snapshot::from_bytes(bytes); }), MEGALODON_INVALID_ARGUMENT);
}

TEST(Session, ForksAndSnapshotsHoldWhatTheChunkHas) {
  Session session(engine());
  std::size_t fed = 0;
  for (const std::size_t count : {1, 62, 1, 1, 63}) {
    session.prefill(Ids(count, 7));
    fed += count;
    Session fork = session.fork();
    EXPECT_EQ(fork.position(), static_cast<std::int64_t>(fed));
    const auto state = session.snapshot();
    EXPECT_EQ(fork.snapshot().bytes(), state.bytes());
    const Ids expected = generate(fork, Ids{9}, options(70));
    session.restore(state);
    EXPECT_EQ(generate(session, Ids{9}, options(70)), expected);
    session.restore(state);
  }
}

TEST(Session, StopsWhereItIsTold) {
  Session session(engine());
  const auto by_callback = session.generate(tokens(5), options(50), [n = 0](std::int64_t) mutable { return ++n == 4; });
  EXPECT_EQ(by_callback.finish, MEGALODON_FINISH_STOPPED);
  EXPECT_EQ(by_callback.new_tokens, 4);
  session.stop();
  EXPECT_EQ(session.generate(Ids{}, options(50), [](std::int64_t) {}).new_tokens, 1);
  EXPECT_EQ(session.generate(Ids{}, options(50), [](std::int64_t) {}).new_tokens, 50);
  session.reset();
  Ids written = generate(session, tokens(5), options(6));
  session.reset();
  GenerateOptions how = options(50);
  how.eos_token_id = written[3];
  const auto first = std::find(written.begin(), written.end(), written[3]) - written.begin();
  const auto by_eos = session.generate(tokens(5), how, [](std::int64_t) {});
  EXPECT_EQ(by_eos.finish, MEGALODON_FINISH_EOS);
  EXPECT_EQ(by_eos.new_tokens, first);
}

TEST(Session, ExceptionsOfACallbackReachTheCaller) {
  Session session(engine());
  const auto raise = [](std::int64_t) { throw std::domain_error("mine"); };
  EXPECT_THROW(session.generate(tokens(5), options(5), raise), std::domain_error);
  EXPECT_EQ(generate(session, {}, options(3)).size(), 3U);
}

TEST(Session, ASecondCallIsRefusedWhileOneRuns) {
  Session session(engine());
  megalodon_status inner = MEGALODON_OK;
  session.generate(tokens(5), options(2), [&](std::int64_t) { inner = status_of([&] { session.decode(1); }); });
  EXPECT_EQ(inner, MEGALODON_BUSY);
  session.decode(1);
}

TEST(Session, InvalidArgumentsLeaveTheStreamAsItIs) {
  Session session(engine());
  session.prefill(tokens(5));
  const std::vector<std::function<void()>> calls{[&] { session.prefill({}); },
                                                 [&] { session.prefill({1, -1}); },
                                                 [&] { session.prefill({1, 100'000}); },
                                                 [&] { session.decode(-1); },
                                                 [&] { generate(session, {}, options(0)); },
                                                 [&] { generate(session, {}, options(5, -1.0)); },
                                                 [&] { generate(session, {1'000'000}, options(5)); },
                                                 [&] { megalodon::decode_batch({&session, &session}, {1}); },
                                                 [&] { megalodon::decode_batch({}, {}); }};
  for (const auto& call : calls) EXPECT_EQ(status_of(call), MEGALODON_INVALID_ARGUMENT);
  EXPECT_EQ(status_of([&] { megalodon::decode_batch({&session, &session}, {1, 1}); }), MEGALODON_BUSY);
  EXPECT_EQ(session.position(), 5);
  EXPECT_EQ(megalodon_session_create(nullptr, nullptr), MEGALODON_INVALID_ARGUMENT);
  EXPECT_EQ(megalodon_session_prefill(session.get(), nullptr, 3, nullptr), MEGALODON_INVALID_ARGUMENT);
  EXPECT_EQ(megalodon_engine_open(nullptr, nullptr, nullptr), MEGALODON_INVALID_ARGUMENT);
}

// A copy of the bundle in which token 200 makes the logits of its stream NaN.
std::filesystem::path broken_bundle() {
  const auto folder = std::filesystem::path(testing::TempDir()) / "megalodon-broken-bundle";
  std::filesystem::remove_all(folder);
  std::filesystem::copy(bundle(), folder, std::filesystem::copy_options::recursive);
  std::fstream file(folder / "model.safetensors", std::ios::binary | std::ios::in | std::ios::out);
  std::uint64_t size = 0;
  file.read(reinterpret_cast<char*>(&size), sizeof size);
  std::string header(size, ' ');
  file.read(header.data(), static_cast<std::streamsize>(size));
  const nlohmann::json entry = nlohmann::json::parse(header)["model.embed.weight"];
  const std::uint64_t row = 200 * sizeof(float) * entry["shape"][1].get<std::uint64_t>();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  file.seekp(static_cast<std::streamoff>(8 + size + entry["data_offsets"][0].get<std::uint64_t>() + row));
  file.write(reinterpret_cast<const char*>(&nan), sizeof nan);
  return folder;
}

TEST(Session, AFailurePoisonsASessionUntilReset) {
  const auto folder = broken_bundle();
  {
    const Engine broken(folder.string(), false);
    Session session(broken), other(broken);
    const auto fresh = session.snapshot();
    const auto fail = [&] { generate(session, {200}, options(2)); };
    EXPECT_EQ(status_of(fail), MEGALODON_FAILED);
    EXPECT_EQ(status_of([&] { session.prefill({1}); }), MEGALODON_POISONED);
    EXPECT_EQ(status_of([&] { session.snapshot(); }), MEGALODON_POISONED);
    EXPECT_EQ(status_of([&] { session.fork(); }), MEGALODON_POISONED);
    EXPECT_EQ(status_of([&] { megalodon::decode_batch({&other, &session}, {1, 1}); }), MEGALODON_POISONED);
    EXPECT_EQ(other.position(), 0);
    session.reset();
    EXPECT_EQ(session.position(), 0);
    EXPECT_EQ(status_of(fail), MEGALODON_FAILED);
    session.restore(fresh);
    EXPECT_EQ(session.position(), 0);
  }
  std::filesystem::remove_all(folder);
}

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

TEST(Threads, EightGiveTheTokensThatOneGives) {
  constexpr std::size_t count = 64;
  const auto work = [](std::size_t i) {
    Session session(engine());
    return generate(session, tokens(i + 1, static_cast<std::int64_t>(i)), options(24, 0.8, i));
  };
  std::vector<Ids> expected(count), found(count);
  for (std::size_t i = 0; i < count; ++i) expected[i] = work(i);
  std::atomic<std::size_t> next = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&] {
      for (std::size_t i = next++; i < count; i = next++) found[i] = work(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(found, expected);
}

TEST(Engine, SessionsKeepItAlive) {
  auto mine = std::make_unique<Engine>(bundle());
  Session session(*mine);
  mine.reset();
  EXPECT_EQ(generate(session, tokens(3), options(3)).size(), 3U);
}

TEST(Abi, StructsOfOtherVersions) {
  EXPECT_EQ(megalodon_abi_version(), static_cast<std::uint32_t>(MEGALODON_ABI_VERSION));
  megalodon_engine_info info{};
  EXPECT_EQ(megalodon_engine_get_info(engine().get(), &info), MEGALODON_INVALID_ARGUMENT);  // no struct_size
  struct Newer {
    megalodon_engine_info info;
    std::int64_t later = 7;
  } newer{};
  newer.info.struct_size = sizeof newer;
  EXPECT_EQ(megalodon_engine_get_info(engine().get(), &newer.info), MEGALODON_OK);
  EXPECT_GT(newer.info.vocab_size, 0);
  EXPECT_EQ(newer.later, 7);
}

struct NewerOptions {
  megalodon_engine_options options = MEGALODON_ENGINE_OPTIONS_INIT;
  std::int64_t later = 0;
};

TEST(Abi, OptionsThatThisLibraryLacksMustBeZero) {
  NewerOptions newer;
  newer.options.struct_size = sizeof newer;
  megalodon_engine* opened = nullptr;
  EXPECT_EQ(megalodon_engine_open(bundle(), &newer.options, &opened), MEGALODON_OK);
  megalodon_engine_free(opened);
  newer.later = 1;
  EXPECT_EQ(megalodon_engine_open(bundle(), &newer.options, &opened), MEGALODON_INVALID_ARGUMENT);
  EXPECT_STREQ(megalodon_last_error(),
               "struct_size is 24, but this library knows options of 16 bytes only; leave the others 0, or use a newer "
               "library");
}

}  // namespace
