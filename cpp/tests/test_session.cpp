// Sessions through the public interface.
#include <algorithm>
#include <atomic>
#include <thread>

#include "sessions.hpp"

namespace {

using namespace megalodon::test;

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
