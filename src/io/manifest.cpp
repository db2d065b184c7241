#include "io/manifest.hpp"

#include <algorithm>
#include <array>
#include <set>
#include <span>

#include "lrnn/io/file.hpp"

#include "io/json.hpp"
#include "io/names.hpp"

namespace lrnn::detail {
namespace {

using nlohmann::json;

constexpr const char* kFormat = "lrnn-training-checkpoint";
constexpr int kVersion = 1;
constexpr std::size_t kSlices = 8;
constexpr std::size_t kReadBytes = std::size_t{1} << 22;

using CrcTables = std::array<std::array<std::uint32_t, 256>, kSlices>;

// Table k gives the effect of a byte that is followed by k zero bytes.
constexpr CrcTables make_crc_tables() {
  CrcTables tables{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c & 1U) != 0 ? (c >> 1) ^ 0xEDB88320U : c >> 1;
    tables[0][i] = c;
  }
  for (std::size_t k = 1; k < kSlices; ++k)
    for (std::size_t i = 0; i < 256; ++i) {
      const std::uint32_t c = tables[k - 1][i];
      tables[k][i] = (c >> 8) ^ tables[0][c & 0xFFU];
    }
  return tables;
}

// Continues a CRC-32 over more bytes, eight at a time.
std::uint32_t update_crc(std::uint32_t crc, std::span<const std::byte> bytes) {
  static constexpr CrcTables kTables = make_crc_tables();
  crc = ~crc;
  while (bytes.size() >= kSlices) {
    std::uint32_t next = 0;
    for (std::size_t i = 0; i < kSlices; ++i) {
      const std::uint32_t mixed = i < 4 ? (crc >> (8 * i)) & 0xFFU : 0U;
      next ^= kTables[kSlices - 1 - i][std::to_integer<std::uint32_t>(bytes[i]) ^ mixed];
    }
    crc = next;
    bytes = bytes.subspan(kSlices);
  }
  for (const std::byte b : bytes)
    crc = (crc >> 8) ^ kTables[0][(crc ^ std::to_integer<std::uint32_t>(b)) & 0xFFU];
  return ~crc;
}

std::uint32_t crc_of(const std::string& text) {
  return update_crc(0, std::as_bytes(std::span(text)));
}

std::vector<ManifestFile> files_of(const std::string& where, const json& list) {
  LRNN_CHECK(list.is_array(), IoError, where, ": files: expected a list, got ", shown(list));
  std::vector<ManifestFile> files;
  std::set<std::string> names;
  for (const json& f : list) {
    files.push_back({f.at("name").get<std::string>(),
                     integer_of<IoError, std::uint64_t>(where + ": bytes", f.at("bytes")),
                     integer_of<IoError, std::uint32_t>(where + ": crc32", f.at("crc32"))});
    const std::string& name = files.back().name;
    LRNN_CHECK(is_plain_name(name), IoError, where,
               ": name: expected that of a file in this folder, got ", shown(json(name)));
    // Every file is read: a long list of one large file would keep a reader busy for days.
    LRNN_CHECK(names.insert(name).second, IoError, where, ": '", name, "' occurs twice");
  }
  return files;
}

}  // namespace

std::string manifest_to_json(const Manifest& manifest) {
  json files = json::array();
  for (const ManifestFile& f : manifest.files)
    files.push_back({{"name", f.name}, {"bytes", f.bytes}, {"crc32", f.crc32}});
  const json body = {{"format", kFormat},
                     {"version", kVersion},
                     {"step", manifest.step},
                     {"settings", manifest.settings},
                     {"files", files}};
  const json whole = {{"checkpoint", body}, {"crc32", crc_of(body.dump())}};
  return whole.dump(1) + "\n";
}

Manifest manifest_from_json(const std::filesystem::path& path, std::string_view text) {
  const std::string where = path.string();
  const json whole = parse_json<IoError>(where + ": damaged", text);
  try {
    const json& body = whole.at("checkpoint");
    LRNN_CHECK(whole.at("crc32") == crc_of(body.dump()), IoError, where,
               ": damaged: the checksum does not match");
    LRNN_CHECK(body.at("format") == kFormat && body.at("version") == kVersion, IoError, where,
               ": expected ", kFormat, " version ", kVersion, ", got ", shown(body.at("format")),
               ' ', shown(body.at("version")));
    return {integer_of<IoError, std::int64_t>(where + ": step", body.at("step")),
            body.at("settings").get<std::map<std::string, std::string>>(),
            files_of(where, body.at("files"))};
  } catch (const json::exception& e) {
    throw IoError(concat(where, ": damaged: ", e.what()));
  }
}

ManifestFile describe_file(const std::filesystem::path& directory, const std::string& name) {
  const InputFile file(directory / name);
  ManifestFile out{name, file.size(), 0};
  std::vector<std::byte> buffer(
      static_cast<std::size_t>(std::min<std::uint64_t>(file.size(), kReadBytes)));
  for (std::uint64_t at = 0; at < file.size(); at += buffer.size()) {
    const auto part = std::span(buffer).first(
        static_cast<std::size_t>(std::min<std::uint64_t>(buffer.size(), file.size() - at)));
    file.read(at, part);
    out.crc32 = update_crc(out.crc32, part);
  }
  return out;
}

}  // namespace lrnn::detail
