#include "lrnn/io/safetensors.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>

#include "io/json.hpp"

namespace lrnn {
namespace {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr std::size_t kMaxTensors = 65'536;

struct DTypeRow {
  FileDType dtype;
  const char* name;
  std::size_t size;
};
constexpr DTypeRow kDTypes[] = {
    {FileDType::F64, "F64", 8},   {FileDType::F32, "F32", 4}, {FileDType::F16, "F16", 2},
    {FileDType::BF16, "BF16", 2}, {FileDType::I64, "I64", 8}, {FileDType::I32, "I32", 4},
};

const DTypeRow& row_of(FileDType dtype) {
  for (const DTypeRow& row : kDTypes)
    if (row.dtype == dtype) return row;
  throw InternalError("unknown FileDType");
}

// Receives the header token by token and accepts exactly the structure of the format, so that a
// hostile header can neither nest deeply nor make a large document.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(const std::filesystem::path& path) : path_(path.string()) {}

  bool start_object(std::size_t) override {
    switch (state_) {
      case State::Document:
        state_ = State::Names;
        return true;
      case State::MetadataValue:
        state_ = State::MetadataKeys;
        return true;
      case State::TensorValue:
        state_ = State::TensorKeys;
        return true;
      default:
        unexpected("an object");
    }
  }
  bool key(std::string& key) override {
    check(detail::is_printable_name(key), "expected printable names of at most 1024 bytes");
    if (state_ == State::Names) {
      name_ = key;
      if (key == "__metadata__") {
        check(!has_metadata_, "duplicate key");
        has_metadata_ = true;
        state_ = State::MetadataValue;
        return true;
      }
      check(entries.size() < kMaxTensors, "more than 65,536 tensors");
      check(entries.find(key) == entries.end(), "duplicate key");
      entry_ = {.name = key, .dtype = {}, .shape = {}, .offset = 0, .nbytes = 0};
      fields_.clear();
      state_ = State::TensorValue;
    } else if (state_ == State::MetadataKeys) {
      check(!metadata.contains(key), "duplicate key '" + key + "'");
      field_ = key;
      state_ = State::MetadataString;
    } else {  // TensorKeys
      check(fields_.insert(key).second, "duplicate key '" + key + "'");
      check(key == "dtype" || key == "shape" || key == "data_offsets",
            "unknown key '" + key + "', expected dtype, shape and data_offsets");
      field_ = key;
      state_ = State::TensorField;
    }
    return true;
  }
  bool end_object() override {
    if (state_ == State::TensorKeys) {
      check(fields_.size() == 3, "expected dtype, shape and data_offsets");
      finish_tensor();
      state_ = State::Names;
    } else if (state_ == State::MetadataKeys) {
      state_ = State::Names;
    } else {
      state_ = State::End;
    }
    return true;
  }
  bool start_array(std::size_t) override {
    if (state_ != State::TensorField || field_ == "dtype") unexpected("an array");
    numbers_.clear();
    state_ = State::Numbers;
    return true;
  }
  bool end_array() override {
    if (field_ == "shape") {
      dims_ = numbers_;
    } else {
      check(numbers_.size() == 2, "data_offsets: expected [begin, end]");
      begin_ = numbers_[0];
      end_ = numbers_[1];
    }
    state_ = State::TensorKeys;
    return true;
  }
  bool number_unsigned(std::uint64_t value) override {
    if (state_ != State::Numbers) unexpected("a number");
    check(numbers_.size() < static_cast<std::size_t>(Shape::kMaxRank),
          field_ + ": more than " + std::to_string(Shape::kMaxRank) + " entries");
    numbers_.push_back(value);
    return true;
  }
  bool string(std::string& value) override {
    if (state_ == State::MetadataString) {
      metadata.emplace(field_, value);
      state_ = State::MetadataKeys;
      return true;
    }
    if (state_ != State::TensorField || field_ != "dtype") unexpected("a string");
    const auto* const row = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                         [&](const DTypeRow& r) { return value == r.name; });
    check(row != std::end(kDTypes), "unsupported dtype " + detail::shown(nlohmann::json(value)) +
                                        ", expected F64, F32, F16, BF16, I64 or I32");
    entry_.dtype = row->dtype;
    state_ = State::TensorKeys;
    return true;
  }
  bool null() override { unexpected("null"); }
  bool boolean(bool) override { unexpected("a boolean"); }
  bool number_integer(std::int64_t) override { unexpected("a negative number"); }
  bool number_float(double, const std::string&) override { unexpected("not an integer"); }
  bool binary(nlohmann::json::binary_t&) override { unexpected("binary data"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    throw IoError(detail::concat(path_, ": header: malformed JSON at byte ", position, ": ",
                                 detail::shortened(error.what(), 200)));
  }

  std::map<std::string, SafetensorsEntry, std::less<>> entries;
  std::map<std::string, std::string> metadata;

 private:
  enum class State {
    Document,
    Names,
    MetadataValue,
    MetadataKeys,
    MetadataString,
    TensorValue,
    TensorKeys,
    TensorField,
    Numbers,
    End
  };

  void check(bool ok, const std::string& reason) const {
    if (ok) return;
    const std::string where = name_.empty() ? "header" : detail::concat('\'', name_, '\'');
    throw IoError(path_ + ": " + where + ": " + reason);
  }
  [[noreturn]] void unexpected(const std::string& what) const {
    check(false, "unexpected value in the header: " + what);
    throw InternalError("unreachable");
  }
  void finish_tensor() {
    std::uint64_t bytes = row_of(entry_.dtype).size;
    entry_.shape = Shape();
    for (std::size_t i = 0; i < dims_.size(); ++i) {
      check(dims_[i] <= INT64_MAX && !__builtin_mul_overflow(bytes, dims_[i], &bytes) &&
                bytes <= INT64_MAX,
            "shape: the size overflows");
      entry_.shape.set(static_cast<int>(i), static_cast<std::int64_t>(dims_[i]));
    }
    check(begin_ <= end_, "data_offsets: begin after end");
    check(end_ - begin_ == bytes,
          detail::concat("data_offsets: ", end_ - begin_, " bytes, expected ", bytes,
                         " from dtype and shape"));
    entry_.offset = begin_;
    entry_.nbytes = bytes;
    entries.emplace(entry_.name, entry_);
  }

  std::string path_;
  State state_ = State::Document;
  bool has_metadata_ = false;
  std::string name_;
  std::string field_;
  std::set<std::string> fields_;
  SafetensorsEntry entry_;
  std::vector<std::uint64_t> numbers_;
  std::vector<std::uint64_t> dims_;
  std::uint64_t begin_ = 0;
  std::uint64_t end_ = 0;
};

// Byte ranges must tile the data section: then no two tensors share bytes and none are hidden.
void check_ranges(const std::filesystem::path& path,
                  const std::map<std::string, SafetensorsEntry, std::less<>>& entries,
                  std::uint64_t data_size) {
  std::vector<const SafetensorsEntry*> order;
  for (const auto& [name, entry] : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->offset, a->nbytes) < std::pair(b->offset, b->nbytes);
  });
  std::uint64_t end = 0;
  for (const SafetensorsEntry* entry : order) {
    LRNN_CHECK(entry->offset == end, IoError, path.string(), ": '", entry->name,
               "': data_offsets: begins at ", entry->offset, ", expected ", end,
               entry->offset < end ? " (overlap)" : " (gap)");
    end += entry->nbytes;
    LRNN_CHECK(end <= data_size, IoError, path.string(), ": '", entry->name,
               "': data_offsets: ends at ", end, ", but the file holds ", data_size,
               " bytes of data");
  }
  LRNN_CHECK(end == data_size, IoError, path.string(), ": ", data_size - end,
             " bytes after the last tensor");
}

template <class T, class Out>
void convert(const std::vector<std::byte>& bytes, std::vector<Out>& out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    T v;
    std::memcpy(&v, bytes.data() + i * sizeof(T), sizeof(T));
    if constexpr (std::is_same_v<T, bfloat16>)
      out[i] = static_cast<Out>(to_float(v));
    else
      out[i] = static_cast<Out>(v);
  }
}

template <class F>
void with_element_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f.template operator()<float>();
    case DType::float64:
      return f.template operator()<double>();
    case DType::bfloat16:
      return f.template operator()<bfloat16>();
    case DType::int32:
      return f.template operator()<std::int32_t>();
    case DType::int64:
      return f.template operator()<std::int64_t>();
  }
}

std::vector<std::byte> host_bytes(Context& ctx, TensorView tensor) {
  std::vector<std::byte> bytes(tensor.nbytes());
  with_element_type(tensor.dtype(), [&]<class T>() {
    const auto values = ctx.to_host<T>(tensor);
    std::memcpy(bytes.data(), values.data(), bytes.size());
  });
  return bytes;
}

std::string header_of(const std::vector<SafetensorsItem>& items,
                      const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  for (const SafetensorsItem& item : items) {
    std::vector<std::int64_t> dims;
    for (int i = 0; i < item.shape.rank(); ++i) dims.push_back(item.shape[i]);
    const std::uint64_t end =
        offset + static_cast<std::uint64_t>(item.shape.numel()) * size_of(item.dtype);
    header[item.name] = {
        {"dtype", name_of(item.dtype)}, {"shape", dims}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

}  // namespace

std::size_t size_of(FileDType dtype) {
  return row_of(dtype).size;
}
const char* name_of(FileDType dtype) {
  return row_of(dtype).name;
}
std::ostream& operator<<(std::ostream& os, FileDType dtype) {
  return os << name_of(dtype);
}
FileDType file_dtype(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return FileDType::F32;
    case DType::float64:
      return FileDType::F64;
    case DType::bfloat16:
      return FileDType::BF16;
    case DType::int32:
      return FileDType::I32;
    case DType::int64:
      return FileDType::I64;
  }
  throw InternalError("unknown DType");
}

float float16_to_float(std::uint16_t bits) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1FU;
  const std::uint32_t mantissa = bits & 0x3FFU;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000U | (mantissa << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
  return sign != 0 ? -magnitude : magnitude;
}

SafetensorsFile::SafetensorsFile(InputFile file) : file_(std::move(file)) {
  const std::filesystem::path& path = file_.path();
  const std::uint64_t size = file_.size();
  LRNN_CHECK(size >= 8, IoError, path.string(), ": ", size,
             " bytes, expected at least 8 for the header length");
  std::uint64_t length = 0;
  file_.read(0, std::as_writable_bytes(std::span(&length, 1)));
  LRNN_CHECK(length <= kMaxHeaderBytes, IoError, path.string(), ": header of ", length,
             " bytes, expected at most ", kMaxHeaderBytes);
  LRNN_CHECK(length <= size - 8, IoError, path.string(), ": header of ", length,
             " bytes in a file of ", size);
  std::string text(static_cast<std::size_t>(length), '\0');
  file_.read(8, std::as_writable_bytes(std::span(text)));
  LRNN_CHECK(!text.empty() && text.front() == '{', IoError, path.string(),
             ": header: expected a JSON object");
  HeaderReader reader(path);
  nlohmann::json::sax_parse(text, &reader);
  check_ranges(path, reader.entries, size - 8 - length);
  entries_ = std::move(reader.entries);
  metadata_ = std::move(reader.metadata);
  for (auto& [name, entry] : entries_) entry.offset += 8 + length;
}

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  return SafetensorsFile(InputFile(path));
}
SafetensorsFile SafetensorsFile::parse(std::filesystem::path name, std::vector<std::byte> bytes) {
  return SafetensorsFile(InputFile(std::move(name), std::move(bytes)));
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  names.reserve(entries_.size());
  for (const auto& [name, entry] : entries_) names.push_back(name);
  return names;
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto it = entries_.find(name);
  return it == entries_.end() ? nullptr : &it->second;
}

const SafetensorsEntry& SafetensorsFile::at(std::string_view name) const {
  const SafetensorsEntry* const entry = find(name);
  LRNN_CHECK(entry != nullptr, IoError, path().string(), ": there is no tensor '", name, "'");
  return *entry;
}

std::vector<std::byte> SafetensorsFile::read_bytes(const SafetensorsEntry& entry) const {
  std::vector<std::byte> bytes(static_cast<std::size_t>(entry.nbytes));
  file_.read(entry.offset, bytes);
  return bytes;
}

std::vector<double> SafetensorsFile::read_doubles(const SafetensorsEntry& entry) const {
  const auto bytes = read_bytes(entry);
  std::vector<double> out(static_cast<std::size_t>(entry.shape.numel()));
  switch (entry.dtype) {
    case FileDType::F64:
      convert<double>(bytes, out);
      break;
    case FileDType::F32:
      convert<float>(bytes, out);
      break;
    case FileDType::BF16:
      convert<bfloat16>(bytes, out);
      break;
    case FileDType::I64:
      convert<std::int64_t>(bytes, out);
      break;
    case FileDType::I32:
      convert<std::int32_t>(bytes, out);
      break;
    case FileDType::F16:
      for (std::size_t i = 0; i < out.size(); ++i) {
        std::uint16_t bits = 0;
        std::memcpy(&bits, bytes.data() + 2 * i, 2);
        out[i] = static_cast<double>(float16_to_float(bits));
      }
      break;
  }
  return out;
}

std::vector<std::int64_t> SafetensorsFile::read_integers(const SafetensorsEntry& entry) const {
  LRNN_CHECK(entry.dtype == FileDType::I32 || entry.dtype == FileDType::I64, IoError,
             path().string(), ": '", entry.name, "': expected I32 or I64, got ", entry.dtype);
  const auto bytes = read_bytes(entry);
  std::vector<std::int64_t> out(static_cast<std::size_t>(entry.shape.numel()));
  if (entry.dtype == FileDType::I32)
    convert<std::int32_t>(bytes, out);
  else
    convert<std::int64_t>(bytes, out);
  return out;
}

SafetensorsItem safetensors_item(Context& ctx, std::string name, TensorView tensor) {
  return {std::move(name), file_dtype(tensor.dtype()), tensor.shape(),
          [&ctx, tensor] { return host_bytes(ctx, tensor); }};
}

void read_tensor(Context& ctx, const SafetensorsFile& file, const SafetensorsEntry& entry,
                 MutableTensorView dst) {
  LRNN_CHECK(entry.shape.numel() == dst.numel(), IoError, file.path().string(), ": '", entry.name,
             "': expected ", dst.shape(), ", got ", entry.shape);
  if (entry.nbytes == 0) return;
  if (entry.dtype != file_dtype(dst.dtype()))
    return ctx.write_from_host(dst, file.read_doubles(entry));
  const auto bytes = file.read_bytes(entry);
  with_element_type(dst.dtype(), [&]<class T>() {
    std::vector<T> values(static_cast<std::size_t>(dst.numel()));
    std::memcpy(values.data(), bytes.data(), bytes.size());
    ctx.copy(dst, ctx.from_host<T>(dst.shape(), values));
  });
}

void write_safetensors(const std::filesystem::path& path, std::vector<SafetensorsItem> items,
                       const std::map<std::string, std::string>& metadata) {
  std::sort(items.begin(), items.end(), [](const SafetensorsItem& a, const SafetensorsItem& b) {
    const std::size_t size_a = size_of(a.dtype);
    const std::size_t size_b = size_of(b.dtype);
    return size_a != size_b ? size_a > size_b : a.name < b.name;
  });
  std::set<std::string_view> names;
  for (const SafetensorsItem& item : items)
    LRNN_CHECK(item.name != "__metadata__" && names.insert(item.name).second, InvalidArgument,
               "write_safetensors: the name '", item.name, "' occurs twice or is reserved");
  const std::string header = header_of(items, metadata);
  const std::uint64_t length = header.size();
  AtomicFile file(path);
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(header);
  for (const SafetensorsItem& item : items) {
    const auto bytes = item.bytes();
    LRNN_CHECK(bytes.size() == static_cast<std::size_t>(item.shape.numel()) * size_of(item.dtype),
               InvalidArgument, "write_safetensors: '", item.name, "': ", bytes.size(),
               " bytes for ", item.dtype, ' ', item.shape);
    file.write(bytes);
  }
  file.commit();
}

}  // namespace lrnn
