// Continues several prompts at once, as a service does: one decode step feeds all streams. Prints the token ids.
#include <iostream>
#include <megalodon.hpp>

int main(int argc, char** argv) try {
  if (argc < 4) return 2;
  const megalodon::Engine engine(argv[1]);
  const std::uint64_t count = std::stoull(argv[2]);
  std::vector<megalodon::Session> sessions;
  std::vector<megalodon::Session*> batch;
  std::vector<std::int64_t> tokens;
  for (int i = 3; i < argc; ++i) {
    megalodon::Session& session = sessions.emplace_back(engine);
    tokens.push_back(megalodon::sample(session.prefill(engine.encode(argv[i])), MEGALODON_GREEDY, 0));
  }
  for (megalodon::Session& session : sessions) batch.push_back(&session);
  const std::vector<megalodon_sampling> greedy(batch.size(), MEGALODON_GREEDY);
  for (std::uint64_t index = 1; index <= count; ++index) {
    for (const std::int64_t token : tokens) std::cout << token << ' ';
    std::cout << '\n';
    if (index == count) break;
    tokens = megalodon::step_batch(batch, tokens, greedy, std::vector<std::uint64_t>(batch.size(), index));
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
