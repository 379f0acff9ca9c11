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
