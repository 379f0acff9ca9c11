// The C ABI. Handles wrap the library's classes, and no exception leaves a function.
#include "c_api.hpp"

#include <algorithm>

#include "generation/sampling.hpp"
#include "utf8.hpp"

namespace impl = megalodon::impl;
using namespace megalodon::impl::abi;
using megalodon::impl::require;

extern "C" {

uint32_t megalodon_abi_version(void) { return MEGALODON_ABI_VERSION; }

const char* megalodon_version(void) { return MEGALODON_VERSION; }

const char* megalodon_last_error(void) { return last_error.c_str(); }

// ---- engines --------------------------------------------------------------------------------------------------------

megalodon_status megalodon_engine_open(const char* folder, const megalodon_engine_options* options,
                                       megalodon_engine** engine) {
  return guarded([&] {
    need(folder, "folder");
    need(engine, "engine");
    const auto chosen = read_options(options, megalodon_engine_options MEGALODON_ENGINE_OPTIONS_INIT);
    auto opened = std::make_shared<const impl::Engine>(folder, chosen.check_hashes != 0, chosen.concurrency);
    *engine = new megalodon_engine{std::move(opened)};
  });
}

void megalodon_engine_free(megalodon_engine* engine) {
  if (engine != nullptr) free_handle(engine, *engine->engine);
}

megalodon_status megalodon_engine_get_info(const megalodon_engine* engine, megalodon_engine_info* info) {
  return guarded([&] {
    need(info, "info");
    check_size(info, "set it to the size of the struct");
    write_result(info, info_of(of(engine)));
  });
}

megalodon_status megalodon_engine_encode(const megalodon_engine* engine, const char* text, size_t size,
                                         int64_t* token_ids, size_t capacity, size_t* count) {
  return guarded([&] {
    need(text, size, "text", "size");
    need(token_ids, capacity, "token_ids", "capacity");
    need(count, "count");
    const impl::Tokenizer& tokenizer = of(engine).tokenizer();
    impl::require_utf8({text, size}, "the text");
    const std::vector<std::int64_t> ids = tokenizer.encode({text, size});
    std::copy_n(ids.begin(), std::min(capacity, ids.size()), token_ids);
    *count = ids.size();
  });
}

// ---- sampling -------------------------------------------------------------------------------------------------------

megalodon_status megalodon_sample(const float* logits, size_t logits_size, const megalodon_sampling* sampling,
                                  uint64_t index, int64_t* token_id) {
  return guarded([&] {
    need(logits, "logits");
    need(token_id, "token_id");
    require(logits_size > 0 && logits_size <= INT32_MAX,
            "logits_size is " + std::to_string(logits_size) + ", expected the engine's");
    const megalodon_sampling params = sampling == nullptr ? megalodon_sampling MEGALODON_GREEDY : *sampling;
    impl::check_sampling(params);
    *token_id = impl::sample({logits, logits_size}, params, index);
  });
}

// ---- sessions -------------------------------------------------------------------------------------------------------

megalodon_status megalodon_session_create(megalodon_engine* engine, megalodon_session** session) {
  return guarded([&] {
    of(engine);
    need(session, "session");
    *session = new megalodon_session{std::make_unique<impl::Session>(engine->engine)};
  });
}

void megalodon_session_free(megalodon_session* session) {
  if (session != nullptr) free_handle(session, *session->session->engine());
}

megalodon_status megalodon_session_reset(megalodon_session* session) {
  return guarded([&] { of(session).reset(); });
}

megalodon_status megalodon_session_fork(megalodon_session* session, megalodon_session** fork) {
  return guarded([&] {
    need(fork, "fork");
    *fork = new megalodon_session{of(session).fork()};
  });
}

megalodon_status megalodon_session_position(megalodon_session* session, int64_t* position) {
  return guarded([&] {
    need(position, "position");
    *position = of(session).position();
  });
}

megalodon_status megalodon_session_prefill(megalodon_session* session, const int64_t* token_ids, size_t count,
                                           float* logits) {
  return guarded([&] { of(session).prefill(ids_of(token_ids, count), logits_of(of(session), logits, 1)); });
}

megalodon_status megalodon_session_decode(megalodon_session* session, int64_t token_id, float* logits) {
  return guarded([&] { of(session).decode(token_id, logits_of(of(session), logits, 1)); });
}

megalodon_status megalodon_decode_batch(megalodon_session* const* sessions, const int64_t* token_ids, size_t count,
                                        float* logits) {
  return guarded([&] {
    const std::vector<impl::Session*> all = sessions_of(sessions, count);
    impl::Session::decode_batch(all, ids_of(token_ids, count), logits_of(*all[0], logits, count));
  });
}

megalodon_status megalodon_step_batch(megalodon_session* const* sessions, const int64_t* token_ids, size_t count,
                                      const megalodon_sampling* samplings, const uint64_t* indices, int64_t* next) {
  return guarded([&] {
    const std::vector<impl::Session*> all = sessions_of(sessions, count);
    need(samplings, "samplings");
    need(indices, "indices");
    need(next, "next");
    impl::Session::step_batch(all, ids_of(token_ids, count), {samplings, count}, {indices, count}, {next, count});
  });
}

megalodon_status megalodon_prefill_batch(megalodon_session* const* sessions, const int64_t* const* token_ids,
                                         const size_t* lengths, size_t count, float* logits) {
  return guarded([&] {
    const std::vector<impl::Session*> all = sessions_of(sessions, count);
    need(token_ids, "token_ids");
    need(lengths, "lengths");
    std::vector<std::span<const std::int64_t>> prompts;
    for (std::size_t i = 0; i < count; ++i) {
      const std::string index = std::string("[").append(std::to_string(i)).append("]");
      need(token_ids[i], lengths[i], "token_ids" + index, ("lengths" + index).c_str());
      prompts.emplace_back(token_ids[i], lengths[i]);
    }
    impl::Session::prefill_batch(all, prompts, logits_of(*all[0], logits, count));
  });
}

// ---- generation -----------------------------------------------------------------------------------------------------

megalodon_status megalodon_session_generate(megalodon_session* session, const int64_t* token_ids, size_t count,
                                            const megalodon_generate_options* options,
                                            megalodon_token_callback callback, void* user,
                                            megalodon_generate_result* result) {
  return guarded([&] {
    require(callback != nullptr, "callback is NULL, expected a function");
    const auto chosen = read_options(options, megalodon_generate_options MEGALODON_GENERATE_OPTIONS_INIT);
    require(chosen.stop_count == 0, "stop strings end texts; use megalodon_session_generate_text");
    const auto give = [&](std::int64_t token) {
      return callback(user, token) == 0 ? std::nullopt : std::optional(MEGALODON_FINISH_STOPPED);
    };
    if (result != nullptr) check_size(result, "set it to the size of the struct");
    const impl::GenerateResult done = of(session).generate(ids_of(token_ids, count), convert(chosen), give);
    if (result != nullptr) write_result(result, convert(done));
  });
}

megalodon_status megalodon_session_generate_text(megalodon_session* session, const char* prompt,
                                                 const megalodon_generate_options* options,
                                                 megalodon_text_callback callback, void* user,
                                                 megalodon_generate_result* result) {
  return guarded([&] {
    need(prompt, "prompt");
    require(callback != nullptr, "callback is NULL, expected a function");
    const auto chosen = read_options(options, megalodon_generate_options MEGALODON_GENERATE_OPTIONS_INIT);
    const auto give = [&](const std::string& piece) { return callback(user, piece.c_str(), piece.size()) != 0; };
    if (result != nullptr) check_size(result, "set it to the size of the struct");
    const impl::GenerateResult done =
        of(session).generate_text(prompt, convert(chosen), strings_of(chosen.stop, chosen.stop_count), give);
    if (result != nullptr) write_result(result, convert(done));
  });
}

void megalodon_session_stop(megalodon_session* session) {
  if (session != nullptr) session->session->stop();
}

// ---- text -----------------------------------------------------------------------------------------------------------

megalodon_status megalodon_text_stream_create(const megalodon_engine* engine, const char* const* stop,
                                              size_t stop_count, megalodon_text_stream** stream) {
  return guarded([&] {
    need(stream, "stream");
    impl::TextStream text(of(engine).tokenizer(), strings_of(stop, stop_count));
    *stream = new megalodon_text_stream{engine->engine, std::move(text), ""};
  });
}

void megalodon_text_stream_free(megalodon_text_stream* stream) {
  if (stream != nullptr) free_handle(stream, *stream->engine);
}

megalodon_status megalodon_text_stream_push(megalodon_text_stream* stream, int64_t token_id, const char** piece,
                                            size_t* size, int32_t* stopped) {
  return guarded([&] {
    need(stream, "stream");
    need(piece, "piece");
    need(size, "size");
    give_piece(*stream, stream->stream.push(token_id), piece, size);
    if (stopped != nullptr) *stopped = stream->stream.stopped() ? 1 : 0;
  });
}

megalodon_status megalodon_text_stream_flush(megalodon_text_stream* stream, const char** piece, size_t* size) {
  return guarded([&] {
    need(stream, "stream");
    need(piece, "piece");
    need(size, "size");
    give_piece(*stream, stream->stream.flush(), piece, size);
  });
}

// ---- snapshots ------------------------------------------------------------------------------------------------------

megalodon_status megalodon_session_snapshot(megalodon_session* session, megalodon_snapshot** snapshot) {
  return guarded([&] {
    need(snapshot, "snapshot");
    *snapshot = new megalodon_snapshot{of(session).snapshot()};
  });
}

megalodon_status megalodon_session_restore(megalodon_session* session, const megalodon_snapshot* snapshot) {
  return guarded([&] {
    need(snapshot, "snapshot");
    of(session).restore(snapshot->snapshot);
  });
}

void megalodon_snapshot_free(megalodon_snapshot* snapshot) { delete snapshot; }

megalodon_status megalodon_snapshot_save(const megalodon_snapshot* snapshot, const char* path) {
  return guarded([&] {
    need(snapshot, "snapshot");
    need(path, "path");
    snapshot->snapshot.save(path);
  });
}

megalodon_status megalodon_snapshot_load(const char* path, megalodon_snapshot** snapshot) {
  return guarded([&] {
    need(path, "path");
    need(snapshot, "snapshot");
    *snapshot = new megalodon_snapshot{impl::Snapshot::load(path)};
  });
}

megalodon_status megalodon_snapshot_bytes(const megalodon_snapshot* snapshot, const void** data, size_t* size) {
  return guarded([&] {
    need(snapshot, "snapshot");
    need(data, "data");
    need(size, "size");
    *data = snapshot->snapshot.bytes().data();
    *size = snapshot->snapshot.bytes().size();
  });
}

megalodon_status megalodon_snapshot_from_bytes(const void* data, size_t size, megalodon_snapshot** snapshot) {
  return guarded([&] {
    const auto* bytes = static_cast<const std::byte*>(data);
    need(bytes, size, "data", "size");
    need(snapshot, "snapshot");
    *snapshot = new megalodon_snapshot{impl::Snapshot::parse({bytes, bytes + size}, "the snapshot")};
  });
}

}  // extern "C"
