// Any text as the manifest of a training checkpoint, as it is and under a checksum that is right:
// refused with an IoError, or a manifest that is written and read back as itself.

#include <algorithm>
#include <nlohmann/json.hpp>

#include "fuzz/fuzz.hpp"
#include "io/manifest.hpp"

namespace lrnn::fuzz {
namespace {

// CRC-32 of IEEE 802.3, bit by bit.
std::uint32_t crc_of(std::string_view text) {
  std::uint32_t crc = ~0U;
  for (const char c : text) {
    crc ^= static_cast<std::uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xEDB88320U : 0U);
  }
  return ~crc;
}

// `text` as the part that the checksum covers; "" if it is not JSON that this file may nest.
std::string with_checksum(std::string_view text) {
  constexpr std::ptrdiff_t kMaxDepth = 16;
  if (std::count(text.begin(), text.end(), '[') + std::count(text.begin(), text.end(), '{') >
      kMaxDepth)
    return "";
  const auto body = nlohmann::json::parse(text, nullptr, false);
  if (body.is_discarded()) return "";
  const nlohmann::json whole = {{"checkpoint", body}, {"crc32", crc_of(body.dump())}};
  return whole.dump();
}

void check(std::string_view text) {
  detail::Manifest manifest;
  if (!accepts<IoError>(kName, [&] { manifest = detail::manifest_from_json(kName, text); })) return;
  const std::string written = detail::manifest_to_json(manifest);
  const detail::Manifest back = detail::manifest_from_json(kName, written);
  require(detail::manifest_to_json(back) == written, "what is written is read back");
  require(back.step == manifest.step && back.settings == manifest.settings &&
              back.files.size() == manifest.files.size(),
          "what is written is read back");
  for (const detail::ManifestFile& file : manifest.files)
    require(file.name.find('/') == std::string::npos && file.name != "..", "files stay inside");
}

}  // namespace
}  // namespace lrnn::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text = lrnn::fuzz::text_of(data, size);
  lrnn::fuzz::check(text);
  lrnn::fuzz::check(lrnn::fuzz::with_checksum(text));
  return 0;
}
