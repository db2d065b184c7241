/// The safetensors file format: an 8-byte little-endian header length, a JSON header with name,
/// dtype, shape and byte range of every tensor, and the bytes.
///
/// Nothing in a file is trusted: see SafetensorsFile::open for what is refused.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "lrnn/core/context.hpp"
#include "lrnn/io/file.hpp"

namespace lrnn {

/// Element types in files. float16 exists in files only.
enum class FileDType : std::uint8_t { F64, F32, F16, BF16, I64, I32 };

[[nodiscard]] std::size_t size_of(FileDType dtype);
[[nodiscard]] const char* name_of(FileDType dtype);
std::ostream& operator<<(std::ostream& os, FileDType dtype);
[[nodiscard]] FileDType file_dtype(DType dtype);

struct SafetensorsEntry {
  std::string name;
  FileDType dtype = FileDType::F32;
  Shape shape;
  std::uint64_t offset = 0;  ///< from the start of the file
  std::uint64_t nbytes = 0;
};

class SafetensorsFile {
 public:
  /// Reads and checks the header; tensors are read when asked for.
  /// @throws IoError naming file, tensor and reason: a header length beyond the file or 100 MB,
  /// malformed JSON, nesting deeper than the format, duplicate or unprintable names, more than
  /// 65,536 tensors, an unknown dtype, more than 6 dimensions, sizes that overflow or differ from
  /// the byte range, byte ranges that overlap or leave gaps, bytes after the last range.
  static SafetensorsFile open(const std::filesystem::path& path);
  /// The same for the bytes of a file, which errors call `name`.
  static SafetensorsFile parse(std::filesystem::path name, std::vector<std::byte> bytes);

  /// In the order of the names.
  [[nodiscard]] std::vector<std::string> names() const;
  [[nodiscard]] const std::map<std::string, SafetensorsEntry, std::less<>>& entries() const& {
    return entries_;
  }
  /// Null if there is no such tensor.
  [[nodiscard]] const SafetensorsEntry* find(std::string_view name) const;
  /// @throws IoError if there is no such tensor
  [[nodiscard]] const SafetensorsEntry& at(std::string_view name) const;

  [[nodiscard]] std::vector<std::byte> read_bytes(const SafetensorsEntry& entry) const;
  /// Any dtype.
  [[nodiscard]] std::vector<double> read_doubles(const SafetensorsEntry& entry) const;
  /// @throws IoError unless the dtype is I32 or I64
  [[nodiscard]] std::vector<std::int64_t> read_integers(const SafetensorsEntry& entry) const;

  [[nodiscard]] const std::map<std::string, std::string>& metadata() const& { return metadata_; }
  [[nodiscard]] const std::filesystem::path& path() const { return file_.path(); }

 private:
  explicit SafetensorsFile(InputFile file);

  InputFile file_;
  std::map<std::string, SafetensorsEntry, std::less<>> entries_;
  std::map<std::string, std::string> metadata_;
};

/// A tensor to be written. `bytes` is called once, when its turn comes, so that a large model is
/// never in host memory as a whole.
struct SafetensorsItem {
  std::string name;
  FileDType dtype;
  Shape shape;
  std::function<std::vector<std::byte>()> bytes;
};
/// An item from values in memory, which are copied.
template <class T>
[[nodiscard]] SafetensorsItem safetensors_item(std::string name, const Shape& shape,
                                               const std::vector<T>& values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {std::move(name), file_dtype(dtype_of<T>::value), shape,
          [copy = std::vector<std::byte>(bytes.begin(), bytes.end())] { return copy; }};
}

/// An item whose bytes are copied from a contiguous tensor of `ctx` when its turn comes.
[[nodiscard]] SafetensorsItem safetensors_item(Context& ctx, std::string name, TensorView tensor);
/// Reads a tensor into `dst`, converting between float dtypes.
/// @throws IoError if the number of elements differs
void read_tensor(Context& ctx, const SafetensorsFile& file, const SafetensorsEntry& entry,
                 MutableTensorView dst);

/// Writes the same bytes for the same content: tensors in the order of element size (largest
/// first, so that all are aligned), then name. The file appears under its name when it is complete.
/// @throws IoError; InvalidArgument on duplicate names or sizes that do not match
void write_safetensors(const std::filesystem::path& path, std::vector<SafetensorsItem> items,
                       const std::map<std::string, std::string>& metadata = {});

/// float16 to float32; exact.
[[nodiscard]] float float16_to_float(std::uint16_t bits) noexcept;

}  // namespace lrnn
