// megalodon.hpp: C++17 classes over the C interface of megalodon.h. Errors are exceptions, and objects free themselves.
//
//     megalodon::Engine engine("bundle");
//     megalodon::Session session(engine);
//     session.generate("In the beginning", {}, [](std::string_view piece) { std::cout << piece << std::flush; });
//
// Header-only: the library exports C functions alone, so a program and the library may be built by different compilers.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "megalodon.h"

namespace megalodon {

// Says what went wrong and what to do. `status` is one of megalodon.h.
class Error : public std::runtime_error {
 public:
  Error(megalodon_status status, const std::string& message) : std::runtime_error(message), status(status) {}
  megalodon_status status;
};

namespace detail {

inline void check(megalodon_status status) {
  if (status != MEGALODON_OK) throw Error(status, megalodon_last_error());
}

// The text for a C function, which would take a zero byte for the end.
inline const char* c_text(const std::string& text, const std::string& name) {
  const std::size_t zero = text.find('\0');
  if (zero != std::string::npos)
    throw Error(MEGALODON_INVALID_ARGUMENT, name + " has a zero byte, at byte " + std::to_string(zero) +
                                                "; leave it out, or pass token ids");
  return text.c_str();
}

inline std::vector<const char*> c_stop(const std::vector<std::string>& stop) {
  std::vector<const char*> all;
  for (const std::string& one : stop) all.push_back(c_text(one, "stop[" + std::to_string(all.size()) + "]"));
  return all;
}

template <auto free>
struct Free {
  template <typename Handle>
  void operator()(Handle* handle) const {
    free(handle);
  }
};

}  // namespace detail

// How to generate. The defaults are greedy, with 256 tokens at most.
struct GenerateOptions {
  megalodon_sampling sampling = MEGALODON_GREEDY;
  std::int64_t max_new_tokens = 256;
  std::int64_t eos_token_id = MEGALODON_MODEL_EOS;
  std::vector<std::string> stop = {};
};

// Samples token number `index` of a stream, counted from 0.
inline std::int64_t sample(const std::vector<float>& logits, const megalodon_sampling& sampling, std::uint64_t index) {
  std::int64_t token_id = 0;
  detail::check(megalodon_sample(logits.data(), logits.size(), &sampling, index, &token_id));
  return token_id;
}

// The weights and programs of one bundle, for any number of threads and sessions.
class Engine {
 public:
  explicit Engine(const std::string& folder, bool check_hashes = true, std::int32_t concurrency = 0) {
    megalodon_engine_options options = MEGALODON_ENGINE_OPTIONS_INIT;
    options.check_hashes = check_hashes ? 1 : 0;
    options.concurrency = concurrency;
    megalodon_engine* engine = nullptr;
    detail::check(megalodon_engine_open(folder.c_str(), &options, &engine));
    handle_.reset(engine);
  }

  megalodon_engine_info info() const {
    megalodon_engine_info info{};
    info.struct_size = sizeof info;
    detail::check(megalodon_engine_get_info(get(), &info));
    return info;
  }

  std::vector<std::int64_t> encode(std::string_view text) const {
    std::size_t count = 0;
    detail::check(megalodon_engine_encode(get(), text.data(), text.size(), nullptr, 0, &count));
    std::vector<std::int64_t> ids(count);
    detail::check(megalodon_engine_encode(get(), text.data(), text.size(), ids.data(), count, &count));
    return ids;
  }

  megalodon_engine* get() const { return handle_.get(); }

 private:
  std::unique_ptr<megalodon_engine, detail::Free<megalodon_engine_free>> handle_;
};

// The state of a stream. Python reads and writes the same bytes.
class Snapshot {
 public:
  explicit Snapshot(megalodon_snapshot* handle) : handle_(handle) {}

  static Snapshot load(const std::string& path) {
    megalodon_snapshot* snapshot = nullptr;
    detail::check(megalodon_snapshot_load(path.c_str(), &snapshot));
    return Snapshot(snapshot);
  }
  static Snapshot from_bytes(std::string_view bytes) {
    megalodon_snapshot* snapshot = nullptr;
    detail::check(megalodon_snapshot_from_bytes(bytes.data(), bytes.size(), &snapshot));
    return Snapshot(snapshot);
  }
  void save(const std::string& path) const { detail::check(megalodon_snapshot_save(get(), path.c_str())); }
  // The content of the snapshot's file. Valid as long as the snapshot.
  std::string_view bytes() const {
    const void* data = nullptr;
    std::size_t size = 0;
    detail::check(megalodon_snapshot_bytes(get(), &data, &size));
    return {static_cast<const char*>(data), size};
  }

  const megalodon_snapshot* get() const { return handle_.get(); }

 private:
  std::unique_ptr<megalodon_snapshot, detail::Free<megalodon_snapshot_free>> handle_;
};

// One stream of tokens. It takes one call at a time.
class Session {
 public:
  explicit Session(const Engine& engine) {
    megalodon_session* session = nullptr;
    detail::check(megalodon_session_create(engine.get(), &session));
    adopt(session, engine.info().logits_size);
  }

  Session fork() {
    megalodon_session* session = nullptr;
    detail::check(megalodon_session_fork(get(), &session));
    Session other;
    other.adopt(session, static_cast<std::int64_t>(logits_size_));
    return other;
  }

  void reset() { detail::check(megalodon_session_reset(get())); }

  std::int64_t position() {
    std::int64_t position = 0;
    detail::check(megalodon_session_position(get(), &position));
    return position;
  }

  // Returns the logits after the last token.
  std::vector<float> prefill(const std::vector<std::int64_t>& token_ids) {
    std::vector<float> logits(logits_size_);
    detail::check(megalodon_session_prefill(get(), token_ids.data(), token_ids.size(), logits.data()));
    return logits;
  }

  std::vector<float> decode(std::int64_t token_id) {
    std::vector<float> logits(logits_size_);
    detail::check(megalodon_session_decode(get(), token_id, logits.data()));
    return logits;
  }

  // Calls `callback` with each token, or each piece of text, as soon as it is certain. The generation ends if the
  // callback returns true. If it throws, the generation ends and the exception reaches the caller.
  template <typename Callback>
  megalodon_generate_result generate(const std::vector<std::int64_t>& prompt, const GenerateOptions& options,
                                     Callback&& callback) {
    Relay<Callback> relay{callback, nullptr};
    return run(relay, options, [&](const auto* c_options, auto* result) {
      return megalodon_session_generate(
          get(), prompt.data(), prompt.size(), c_options,
          [](void* user, std::int64_t token) { return static_cast<Relay<Callback>*>(user)->call(token); }, &relay,
          result);
    });
  }

  template <typename Callback>
  megalodon_generate_result generate(const std::string& prompt, const GenerateOptions& options, Callback&& callback) {
    Relay<Callback> relay{callback, nullptr};
    const char* c_prompt = detail::c_text(prompt, "the prompt");
    return run(relay, options, [&](const auto* c_options, auto* result) {
      return megalodon_session_generate_text(
          get(), c_prompt, c_options,
          [](void* user, const char* piece, std::size_t size) {
            return static_cast<Relay<Callback>*>(user)->call(std::string_view(piece, size));
          },
          &relay, result);
    });
  }

  // Ends the running generation, or the next one if none is running. Any thread may call it.
  void stop() { megalodon_session_stop(get()); }

  Snapshot snapshot() {
    megalodon_snapshot* snapshot = nullptr;
    detail::check(megalodon_session_snapshot(get(), &snapshot));
    return Snapshot(snapshot);
  }
  void restore(const Snapshot& snapshot) { detail::check(megalodon_session_restore(get(), snapshot.get())); }

  std::size_t logits_size() const { return logits_size_; }
  megalodon_session* get() const { return handle_.get(); }

 private:
  // Stores an exception of the callback, which must not cross the C interface.
  template <typename Callback>
  struct Relay {
    Callback& callback;
    std::exception_ptr thrown;

    template <typename Value>
    int call(Value value) noexcept {
      try {
        if constexpr (std::is_void_v<decltype(callback(value))>) {
          callback(value);
          return 0;
        } else {
          return callback(value) ? 1 : 0;
        }
      } catch (...) {
        thrown = std::current_exception();
        return 1;
      }
    }
  };

  Session() = default;

  void adopt(megalodon_session* session, std::int64_t logits_size) {
    handle_.reset(session);
    logits_size_ = static_cast<std::size_t>(logits_size);
  }

  template <typename Callback, typename Call>
  static megalodon_generate_result run(Relay<Callback>& relay, const GenerateOptions& options, Call call) {
    std::vector<const char*> stop = detail::c_stop(options.stop);
    megalodon_generate_options c_options = MEGALODON_GENERATE_OPTIONS_INIT;
    c_options.sampling = options.sampling;
    c_options.max_new_tokens = options.max_new_tokens;
    c_options.eos_token_id = options.eos_token_id;
    c_options.stop = stop.data();
    c_options.stop_count = stop.size();
    megalodon_generate_result result{};
    result.struct_size = sizeof result;
    const megalodon_status status = call(&c_options, &result);
    if (relay.thrown) std::rethrow_exception(relay.thrown);
    detail::check(status);
    return result;
  }

  std::unique_ptr<megalodon_session, detail::Free<megalodon_session_free>> handle_;
  std::size_t logits_size_ = 0;
};

namespace detail {

inline std::vector<megalodon_session*> handles(const std::vector<Session*>& sessions, std::size_t others) {
  if (sessions.size() != others)
    throw Error(MEGALODON_INVALID_ARGUMENT,
                "sessions and arguments differ in number; give each session one of every argument");
  std::vector<megalodon_session*> all;
  for (const Session* session : sessions) all.push_back(session->get());
  return all;
}

inline std::vector<std::vector<float>> rows(const std::vector<float>& flat, std::size_t count) {
  std::vector<std::vector<float>> logits;
  for (std::size_t i = 0; i < count; ++i) {
    const float* row = flat.data() + i * (flat.size() / count);
    logits.emplace_back(row, row + flat.size() / count);
  }
  return logits;
}

}  // namespace detail

// Feeds one token to each of several sessions of an engine in one step. Returns the logits of each.
inline std::vector<std::vector<float>> decode_batch(const std::vector<Session*>& sessions,
                                                    const std::vector<std::int64_t>& token_ids) {
  const auto handles = detail::handles(sessions, token_ids.size());
  std::vector<float> logits(handles.empty() ? 0 : handles.size() * sessions[0]->logits_size());
  detail::check(megalodon_decode_batch(handles.data(), token_ids.data(), handles.size(), logits.data()));
  return detail::rows(logits, handles.size());
}

// Feeds one token to each session as `decode_batch` does, and samples the next token of each: token number
// `indices[i]` of stream i, counted from 0. Writes the tokens to `next` also if it throws: a session that failed has -1
// there, and the others can go on.
inline void step_batch(const std::vector<Session*>& sessions, const std::vector<std::int64_t>& token_ids,
                       const std::vector<megalodon_sampling>& samplings, const std::vector<std::uint64_t>& indices,
                       std::vector<std::int64_t>& next) {
  const auto handles = detail::handles(sessions, token_ids.size());
  detail::handles(sessions, samplings.size());
  detail::handles(sessions, indices.size());
  next.assign(handles.size(), -1);
  detail::check(megalodon_step_batch(handles.data(), token_ids.data(), handles.size(), samplings.data(), indices.data(),
                                     next.data()));
}

// Steps a batch as the function above does, and throws if one session fails: for callers that then end all of them.
inline std::vector<std::int64_t> step_batch(const std::vector<Session*>& sessions,
                                            const std::vector<std::int64_t>& token_ids,
                                            const std::vector<megalodon_sampling>& samplings,
                                            const std::vector<std::uint64_t>& indices) {
  std::vector<std::int64_t> next;
  step_batch(sessions, token_ids, samplings, indices, next);
  return next;
}

// Feeds each of several sessions of an engine its own tokens, in calls that all share. Returns the logits after the
// last token of each.
inline std::vector<std::vector<float>> prefill_batch(const std::vector<Session*>& sessions,
                                                     const std::vector<std::vector<std::int64_t>>& token_ids) {
  const auto handles = detail::handles(sessions, token_ids.size());
  std::vector<const std::int64_t*> starts;
  std::vector<std::size_t> lengths;
  for (const auto& ids : token_ids) {
    starts.push_back(ids.data());
    lengths.push_back(ids.size());
  }
  std::vector<float> logits(handles.empty() ? 0 : handles.size() * sessions[0]->logits_size());
  detail::check(megalodon_prefill_batch(handles.data(), starts.data(), lengths.data(), handles.size(), logits.data()));
  return detail::rows(logits, handles.size());
}

// Turns token ids into text piece by piece, up to the first stop string. For callers with their own decode loop.
class TextStream {
 public:
  explicit TextStream(const Engine& engine, const std::vector<std::string>& stop = {}) {
    const std::vector<const char*> strings = detail::c_stop(stop);
    megalodon_text_stream* stream = nullptr;
    detail::check(megalodon_text_stream_create(engine.get(), strings.data(), strings.size(), &stream));
    handle_.reset(stream);
  }

  // Adds a token. Returns the text that no later token can change, which may be empty.
  std::string push(std::int64_t token_id) {
    const char* piece = nullptr;
    std::size_t size = 0;
    std::int32_t stopped = 0;
    detail::check(megalodon_text_stream_push(handle_.get(), token_id, &piece, &size, &stopped));
    stopped_ = stopped != 0;
    return {piece, size};
  }

  // Ends the stream. Returns the text that was held back.
  std::string flush() {
    const char* piece = nullptr;
    std::size_t size = 0;
    detail::check(megalodon_text_stream_flush(handle_.get(), &piece, &size));
    return {piece, size};
  }

  bool stopped() const { return stopped_; }

 private:
  std::unique_ptr<megalodon_text_stream, detail::Free<megalodon_text_stream_free>> handle_;
  bool stopped_ = false;
};

}  // namespace megalodon
