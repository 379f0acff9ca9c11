// What a service does: several streams, each at its own place, one decode step for all; prints the token ids of each.
#include <iostream>
#include <megalodon.hpp>

int main(int argc, char** argv) try {
  if (argc < 4) return 2;
  const megalodon::Engine engine(argv[1]);
  const int count = std::stoi(argv[2]);
  std::vector<megalodon::Session> sessions;
  std::vector<megalodon::Session*> batch;
  std::vector<std::int64_t> tokens;
  for (int i = 3; i < argc; ++i) {
    megalodon::Session& session = sessions.emplace_back(engine);
    tokens.push_back(megalodon::sample(session.prefill(engine.encode(argv[i])), MEGALODON_GREEDY, 0));
  }
  for (megalodon::Session& session : sessions) batch.push_back(&session);
  const auto width = static_cast<std::size_t>(engine.info().logits_size);
  for (int index = 1; index <= count; ++index) {
    for (const std::int64_t token : tokens) std::cout << token << ' ';
    std::cout << '\n';
    if (index == count) break;
    const auto logits = megalodon::decode_batch(batch, tokens, width);
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = megalodon::sample(logits[i], MEGALODON_GREEDY, index);
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
