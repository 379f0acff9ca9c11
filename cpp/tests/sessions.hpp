// Helpers that tests of sessions share. The environment variable MEGALODON_TEST_BUNDLE names the bundle.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <megalodon.hpp>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

namespace megalodon::test {

using megalodon::Engine;
using megalodon::Error;
using megalodon::GenerateOptions;
using megalodon::Session;
using Ids = std::vector<std::int64_t>;

inline const char* bundle() { return std::getenv("MEGALODON_TEST_BUNDLE"); }

inline const Engine& engine() {
  static const Engine one(bundle());
  return one;
}

inline Ids tokens(std::size_t count, std::int64_t start = 0) {
  Ids ids(count);
  std::iota(ids.begin(), ids.end(), start);
  for (std::int64_t& id : ids) id = id * 37 % 251;
  return ids;
}

inline GenerateOptions options(std::int64_t count, double temperature = 0.0, std::uint64_t seed = 0) {
  GenerateOptions result;
  result.max_new_tokens = count;
  result.sampling.temperature = temperature;
  result.sampling.seed = seed;
  result.eos_token_id = MEGALODON_NO_EOS;
  return result;
}

inline Ids generate(Session& session, const Ids& prompt, const GenerateOptions& how) {
  Ids written;
  session.generate(prompt, how, [&](std::int64_t token) { written.push_back(token); });
  return written;
}

inline megalodon_status status_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_STRNE(error.what(), "");
    return error.status;
  }
  return MEGALODON_OK;
}

inline void expect_close(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-3) << i;
}

// A copy of the bundle in which token 200 makes the logits of its stream NaN.
inline std::filesystem::path broken_bundle() {
  const auto folder = std::filesystem::path(testing::TempDir()) / "megalodon-broken-bundle";
  std::filesystem::remove_all(folder);
  std::filesystem::copy(bundle(), folder, std::filesystem::copy_options::recursive);
  std::fstream file(folder / "model.safetensors", std::ios::binary | std::ios::in | std::ios::out);
  std::uint64_t size = 0;
  file.read(reinterpret_cast<char*>(&size), sizeof size);
  std::string header(size, ' ');
  file.read(header.data(), static_cast<std::streamsize>(size));
  const nlohmann::json entry = nlohmann::json::parse(header)["model.embed.weight"];
  const std::uint64_t row = 200 * sizeof(float) * entry["shape"][1].get<std::uint64_t>();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  file.seekp(static_cast<std::streamoff>(8 + size + entry["data_offsets"][0].get<std::uint64_t>() + row));
  file.write(reinterpret_cast<const char*>(&nan), sizeof nan);
  return folder;
}

}  // namespace megalodon::test
