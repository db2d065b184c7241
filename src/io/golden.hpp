/// config.json of a recorded case, or of a checkpoint with recorded logits beside it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace lrnn::detail {

struct GoldenCase {
  std::string name;
  std::string kind;         ///< "lm", "mixer" or "checkpoint"
  std::string constructor;  ///< JSON: all arguments of a model, or the options of a mixer
  std::string mixer_type;   ///< of a mixer
  std::int64_t d_model = 0;
  std::string compute_dtype;
  bool event = false;
  std::vector<std::int64_t> lengths;
  std::int64_t num_last_tokens = 0;
  std::string correction;  ///< which of lrnnx's defects was repaired for the recording
  bool by_lrnnx = true;    ///< whether it was lrnnx that computed the numbers
};

/// A config.json without "case" is taken for that of a checkpoint, whose name is that of the
/// folder; `compute_dtype`, `event` and `lengths` are then told by the recording itself.
/// @throws IoError
[[nodiscard]] GoldenCase read_golden_case(const std::filesystem::path& directory);

}  // namespace lrnn::detail
