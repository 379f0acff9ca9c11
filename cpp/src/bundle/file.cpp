#include "bundle/file.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "error.hpp"

namespace megalodon::impl {
namespace {

class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags, mode_t mode = 0) : value(open(path.c_str(), flags, mode)) {
    if (value < 0) throw io_error(path.string() + " cannot be opened: " + std::strerror(errno));
  }
  ~Descriptor() { close(value); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  const int value;
};

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) {
      throw Error(MEGALODON_FAILED, "libcrypto has no SHA-256; install an OpenSSL that has");
    }
  }
  void update(const void* data, std::size_t size) { EVP_DigestUpdate(context_.get(), data, size); }
  std::string digest() {
    std::array<unsigned char, EVP_MAX_MD_SIZE> bytes;
    unsigned int size = 0;
    EVP_DigestFinal_ex(context_.get(), bytes.data(), &size);
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
      text += "0123456789abcdef"[bytes[i] >> 4];
      text += "0123456789abcdef"[bytes[i] & 15];
    }
    return text;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

// Whether all of the data was written; `errno` says why not.
bool write_all(int file, std::span<const std::byte> data) {
  while (!data.empty()) {
    const ssize_t size = write(file, data.data(), data.size());
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return false;
    data = data.subspan(static_cast<std::size_t>(size));
  }
  return true;
}

// Processes on other machines may write to the same folder, so a process id is not unique.
std::string random_hex() {
  std::random_device device;
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%08x%08x", device(), device());
  return text.data();
}

template <typename Use>
void read_in_blocks(const std::filesystem::path& path, Use use) {
  const Descriptor file(path, O_RDONLY | O_CLOEXEC);
  std::vector<char> buffer(std::size_t{1} << 18);
  for (;;) {
    const ssize_t size = read(file.value, buffer.data(), buffer.size());
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) throw io_error(path.string() + " cannot be read: " + std::strerror(errno));
    if (size == 0) return;
    use(buffer.data(), static_cast<std::size_t>(size));
  }
}

}  // namespace

FileSize size_of(const std::filesystem::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  const bool sized = file >= 0 && fstat(file, &status) == 0;
  const int reason = errno;
  if (file >= 0) close(file);
  if (!sized) return {0, std::strerror(reason)};
  return {static_cast<std::uint64_t>(status.st_size), ""};
}

std::string read_file(const std::filesystem::path& path) {
  std::string content;
  read_in_blocks(path, [&](const char* data, std::size_t size) { content.append(data, size); });
  return content;
}

std::string sha256_of(const std::filesystem::path& path) {
  Sha256 hash;
  read_in_blocks(path, [&](const char* data, std::size_t size) { hash.update(data, size); });
  return hash.digest();
}

std::string sha256_of(std::string_view data) { return sha256_of(std::span(&data, 1)); }

std::string sha256_of(std::span<const std::string_view> pieces) {
  Sha256 hash;
  for (const std::string_view piece : pieces) hash.update(piece.data(), piece.size());
  return hash.digest();
}

void write_file(const std::filesystem::path& path, std::span<const std::byte> data) {
  const std::filesystem::path temporary = path.string() + ".tmp-" + random_hex();
  const auto fail = [&](const std::string& reason) {
    return io_error(path.string() + " cannot be written: " + reason);
  };
  struct stat status{};
  if (stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {  // the rename would replace a device by a file
    throw fail("it is no regular file");
  }
  const int file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file < 0) throw fail(std::strerror(errno));
  bool written = write_all(file, data) && fsync(file) == 0;
  int reason = errno;
  close(file);
  if (written) {
    written = rename(temporary.c_str(), path.c_str()) == 0;
    reason = errno;
  }
  if (written) return;
  unlink(temporary.c_str());
  throw fail(std::strerror(reason));
}

MappedFile::MappedFile(const std::filesystem::path& path) {
  const Descriptor file(path, O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (fstat(file.value, &status) != 0 || !S_ISREG(status.st_mode)) {
    throw io_error(path.string() + " cannot be mapped: a regular file expected");
  }
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) return;
  void* address = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.value, 0);
  if (address == MAP_FAILED) throw io_error(path.string() + " cannot be mapped: " + std::strerror(errno));
  data_ = static_cast<std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

}  // namespace megalodon::impl
