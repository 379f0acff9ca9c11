// The handles of the C ABI, and the conversion of its arguments, results and errors. For c_api.cpp alone.
#pragma once

#include <algorithm>
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

inline void need(const void* pointer, const char* name) {
  require(pointer != nullptr, std::string(name) + " is NULL, expected an address");
}

// ---- structs that may be of an older or newer version of the header -------------------------------------------------

// The caller's options, with defaults for the members that the caller's version of the struct lacks.
template <typename Options>
Options read_options(const Options* given, Options defaults) {
  if (given == nullptr) return defaults;
  require(given->struct_size >= sizeof given->struct_size && given->struct_size <= 4096,
          "struct_size is " + std::to_string(given->struct_size) + "; initialise options with their _INIT");
  std::memcpy(&defaults, given, std::min(given->struct_size, sizeof defaults));
  return defaults;
}

// Fills the members of a result that the caller's version of the struct has.
template <typename Result>
void write_result(Result* to, Result result) {
  require(to->struct_size >= sizeof to->struct_size, "struct_size is too small; set it to the size of the struct");
  result.struct_size = to->struct_size;
  std::memcpy(to, &result, std::min(to->struct_size, sizeof result));
}

// ---- arguments and results ------------------------------------------------------------------------------------------

inline Session& of(const megalodon_session* session) {
  need(session, "session");
  return *session->session;
}

inline const Engine& of(const megalodon_engine* engine) {
  need(engine, "engine");
  return *engine->engine;
}

inline std::vector<Session*> sessions_of(megalodon_session* const* sessions, std::size_t count) {
  require(count > 0, "there are no sessions to feed; give at least one");
  need(sessions, "sessions");
  std::vector<Session*> all;
  for (std::size_t i = 0; i < count; ++i) all.push_back(&of(sessions[i]));
  return all;
}

inline std::span<const std::int64_t> ids_of(const std::int64_t* token_ids, std::size_t count) {
  if (count > 0) need(token_ids, "token_ids");
  return {token_ids, count};
}

inline std::span<float> logits_of(const Session& session, float* logits, std::size_t rows) {
  if (logits == nullptr) return {};
  return {logits, rows * static_cast<std::size_t>(session.engine()->manifest().logits_size)};
}

inline std::vector<std::string> strings_of(const char* const* strings, std::size_t count) {
  if (count > 0) need(strings, "stop");
  std::vector<std::string> values;
  for (std::size_t i = 0; i < count; ++i) {
    need(strings[i], "a stop string");
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
