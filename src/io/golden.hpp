/// config.json of a recorded case.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace lrnn::detail {

struct GoldenCase {
  std::string name;
  std::string kind;         ///< "lm" or "mixer"
  std::string constructor;  ///< JSON: all arguments of a model, or the options of a mixer
  std::string mixer_type;   ///< of a mixer
  std::int64_t d_model = 0;
  std::string compute_dtype;
  bool event = false;
  std::vector<std::int64_t> lengths;
  std::int64_t num_last_tokens = 0;
  std::string correction;  ///< which of lrnnx's defects was repaired for the recording
};

/// @throws IoError
[[nodiscard]] GoldenCase read_golden_case(const std::filesystem::path& directory);

}  // namespace lrnn::detail
