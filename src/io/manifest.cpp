#include "io/manifest.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <span>

#include "lrnn/core/error.hpp"
#include "lrnn/io/file.hpp"

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

// Names must stay inside the directory.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
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

Manifest manifest_from_json(const std::filesystem::path& path, const std::string& text) {
  try {
    const json whole = json::parse(text);
    const json& body = whole.at("checkpoint");
    LRNN_CHECK(whole.at("crc32").get<std::uint32_t>() == crc_of(body.dump()), IoError,
               path.string(), ": damaged: the checksum does not match");
    LRNN_CHECK(body.at("format") == kFormat && body.at("version") == kVersion, IoError,
               path.string(), ": expected ", kFormat, " version ", kVersion, ", got ",
               body.at("format"), ' ', body.at("version"));
    Manifest manifest;
    manifest.step = body.at("step").get<std::int64_t>();
    manifest.settings = body.at("settings").get<std::map<std::string, std::string>>();
    for (const json& f : body.at("files")) {
      manifest.files.push_back({f.at("name").get<std::string>(), f.at("bytes").get<std::uint64_t>(),
                                f.at("crc32").get<std::uint32_t>()});
      LRNN_CHECK(is_plain_name(manifest.files.back().name), IoError, path.string(),
                 ": a file name that is not plain");
    }
    return manifest;
  } catch (const json::exception& e) {
    throw IoError(concat(path.string(), ": damaged: ", e.what()));
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
