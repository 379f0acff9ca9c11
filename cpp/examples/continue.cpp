// Continues a text three times, each time with another seed, from a snapshot of the state after the prompt.
#include <iostream>
#include <megalodon.hpp>

int main(int argc, char** argv) try {
  if (argc != 3) return 2;
  const megalodon::Engine engine(argv[1]);
  megalodon::Session session(engine);
  session.prefill(engine.encode(argv[2]));
  const megalodon::Snapshot start = session.snapshot();

  megalodon::GenerateOptions options;
  options.max_new_tokens = 64;
  options.sampling.temperature = 0.7;
  options.stop = {"\n"};
  for (options.sampling.seed = 1; options.sampling.seed <= 3; ++options.sampling.seed) {
    session.restore(start);
    session.generate(" ", options, [](std::string_view piece) { std::cout << piece << std::flush; });
    std::cout << '\n';
  }
  return 0;
} catch (const megalodon::Error& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
