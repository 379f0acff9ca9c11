#include "bundle/file.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
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

std::string sha256_of(std::string_view data) {
  Sha256 hash;
  hash.update(data.data(), data.size());
  return hash.digest();
}

void write_file(const std::filesystem::path& path, std::span<const std::byte> data) {
  // Two threads, or two containers that share a disk and both have process 1, may write the same path at once.
  std::random_device random;
  std::filesystem::path temporary = path;
  temporary.concat(".tmp-").concat(std::to_string(random())).concat("-").concat(std::to_string(random()));
  const auto fail = [&](const std::string& verb) {
    const std::string reason = std::strerror(errno);
    unlink(temporary.c_str());
    throw io_error(path.string() + " cannot be " + verb + ": " + reason);
  };
  {
    const Descriptor file(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    while (!data.empty()) {
      const ssize_t size = write(file.value, data.data(), data.size());
      if (size < 0 && errno == EINTR) continue;
      if (size < 0) fail("written");
      data = data.subspan(static_cast<std::size_t>(size));
    }
    if (fsync(file.value) != 0) fail("written");
  }
  if (rename(temporary.c_str(), path.c_str()) != 0) fail("replaced");
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
