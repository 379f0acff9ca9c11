// Tokenizes for a program that compares it with Python: megalodon-tokenize TOKENIZER_JSON.
//
// Reads requests from standard input. Numbers are little-endian with 32 bits.
//
//     'e' size text      -> 0 count ids, or 1 size message
//     'd' count ids      -> the decoded text, as size and bytes
//     't' size text      -> seconds of one call, as 64-bit floating point
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

#include "error.hpp"
#include "text/tokenizer.hpp"
#include "utf8.hpp"

using namespace megalodon::impl;

namespace {

std::uint32_t read_number() {
  std::uint32_t number = 0;
  if (std::fread(&number, sizeof number, 1, stdin) != 1) std::exit(1);
  return number;
}

template <class Value>
void write(const Value& value) {
  std::fwrite(&value, sizeof value, 1, stdout);
}

void write_text(const std::string& text) {
  write(static_cast<std::uint32_t>(text.size()));
  std::fwrite(text.data(), 1, text.size(), stdout);
}

std::string read_text() {
  std::string text(read_number(), '\0');
  if (std::fread(text.data(), 1, text.size(), stdin) != text.size()) std::exit(1);
  return text;
}

void encode(const Tokenizer& tokenizer) {
  const std::string text = read_text();
  try {
    require_utf8(text, "the text");
    const auto ids = tokenizer.encode(text);
    write(std::uint32_t{0});
    write(static_cast<std::uint32_t>(ids.size()));
    for (const std::int64_t id : ids) write(static_cast<std::uint32_t>(id));
  } catch (const Error& error) {
    write(std::uint32_t{1});
    write_text(error.what());
  }
}

void decode(const Tokenizer& tokenizer) {
  Decoder::Stream stream(tokenizer.decoder());
  std::string text;
  for (std::uint32_t count = read_number(); count > 0; --count) {
    const std::string* token = tokenizer.text_of(read_number());
    if (token == nullptr) continue;
    const std::string piece = stream.push(*token);
    if (!is_utf8(piece)) std::exit(3);  // a piece that ends inside a character
    text += piece;
  }
  write_text(text + stream.flush());
}

void measure(const Tokenizer& tokenizer) {
  const std::string text = read_text();
  const auto begin = std::chrono::steady_clock::now();
  const auto ids = tokenizer.encode(text);
  write(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    std::ifstream file(argv[1], std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), {});
    const Tokenizer tokenizer(nlohmann::json::parse(text));
    for (int request = std::getchar(); request != EOF; request = std::getchar()) {
      if (request == 'e') encode(tokenizer);
      if (request == 'd') decode(tokenizer);
      if (request == 't') measure(tokenizer);
      std::fflush(stdout);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
