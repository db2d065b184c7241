#include "lrnn/io/file.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "lrnn/core/error.hpp"

namespace lrnn {
namespace {

// One read or write moves at most this much: the system limit is just below 2 GiB.
constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;

[[noreturn]] void fail(const std::filesystem::path& path, const char* what) {
  throw IoError(detail::concat(path.string(), ": ", what, ": ", std::strerror(errno)));
}

}  // namespace

InputFile::InputFile(std::filesystem::path path) : path_(std::move(path)) {
  // Without O_NONBLOCK, opening a named pipe would wait for a writer.
  fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) fail(path_, "cannot open");
  struct stat info = {};
  if (::fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(std::exchange(fd_, -1));
    throw IoError(path_.string() + ": not a regular file");
  }
  size_ = static_cast<std::uint64_t>(info.st_size);
}

InputFile::InputFile(std::filesystem::path name, std::vector<std::byte> bytes)
    : path_(std::move(name)), bytes_(std::move(bytes)), size_(bytes_.size()) {}

InputFile::InputFile(InputFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      bytes_(std::move(other.bytes_)),
      size_(std::exchange(other.size_, 0)) {}

InputFile& InputFile::operator=(InputFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(bytes_, other.bytes_);
  std::swap(size_, other.size_);
  return *this;
}

InputFile::~InputFile() {
  if (fd_ >= 0) ::close(fd_);
}

void InputFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  if (fd_ < 0) {
    LRNN_CHECK(offset <= size_ && out.size() <= size_ - offset, IoError, path_.string(),
               ": ends at byte ", size_, ", expected ", out.size(), " at ", offset);
    std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(offset), out.size(), out.begin());
    return;
  }
  while (!out.empty()) {
    const ssize_t n =
        ::pread(fd_, out.data(), std::min(out.size(), kMaxTransfer), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path_, "cannot read");
    LRNN_CHECK(n > 0, IoError, path_.string(), ": ends at byte ", offset, ", expected ", out.size(),
               " more");
    out = out.subspan(static_cast<std::size_t>(n));
    offset += static_cast<std::uint64_t>(n);
  }
}

AtomicFile::AtomicFile(std::filesystem::path path)
    : path_(std::move(path)), temporary_(path_.string() + ".tmp-" + std::to_string(::getpid())) {
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail(temporary_, "cannot create");
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), std::min(bytes.size(), kMaxTransfer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(temporary_, "cannot write");
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) fail(temporary_, "cannot synchronise");
  // The file stays ours to remove until it has its final name.
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(path_, "cannot rename to");
  const int closed = ::close(std::exchange(fd_, -1));
  if (closed != 0) fail(path_, "cannot close");
  sync_directory(path_.parent_path());
}

std::string read_text_file(const std::filesystem::path& path, std::uint64_t max_bytes) {
  const InputFile file(path);
  LRNN_CHECK(file.size() <= max_bytes, IoError, path.string(), ": ", file.size(),
             " bytes, expected at most ", max_bytes);
  std::string text(static_cast<std::size_t>(file.size()), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

void write_text_file(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void sync_directory(const std::filesystem::path& directory) {
  const std::filesystem::path& path = directory.empty() ? std::filesystem::path(".") : directory;
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) fail(path, "cannot open");
  const int synced = ::fsync(fd);
  ::close(fd);
  // Some network file systems cannot synchronise a folder.
  if (synced != 0 && errno != EINVAL) fail(path, "cannot synchronise");
}

}  // namespace lrnn
