// The handles of the C ABI, and the conversion of its arguments, results and errors. For c_api.cpp alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "error.hpp"
#include "generation/session.hpp"
#include "generation/text.hpp"

struct megalodon_engine {
  std::shared_ptr<const megalodon::impl::Engine> engine;
};
struct megalodon_session {
  std::unique_ptr<megalodon::impl::Session> session;
};
struct megalodon_snapshot {
  megalodon::impl::Snapshot snapshot;
};
struct megalodon_text_stream {
  std::shared_ptr<const megalodon::impl::Engine> engine;  // has the tokenizer that the stream uses
  megalodon::impl::TextStream stream;
  std::string piece;  // the text that the caller may read until the next call
};

namespace megalodon::impl::abi {

// ---- errors ---------------------------------------------------------------------------------------------------------

inline thread_local std::string last_error;

inline megalodon_status set_last_error(megalodon_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

// Calls `call` and turns its exceptions into a status and the thread's last error.
template <typename Call>
megalodon_status guarded(Call call) noexcept {
  try {
    call();
    return MEGALODON_OK;
  } catch (const Error& error) {
    return set_last_error(error.code, error.what());
  } catch (const std::bad_alloc&) {
    return set_last_error(MEGALODON_OUT_OF_MEMORY, "out of memory; use fewer sessions, or a smaller model");
  } catch (const std::exception& error) {
    return set_last_error(MEGALODON_FAILED, error.what());
  } catch (...) {
    return set_last_error(MEGALODON_FAILED, "an unknown exception was thrown");
  }
}

inline void need(const void* pointer, const std::string& name) {
  require(pointer != nullptr, name + " is NULL, expected an address");
}

// Checks the address of an array, and that its size is one that memory can hold.
template <typename Value>
void need(const Value* values, std::size_t count, const std::string& name, const char* count_name) {
  constexpr std::size_t most = PTRDIFF_MAX / sizeof(Value);
  require(count <= most, std::string(count_name) + " is " + std::to_string(count) + ", expected at most " +
                             std::to_string(most));
  if (count > 0) need(values, name);
}

// ---- structs that may be of an older or newer version of the header -------------------------------------------------

// The size of a struct in the first version of the header. A struct that grows keeps the number that it had.
template <typename Struct>
inline constexpr std::size_t kFirstSize = sizeof(Struct);
inline constexpr std::size_t kMostSize = 4096;

template <typename Struct>
void check_size(const Struct* given, const char* remedy) {
  require(given->struct_size >= kFirstSize<Struct> && given->struct_size <= kMostSize,
          "struct_size is " + std::to_string(given->struct_size) + ", expected " + std::to_string(kFirstSize<Struct>) +
              " or more; " + remedy);
}

// The caller's options, with defaults for the members that the caller's version of the struct lacks. Members that this
// version lacks must be zero, since nobody would heed them.
template <typename Options>
Options read_options(const Options* given, Options defaults) {
  if (given == nullptr) return defaults;
  check_size(given, "initialise options with their _INIT");
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  require(std::all_of(bytes + std::min(given->struct_size, sizeof defaults), bytes + given->struct_size,
                      [](unsigned char byte) { return byte == 0; }),
          "struct_size is " + std::to_string(given->struct_size) + ", but this library knows options of " +
              std::to_string(sizeof defaults) + " bytes only; leave the others 0, or use a newer library");
  std::memcpy(&defaults, given, std::min(given->struct_size, sizeof defaults));
  return defaults;
}

// Fills the members of a result that the caller's version of the struct has.
template <typename Result>
void write_result(Result* to, Result result) {
  result.struct_size = to->struct_size;
  std::memcpy(to, &result, std::min(to->struct_size, sizeof result));
}

// ---- arguments and results ------------------------------------------------------------------------------------------

inline Session& of(const megalodon_session* session) {
  need(session, "session");
  session->session->engine()->require_same_process();
  return *session->session;
}

inline const Engine& of(const megalodon_engine* engine) {
  need(engine, "engine");
  engine->engine->require_same_process();
  return *engine->engine;
}

// Frees a handle that belongs to an engine. In a forked child nothing is freed: the engine's threads and GPU, on which
// that could wait, are not there.
template <typename Handle>
void free_handle(Handle* handle, const Engine& engine) {
  if (engine.is_same_process()) delete handle;
}

inline std::vector<Session*> sessions_of(megalodon_session* const* sessions, std::size_t count) {
  require(count > 0, "there are no sessions to feed; give at least one");
  need(sessions, "sessions");
  of(sessions[0]).engine()->check_batch(count);
  std::vector<Session*> all;
  for (std::size_t i = 0; i < count; ++i) {
    need(sessions[i], "sessions[" + std::to_string(i) + "]");
    all.push_back(&of(sessions[i]));
  }
  return all;
}

inline std::span<const std::int64_t> ids_of(const std::int64_t* token_ids, std::size_t count) {
  need(token_ids, count, "token_ids", "count");
  return {token_ids, count};
}

inline std::span<float> logits_of(const Session& session, float* logits, std::size_t rows) {
  if (logits == nullptr) return {};
  return {logits, rows * static_cast<std::size_t>(session.engine()->manifest().logits_size)};
}

inline std::vector<std::string> strings_of(const char* const* strings, std::size_t count) {
  need(strings, count, "stop", "stop_count");
  std::vector<std::string> values;
  for (std::size_t i = 0; i < count; ++i) {
    need(strings[i], "stop[" + std::to_string(i) + "]");
    values.emplace_back(strings[i]);
  }
  return values;
}

inline GenerateOptions convert(const megalodon_generate_options& options) {
  return {options.sampling, options.max_new_tokens, options.eos_token_id};
}

inline megalodon_generate_result convert(const GenerateResult& result) {
  return {.struct_size = 0,
          .finish = result.finish,
          .prompt_tokens = result.prompt_tokens,
          .new_tokens = result.new_tokens,
          .prefill_seconds = result.prefill_seconds,
          .decode_seconds = result.decode_seconds,
          .sample_seconds = result.sample_seconds};
}

inline megalodon_engine_info info_of(const Engine& engine) {
  const Manifest& manifest = engine.manifest();
  return {.struct_size = 0,
          .vocab_size = manifest.vocab_size,
          .logits_size = manifest.logits_size,
          .bos_token_id = manifest.bos_token_id.value_or(-1),
          .eos_token_id = manifest.eos_token_id.value_or(-1),
          .max_batch = manifest.max_batch,
          .layers = manifest.layers,
          .state_bytes = engine.state_bytes(),
          .weight_bytes = engine.weight_bytes(),
          .has_tokenizer = engine.has_tokenizer() ? 1 : 0};
}

// Stores a piece of text in the stream and gives the caller its address.
inline void give_piece(megalodon_text_stream& stream, std::string text, const char** piece, std::size_t* size) {
  stream.piece = std::move(text);
  *piece = stream.piece.c_str();
  *size = stream.piece.size();
}

}  // namespace megalodon::impl::abi
