/* megalodon.h: runs Megalodon language models from an exported bundle in any C or C++ program, without Python.

   A complete program that continues a text:

       #include <megalodon.h>
       #include <stdio.h>

       static int print_piece(void* user, const char* piece, size_t size) {
         (void)user;
         fwrite(piece, 1, size, stdout);
         fflush(stdout);
         return 0;  // anything else ends the generation
       }

       static int failed(megalodon_status status) {
         if (status != MEGALODON_OK) fprintf(stderr, "%s\n", megalodon_last_error());
         return status != MEGALODON_OK;
       }

       int main(int argc, char** argv) {
         megalodon_engine* engine = NULL;
         megalodon_session* session = NULL;
         megalodon_generate_options options = MEGALODON_GENERATE_OPTIONS_INIT;
         if (argc != 3) return 2;
         options.max_new_tokens = 64;
         const int bad = failed(megalodon_engine_open(argv[1], NULL, &engine)) ||
                         failed(megalodon_session_create(engine, &session)) ||
                         failed(megalodon_session_generate_text(session, argv[2], &options, print_piece, NULL, NULL));
         megalodon_session_free(session);
         megalodon_engine_free(engine);
         return bad;
       }

   An engine holds the weights and programs of one bundle. A session holds the state of one stream of tokens; the state
   has a constant size, however long the stream is. Token ids are int64_t. Logits are `logits_size` floats per token.

   Errors: every function returns a status. `megalodon_last_error` says what was wrong and what to do. No exception
   leaves the library.

   Memory: a `_free` function frees each object, and accepts NULL. A session keeps its engine alive.

   Threads: any number of threads may use an engine at a time, and one thread a session. A second call on a session
   returns MEGALODON_BUSY. Each calling thread has its own OpenMP threads (OMP_NUM_THREADS), which the programs use.

   Processes: a process that was forked after a bundle was opened can use no engine and open none, since threads do not
   live on in a fork. Calls return MEGALODON_UNAVAILABLE there. Fork first, then open an engine in each child.

   Trust: the programs in a bundle are native code. The library checks sizes and sha256 of all files before it loads any
   of it. This detects damage, not malice: open only bundles from people you trust, in folders that nobody changes. */
#ifndef MEGALODON_H
#define MEGALODON_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MEGALODON_API __attribute__((visibility("default")))
#else
#define MEGALODON_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows with every change that breaks an older caller. New members at the end of a struct do not: structs begin with
   their size. */
#define MEGALODON_ABI_VERSION 1

typedef enum megalodon_status {
  MEGALODON_OK = 0,
  MEGALODON_INVALID_ARGUMENT = 1, /* refused before anything ran; no object has changed */
  MEGALODON_BAD_BUNDLE = 2,       /* the bundle is damaged, incomplete or of another schema; nothing was loaded */
  MEGALODON_UNAVAILABLE = 3,      /* the bundle's programs or tokenizer cannot run here, e.g. in a forked child */
  MEGALODON_IO = 4,               /* a file cannot be read or written */
  MEGALODON_BUSY = 5,             /* the session is in use by another call */
  MEGALODON_POISONED = 6,         /* an earlier call failed half-way; reset or restore the session */
  MEGALODON_OUT_OF_MEMORY = 7,
  MEGALODON_FAILED = 8 /* a program failed; the sessions of the call are poisoned */
} megalodon_status;

typedef struct megalodon_engine megalodon_engine;
typedef struct megalodon_session megalodon_session;
typedef struct megalodon_snapshot megalodon_snapshot;
typedef struct megalodon_text_stream megalodon_text_stream;

/* The MEGALODON_ABI_VERSION of the loaded library. Compare it with the header's. */
MEGALODON_API uint32_t megalodon_abi_version(void);

/* The library's version, e.g. "0.1.0". */
MEGALODON_API const char* megalodon_version(void);

/* The message of the last call of this thread that failed. Valid until the next call of the thread that fails. */
MEGALODON_API const char* megalodon_last_error(void);

/* ---- engines ----------------------------------------------------------------------------------------------------- */

typedef struct megalodon_engine_options {
  size_t struct_size;
  int32_t check_hashes; /* 0 skips the sha256 of the files, for a folder that was checked before; sizes are checked */
  int32_t concurrency;  /* calls of a program that may run at the same time, 1..1024; 0: one for every processor */
} megalodon_engine_options;
#define MEGALODON_ENGINE_OPTIONS_INIT {sizeof(megalodon_engine_options), 1, 0}

typedef struct megalodon_engine_info {
  size_t struct_size; /* set it before the call */
  int64_t vocab_size; /* token ids are in 0..vocab_size-1 */
  int64_t logits_size;
  int64_t bos_token_id, eos_token_id; /* -1: the model has none */
  int64_t max_batch;                  /* sessions in one `megalodon_decode_batch` */
  int64_t layers;
  int64_t state_bytes;  /* memory of one session */
  int64_t weight_bytes; /* size of the weight files, which are mapped once and shared between processes */
  int32_t has_tokenizer;
} megalodon_engine_info;

/* Opens a bundle. With `options` NULL, the defaults apply. */
MEGALODON_API megalodon_status megalodon_engine_open(const char* folder, const megalodon_engine_options* options,
                                                     megalodon_engine** engine);
MEGALODON_API void megalodon_engine_free(megalodon_engine* engine);
MEGALODON_API megalodon_status megalodon_engine_get_info(const megalodon_engine* engine, megalodon_engine_info* info);

/* Tokenizes `size` bytes, which must be UTF-8. Writes up to `capacity` token ids, and to `count` how many the text has.
   Equal to Python's ids. MEGALODON_UNAVAILABLE if the library cannot read the bundle's tokenizer; the message names
   what it does not know. */
MEGALODON_API megalodon_status megalodon_engine_encode(const megalodon_engine* engine, const char* text, size_t size,
                                                       int64_t* token_ids, size_t capacity, size_t* count);

/* ---- sampling ---------------------------------------------------------------------------------------------------- */

/* How tokens are sampled. Equal seeds give the same tokens as in a Python session. */
typedef struct megalodon_sampling {
  double temperature; /* 0 is greedy */
  int64_t top_k;      /* 0 is off */
  double top_p;       /* in (0, 1], 1 is off */
  double min_p;       /* in [0, 1], 0 is off; relative to the most probable token */
  uint64_t seed;
} megalodon_sampling;
#define MEGALODON_GREEDY {0.0, 0, 1.0, 0.0, 0}

/* Samples token number `index` of a stream, counted from 0. */
MEGALODON_API megalodon_status megalodon_sample(const float* logits, size_t logits_size,
                                                const megalodon_sampling* sampling, uint64_t index, int64_t* token_id);

/* ---- sessions ---------------------------------------------------------------------------------------------------- */

MEGALODON_API megalodon_status megalodon_session_create(megalodon_engine* engine, megalodon_session** session);
MEGALODON_API void megalodon_session_free(megalodon_session* session);

/* Starts a fresh stream. A poisoned session can be used again. */
MEGALODON_API megalodon_status megalodon_session_reset(megalodon_session* session);

/* Makes a new session with the same state. */
MEGALODON_API megalodon_status megalodon_session_fork(megalodon_session* session, megalodon_session** fork);

/* The number of tokens fed so far. The token that `generate` returned last is not fed yet: the next call feeds it
   first. */
MEGALODON_API megalodon_status megalodon_session_position(megalodon_session* session, int64_t* position);

/* Feeds `count` tokens, 1 or more. Writes the logits after the last one, unless `logits` is NULL. */
MEGALODON_API megalodon_status megalodon_session_prefill(megalodon_session* session, const int64_t* token_ids,
                                                         size_t count, float* logits);

/* Feeds one token. Writes the logits after it, unless `logits` is NULL. */
MEGALODON_API megalodon_status megalodon_session_decode(megalodon_session* session, int64_t token_id, float* logits);

/* Feeds one token to each of `count` different sessions of one engine in a single step. Writes the logits
   (count x logits_size), unless `logits` is NULL.

   Sessions that step together share one block of memory, in their order. A session that is elsewhere is copied to its
   row of the block first; the others stay. For few copies, append sessions that join, and let the last one take the
   place of one that leaves. The block is freed when the last session has left it. */
MEGALODON_API megalodon_status megalodon_decode_batch(megalodon_session* const* sessions, const int64_t* token_ids,
                                                      size_t count, float* logits);

/* Feeds one token to each session as `megalodon_decode_batch` does, and samples the next token of each:
   `next[i]` by `samplings[i]`, as token number `indices[i]` of the stream, counted from 0. If all samplings are greedy,
   a GPU chooses the tokens itself, and no logits are copied to the host.

   If the logits of a session cannot be sampled (they contain NaN, say), the status is MEGALODON_FAILED and its `next`
   is -1. It alone is poisoned: the others have been fed and have their tokens. If the program fails, all get -1. */
MEGALODON_API megalodon_status megalodon_step_batch(megalodon_session* const* sessions, const int64_t* token_ids,
                                                    size_t count, const megalodon_sampling* samplings,
                                                    const uint64_t* indices, int64_t* next);

/* Feeds `lengths[i]` tokens (1 or more) of `token_ids[i]` to each of `count` different sessions of one engine, in calls
   that all share. Writes the logits (count x logits_size) after the last token of each, unless `logits` is NULL. */
MEGALODON_API megalodon_status megalodon_prefill_batch(megalodon_session* const* sessions,
                                                       const int64_t* const* token_ids, const size_t* lengths,
                                                       size_t count, float* logits);

/* ---- generation -------------------------------------------------------------------------------------------------- */

#define MEGALODON_MODEL_EOS (-2) /* generation ends at the model's end-of-sequence token */
#define MEGALODON_NO_EOS (-1)    /* generation ends at no token */

typedef struct megalodon_generate_options {
  size_t struct_size;
  megalodon_sampling sampling;
  int64_t max_new_tokens;
  int64_t eos_token_id;
  const char* const* stop; /* the text ends before the first of these strings; for `generate_text` alone */
  size_t stop_count;
} megalodon_generate_options;
#define MEGALODON_GENERATE_OPTIONS_INIT \
  {sizeof(megalodon_generate_options), MEGALODON_GREEDY, 256, MEGALODON_MODEL_EOS, NULL, 0}

typedef enum megalodon_finish {
  MEGALODON_FINISH_LENGTH = 0,
  MEGALODON_FINISH_EOS = 1,
  MEGALODON_FINISH_STOP_STRING = 2,
  MEGALODON_FINISH_STOPPED = 3 /* by the callback or `megalodon_session_stop` */
} megalodon_finish;

typedef struct megalodon_generate_result {
  size_t struct_size; /* set it before the call */
  int64_t finish;     /* a megalodon_finish */
  int64_t prompt_tokens, new_tokens;
  double prefill_seconds; /* for the prompt */
  double decode_seconds;  /* for the steps after it */
  double sample_seconds;
} megalodon_generate_result;

/* Gets each token, or each piece of text (UTF-8, followed by a zero byte), as soon as it is certain. The generation
   continues if it returns 0, and ends otherwise. It must not throw, and cannot use the session. */
typedef int (*megalodon_token_callback)(void* user, int64_t token_id);
typedef int (*megalodon_text_callback)(void* user, const char* piece, size_t size);

/* Feeds a prompt, which may be empty, and generates the tokens that follow it. The stream continues from its present
   state; a fresh stream with an empty prompt begins with the beginning-of-sequence token. With `options` NULL, the
   defaults apply. `result` may be NULL. */
MEGALODON_API megalodon_status megalodon_session_generate(megalodon_session* session, const int64_t* token_ids,
                                                          size_t count, const megalodon_generate_options* options,
                                                          megalodon_token_callback callback, void* user,
                                                          megalodon_generate_result* result);

/* Generates text after a prompt of UTF-8, as `megalodon_session_generate` does for token ids. MEGALODON_UNAVAILABLE
   if the library cannot read the bundle's tokenizer. */
MEGALODON_API megalodon_status megalodon_session_generate_text(megalodon_session* session, const char* prompt,
                                                               const megalodon_generate_options* options,
                                                               megalodon_text_callback callback, void* user,
                                                               megalodon_generate_result* result);

/* Ends the running generation at its next token. If none is running, ends the next one at its first token. Any thread
   may call it. */
MEGALODON_API void megalodon_session_stop(megalodon_session* session);

/* ---- text of a stream, for callers with their own decode loop ---------------------------------------------------- */

MEGALODON_API megalodon_status megalodon_text_stream_create(const megalodon_engine* engine, const char* const* stop,
                                                            size_t stop_count, megalodon_text_stream** stream);
MEGALODON_API void megalodon_text_stream_free(megalodon_text_stream* stream);

/* Adds a token. `piece` is the text that no later token can change; it is valid until the next call. Writes whether a
   stop string has ended the text, unless `stopped` is NULL. */
MEGALODON_API megalodon_status megalodon_text_stream_push(megalodon_text_stream* stream, int64_t token_id,
                                                          const char** piece, size_t* size, int32_t* stopped);

/* Ends the stream. `piece` is the text that was held back. */
MEGALODON_API megalodon_status megalodon_text_stream_flush(megalodon_text_stream* stream, const char** piece,
                                                           size_t* size);

/* ---- snapshots --------------------------------------------------------------------------------------------------- */

/* Copies a stream's state, which has the keys and values of one chunk at most. Python reads and writes the same bytes.
   `restore` returns MEGALODON_INVALID_ARGUMENT, with the stream as it was, for a snapshot of another model (weights
   file), or one that is no state of it. */
MEGALODON_API megalodon_status megalodon_session_snapshot(megalodon_session* session, megalodon_snapshot** snapshot);
MEGALODON_API megalodon_status megalodon_session_restore(megalodon_session* session,
                                                         const megalodon_snapshot* snapshot);
MEGALODON_API void megalodon_snapshot_free(megalodon_snapshot* snapshot);

/* Written whole or not at all. Loading returns MEGALODON_INVALID_ARGUMENT for a file that is damaged or no snapshot. */
MEGALODON_API megalodon_status megalodon_snapshot_save(const megalodon_snapshot* snapshot, const char* path);
MEGALODON_API megalodon_status megalodon_snapshot_load(const char* path, megalodon_snapshot** snapshot);

/* The content of the snapshot's file. The bytes are valid as long as the snapshot. */
MEGALODON_API megalodon_status megalodon_snapshot_bytes(const megalodon_snapshot* snapshot, const void** data,
                                                        size_t* size);
MEGALODON_API megalodon_status megalodon_snapshot_from_bytes(const void* data, size_t size,
                                                             megalodon_snapshot** snapshot);

#ifdef __cplusplus
}
#endif

#endif
