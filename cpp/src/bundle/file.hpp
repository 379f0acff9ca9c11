// Reads, hashes and maps files; replaces a file as a whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace megalodon::impl {

struct FileSize {
  std::uint64_t bytes;
  std::string why_not;  // why the file cannot be read; empty if it can
};

FileSize size_of(const std::filesystem::path& path);
std::string read_file(const std::filesystem::path& path);
std::string sha256_of(const std::filesystem::path& path);  // lower-case hexadecimal digits
std::string sha256_of(std::string_view data);
std::string sha256_of(std::span<const std::string_view> pieces);  // as of all pieces in one
// The permissions are those that the umask leaves.
void write_file(const std::filesystem::path& path, std::span<const std::byte> data);

// A file mapped for reading. All processes that map it share its pages.
// The mapping is copy-on-write: a program that wrote to a weight would change its own pages, never the file.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<std::byte> bytes() const { return {data_, size_}; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace megalodon::impl
