/* megalodon.h: Megalodon language models from an exported bundle, in any C or C++ program, without Python.

   A complete program, which continues a text:

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

   Engines hold the weights and programs of one bundle; sessions hold the state of one stream of tokens, constant in
   size however long it runs. Every function returns a status; `megalodon_last_error` says in words what was wrong and
   what to do. No exception leaves the library. Objects are freed by their `_free` function, which takes NULL; a session
   keeps its engine alive. Token ids are int64_t, logits are float, `logits_size` of them after a token.

   Threads: an engine may be used by any number of threads at a time, a session by one; a second call on it is refused
   with MEGALODON_BUSY. The programs themselves use OpenMP threads (OMP_NUM_THREADS), per calling thread.

   Trust: the programs in a bundle are native code. Sizes and sha256 of all files are checked before any of it is
   loaded, which detects damage, not malice: open only bundles from those you trust, in folders that nobody changes. */
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

/* Grows with every change that an older caller would notice. Structs begin with their size, so they may grow at the
   end without one. */
#define MEGALODON_ABI_VERSION 1

typedef enum megalodon_status {
  MEGALODON_OK = 0,
  MEGALODON_INVALID_ARGUMENT = 1, /* refused before anything ran; objects are as they were */
  MEGALODON_BAD_BUNDLE = 2,       /* damaged, incomplete or of another schema; nothing of it was loaded */
  MEGALODON_UNAVAILABLE = 3,      /* the bundle's programs or tokenizer cannot run here */
  MEGALODON_IO = 4,               /* a file cannot be read or written */
  MEGALODON_BUSY = 5,             /* the session is in use by another call */
  MEGALODON_POISONED = 6,         /* an earlier call failed half-way: reset or restore the session */
  MEGALODON_OUT_OF_MEMORY = 7,
  MEGALODON_FAILED = 8 /* a program failed; the sessions of the call are poisoned */
} megalodon_status;

typedef struct megalodon_engine megalodon_engine;
typedef struct megalodon_session megalodon_session;
typedef struct megalodon_snapshot megalodon_snapshot;
typedef struct megalodon_text_stream megalodon_text_stream;

/* MEGALODON_ABI_VERSION of the library that is loaded; compare it with the header's. */
MEGALODON_API uint32_t megalodon_abi_version(void);

/* The library's version, e.g. "0.1.0". */
MEGALODON_API const char* megalodon_version(void);

/* What the last call of this thread that failed said; valid until the thread's next call that fails. */
MEGALODON_API const char* megalodon_last_error(void);

/* ---- engines ----------------------------------------------------------------------------------------------------- */

typedef struct megalodon_engine_options {
  size_t struct_size;
  int32_t check_hashes; /* 0 skips the sha256 of every file, for a folder verified before; sizes are always checked */
  int32_t concurrency;  /* calls of a program that may run at the same time, 1 or more; 0: one for every processor */
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
  int64_t weight_bytes; /* of the weight files, mapped once and shared between processes */
  int32_t has_tokenizer;
} megalodon_engine_info;

/* Opens a bundle. options NULL: the defaults. */
MEGALODON_API megalodon_status megalodon_engine_open(const char* folder, const megalodon_engine_options* options,
                                                     megalodon_engine** engine);
MEGALODON_API void megalodon_engine_free(megalodon_engine* engine);
MEGALODON_API megalodon_status megalodon_engine_get_info(const megalodon_engine* engine, megalodon_engine_info* info);

/* Token ids of a text of `size` bytes of UTF-8: writes up to `capacity` of them, and how many there are to `count`.
   MEGALODON_UNAVAILABLE unless the bundle's tokenizer is byte-level. */
MEGALODON_API megalodon_status megalodon_engine_encode(const megalodon_engine* engine, const char* text, size_t size,
                                                       int64_t* token_ids, size_t capacity, size_t* count);

/* ---- sampling ---------------------------------------------------------------------------------------------------- */

/* How tokens are chosen; equal seeds give the tokens that the Python session gives. */
typedef struct megalodon_sampling {
  double temperature; /* 0 is greedy */
  int64_t top_k;      /* 0 is off */
  double top_p;       /* in (0, 1], 1 is off */
  double min_p;       /* in [0, 1], 0 is off; relative to the most probable token */
  uint64_t seed;
} megalodon_sampling;
#define MEGALODON_GREEDY {0.0, 0, 1.0, 0.0, 0}

/* The token that a stream samples after `index` others. */
MEGALODON_API megalodon_status megalodon_sample(const float* logits, size_t logits_size,
                                                const megalodon_sampling* sampling, uint64_t index, int64_t* token_id);

/* ---- sessions ---------------------------------------------------------------------------------------------------- */

MEGALODON_API megalodon_status megalodon_session_create(megalodon_engine* engine, megalodon_session** session);
MEGALODON_API void megalodon_session_free(megalodon_session* session);

/* Forgets the stream, and what poisoned it. */
MEGALODON_API megalodon_status megalodon_session_reset(megalodon_session* session);

/* A new session at the same point of the stream. */
MEGALODON_API megalodon_status megalodon_session_fork(megalodon_session* session, megalodon_session** fork);

/* Tokens fed so far. The token that `generate` gave out last is not among them: the next call feeds it first. */
MEGALODON_API megalodon_status megalodon_session_position(megalodon_session* session, int64_t* position);

/* Feeds `count` tokens, 1 or more; logits (may be NULL) after the last. */
MEGALODON_API megalodon_status megalodon_session_prefill(megalodon_session* session, const int64_t* token_ids,
                                                         size_t count, float* logits);

/* Feeds one token; logits may be NULL. */
MEGALODON_API megalodon_status megalodon_session_decode(megalodon_session* session, int64_t token_id, float* logits);

/* Feeds one token to each of `count` different sessions of one engine in a single step; logits (count x logits_size,
   may be NULL). Sessions that step together share one block of memory, in their order, freed when the last of them has
   left it: one that is not in its place there is copied to it, the others stay. So append those that join, and let the
   last one take the place of one that leaves. */
MEGALODON_API megalodon_status megalodon_decode_batch(megalodon_session* const* sessions, const int64_t* token_ids,
                                                      size_t count, float* logits);

/* The same, and samples what follows each stream: `next[i]` by `samplings[i]`, after `indices[i]` other draws. Greedy
   tokens are chosen where the logits are, which on a GPU saves their way to the host. */
MEGALODON_API megalodon_status megalodon_step_batch(megalodon_session* const* sessions, const int64_t* token_ids,
                                                    size_t count, const megalodon_sampling* samplings,
                                                    const uint64_t* indices, int64_t* next);

/* Feeds each of `count` different sessions of one engine tokens of its own, `lengths[i]` (1 or more) of `token_ids[i]`,
   side by side; logits (count x logits_size, may be NULL) after the last of each. */
MEGALODON_API megalodon_status megalodon_prefill_batch(megalodon_session* const* sessions,
                                                       const int64_t* const* token_ids, const size_t* lengths,
                                                       size_t count, float* logits);

/* ---- generation -------------------------------------------------------------------------------------------------- */

#define MEGALODON_MODEL_EOS (-2) /* end at the model's own end-of-sequence token */
#define MEGALODON_NO_EOS (-1)

typedef struct megalodon_generate_options {
  size_t struct_size;
  megalodon_sampling sampling;
  int64_t max_new_tokens;
  int64_t eos_token_id;
  const char* const* stop; /* strings before the first of which the text ends; for `generate_text` alone */
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
  double prefill_seconds; /* of the prompt */
  double decode_seconds;  /* of the steps after it */
  double sample_seconds;
} megalodon_generate_result;

/* Called with each token, or piece of text (UTF-8, followed by a zero byte), as soon as it is certain.
   0 goes on, anything else ends the generation. It must not throw, and cannot use the session. */
typedef int (*megalodon_token_callback)(void* user, int64_t token_id);
typedef int (*megalodon_text_callback)(void* user, const char* piece, size_t size);

/* Feeds a prompt, which may be empty, and generates what follows. options NULL: the defaults. result may be NULL.
   Goes on from wherever the stream is; an empty prompt of a fresh stream is the beginning-of-sequence token. */
MEGALODON_API megalodon_status megalodon_session_generate(megalodon_session* session, const int64_t* token_ids,
                                                          size_t count, const megalodon_generate_options* options,
                                                          megalodon_token_callback callback, void* user,
                                                          megalodon_generate_result* result);

/* The same with text. MEGALODON_UNAVAILABLE unless the bundle's tokenizer is byte-level. */
MEGALODON_API megalodon_status megalodon_session_generate_text(megalodon_session* session, const char* prompt,
                                                               const megalodon_generate_options* options,
                                                               megalodon_text_callback callback, void* user,
                                                               megalodon_generate_result* result);

/* From any thread: ends the generation that runs, at its next token, or else the next one, at its first. */
MEGALODON_API void megalodon_session_stop(megalodon_session* session);

/* ---- text of a stream, for those who decode themselves ----------------------------------------------------------- */

MEGALODON_API megalodon_status megalodon_text_stream_create(const megalodon_engine* engine, const char* const* stop,
                                                            size_t stop_count, megalodon_text_stream** stream);
MEGALODON_API void megalodon_text_stream_free(megalodon_text_stream* stream);

/* Adds a token; `piece` is the text that no later token can change, valid until the next call. `stopped` (may be NULL):
   whether a stop string has ended the text. */
MEGALODON_API megalodon_status megalodon_text_stream_push(megalodon_text_stream* stream, int64_t token_id,
                                                          const char** piece, size_t* size, int32_t* stopped);

/* Ends the stream: the text still held back. */
MEGALODON_API megalodon_status megalodon_text_stream_flush(megalodon_text_stream* stream, const char** piece,
                                                           size_t* size);

/* ---- snapshots --------------------------------------------------------------------------------------------------- */

/* A copy of a stream's state, of constant size. Files and bytes are those of the Python package's snapshots. */
MEGALODON_API megalodon_status megalodon_session_snapshot(megalodon_session* session, megalodon_snapshot** snapshot);
MEGALODON_API megalodon_status megalodon_session_restore(megalodon_session* session,
                                                         const megalodon_snapshot* snapshot);
MEGALODON_API void megalodon_snapshot_free(megalodon_snapshot* snapshot);

MEGALODON_API megalodon_status megalodon_snapshot_save(const megalodon_snapshot* snapshot, const char* path);
MEGALODON_API megalodon_status megalodon_snapshot_load(const char* path, megalodon_snapshot** snapshot);

/* The bytes of the file; they belong to the snapshot. */
MEGALODON_API megalodon_status megalodon_snapshot_bytes(const megalodon_snapshot* snapshot, const void** data,
                                                        size_t* size);
MEGALODON_API megalodon_status megalodon_snapshot_from_bytes(const void* data, size_t size,
                                                             megalodon_snapshot** snapshot);

#ifdef __cplusplus
}
#endif

#endif
