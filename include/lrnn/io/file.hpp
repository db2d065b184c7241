/// Files that are either written completely or not at all, and bounded reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lrnn {

/// A regular file opened for reading at any offset, or the bytes of one.
class InputFile {
 public:
  /// @throws IoError if `path` cannot be opened or is not a regular file
  explicit InputFile(std::filesystem::path path);
  /// `name` stands for the path in errors.
  InputFile(std::filesystem::path name, std::vector<std::byte> bytes);
  InputFile(InputFile&& other) noexcept;
  InputFile& operator=(InputFile&& other) noexcept;
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile();

  /// Fills `out` from `offset`. @throws IoError on a failed or short read
  void read(std::uint64_t offset, std::span<std::byte> out) const;
  [[nodiscard]] std::uint64_t size() const noexcept { return size_; }
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }

 private:
  std::filesystem::path path_;
  int fd_ = -1;  // of a file; -1: bytes_
  std::vector<std::byte> bytes_;
  std::uint64_t size_ = 0;
};

/// Writes to a temporary name beside `path`; commit() synchronises it with the disk and renames it.
/// Without commit() nothing is left behind and a file that was there stays as it was.
class AtomicFile {
 public:
  /// @throws IoError
  explicit AtomicFile(std::filesystem::path path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  /// @throws IoError
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }
  /// @throws IoError
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int fd_ = -1;
};

/// @throws IoError if the file is unreadable or larger than `max_bytes`
[[nodiscard]] std::string read_text_file(const std::filesystem::path& path,
                                         std::uint64_t max_bytes = std::uint64_t{16} << 20);
void write_text_file(const std::filesystem::path& path, std::string_view text);
/// Makes renames inside `directory` durable. @throws IoError
void sync_directory(const std::filesystem::path& directory);

}  // namespace lrnn
