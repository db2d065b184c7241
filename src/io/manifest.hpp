/// The list of files of a checkpoint, with which a directory is checked before it is used.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace lrnn::detail {

struct ManifestFile {
  std::string name;
  std::uint64_t bytes = 0;
  std::uint32_t crc32 = 0;
};

struct Manifest {
  std::int64_t step = 0;
  std::map<std::string, std::string> settings;
  std::vector<ManifestFile> files;
};

/// JSON that carries a checksum of itself.
[[nodiscard]] std::string manifest_to_json(const Manifest& manifest);
/// @throws IoError naming `path` and what is wrong with the text
[[nodiscard]] Manifest manifest_from_json(const std::filesystem::path& path,
                                          std::string_view text);

/// Size and checksum (CRC-32 of IEEE 802.3) of directory / name. @throws IoError
[[nodiscard]] ManifestFile describe_file(const std::filesystem::path& directory,
                                         const std::string& name);

}  // namespace lrnn::detail
