// Reading and writing files, and safetensors: damaged ones are refused.
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "bundle/file.hpp"
#include "bundle/safetensors.hpp"
#include "error.hpp"

namespace megalodon::impl {
namespace {

std::vector<std::byte> file_of(const std::string& header, std::size_t data, std::uint64_t length) {
  std::vector<std::byte> bytes(8 + header.size() + data);
  std::memcpy(bytes.data(), &length, sizeof length);
  std::memcpy(bytes.data() + 8, header.data(), header.size());
  return bytes;
}

std::vector<std::byte> file_of(const std::string& header, std::size_t data = 8) {
  return file_of(header, data, header.size());
}

TEST(Safetensors, WholeFileIsRead) {
  auto bytes = file_of(R"({"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}} )");
  const Safetensors content = parse_safetensors(bytes, "file");
  EXPECT_EQ(content.metadata.at("a"), "b");
  EXPECT_EQ(content.tensors.at("x").shape, (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(content.tensors.at("x").data.data(), bytes.data() + bytes.size() - 8);
}

TEST(Safetensors, ScalarsAndEmptyTensors) {
  auto bytes = file_of(R"({"e":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]},)"
                       R"("x":{"dtype":"I64","shape":[],"data_offsets":[0,8]}})");
  EXPECT_EQ(parse_safetensors(bytes, "file").tensors.size(), 2U);
}

class Damaged : public testing::TestWithParam<const char*> {};

TEST_P(Damaged, IsRefused) {
  auto bytes = file_of(GetParam());
  EXPECT_THROW(parse_safetensors(bytes, "file"), Error);
}

INSTANTIATE_TEST_SUITE_P(
    Headers, Damaged,
    testing::Values("", "[]", "{", "{\"x\":1}", "\xff", R"({"x":{"dtype":"F32","shape":[2]}})",
                    R"({"x":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}})",
                    R"({"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})",
                    R"({"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})",
                    R"({"x":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})",
                    R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
                    R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})",
                    R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",  // a hole at the end
                    R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",  // a hole at the beginning
                    R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
                        "y":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",  // shared bytes
                    R"({"x":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}})",
                    R"({"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})",  // 2**64 bytes
                    R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}})",
                    R"({"__metadata__":{"a":1},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})"));

TEST(Safetensors, HeadersThatDoNotFit) {
  const std::string header = R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  for (const std::uint64_t length : {std::uint64_t{0}, header.size() + 9, UINT64_MAX, std::uint64_t{1} << 63}) {
    auto bytes = file_of(header, 8, length);
    EXPECT_THROW(parse_safetensors(bytes, "file"), Error) << length;
  }
  auto bytes = file_of(header);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_THROW(parse_safetensors(std::span(bytes).first(size), "file"), Error) << size;
  }
}

TEST(Safetensors, DepthIsBounded) {
  const std::string header(200'000, '[');
  auto bytes = file_of(header + std::string(200'000, ']'));
  EXPECT_THROW(parse_safetensors(bytes, "file"), Error);
}

TEST(Safetensors, WrittenFilesAreReadAndAligned) {
  std::vector<std::byte> a(3), b(16), c(6);
  Safetensors content;
  content.tensors["a"] = {dtype_by_name("uint8"), {3}, a};
  content.tensors["b"] = {dtype_by_name("float64"), {2, 1}, b};
  content.tensors["c"] = {dtype_by_name("bfloat16"), {3}, c};
  b[3] = std::byte{7};
  auto bytes = write_safetensors(content);
  const Safetensors found = parse_safetensors(bytes, "file");
  ASSERT_EQ(found.tensors.size(), 3U);
  for (const auto& [name, tensor] : found.tensors) {
    EXPECT_EQ((tensor.data.data() - bytes.data()) % static_cast<std::ptrdiff_t>(tensor.dtype->size), 0) << name;
  }
  EXPECT_EQ(found.tensors.at("b").data[3], std::byte{7});
}

TEST(Files, Sha256) {
  const std::string expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  EXPECT_EQ(sha256_of(std::string_view("abc")), expected);
  EXPECT_EQ(sha256_of(std::vector<std::string_view>{"a", "", "bc"}), expected);
}

TEST(Files, WritingReplacesTheWholeFileOrLeavesIt) {
  const auto folder = std::filesystem::path(testing::TempDir()) / "megalodon-files";
  std::filesystem::create_directories(folder);
  const std::string text = "abc";
  const auto bytes = std::as_bytes(std::span(text));
  write_file(folder / "file", bytes);
  write_file(folder / "file", bytes.first(2));
  EXPECT_EQ(read_file(folder / "file"), "ab");
  EXPECT_THROW(write_file(folder / "absent" / "file", bytes), Error);
  std::filesystem::create_directories(folder / "folder" / "full");
  EXPECT_THROW(write_file(folder / "folder", bytes), Error);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder), {}), 2);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace megalodon::impl
