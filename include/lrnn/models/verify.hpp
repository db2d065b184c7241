/// Comparison with recorded numbers.
///
/// A case is a folder with config.json and io.safetensors, either
///   recorded with lrnnx   model.safetensors beside them; tests/golden/README.md describes them
///   a checkpoint          of any kind that from_pretrained reads, by any program. io.safetensors
///                         holds input_ids [B, L] and the logits [B, L, V] that the program
///                         computed; optionally integration_timesteps [B, L], and lengths [B],
///                         beyond which logits are not compared. The dtype of `logits` sets the
///                         tolerance. Loss and gradients are not compared.
#pragma once

#include <filesystem>
#include <limits>
#include <string>

#include "lrnn/core/context.hpp"

namespace lrnn {

enum class VerifyStatus {
  Ok,
  Failed,
  NotComparable,  ///< the recorded numbers describe another system; see `reason`
  Unsupported     ///< this library cannot build the case; see `reason`
};
[[nodiscard]] const char* name_of(VerifyStatus status);

struct VerifyResult {
  /// Largest relative errors max|a - b| / max|b|; NaN where nothing was compared.
  static constexpr double kNotCompared = std::numeric_limits<double>::quiet_NaN();

  std::string name;
  VerifyStatus status = VerifyStatus::Ok;
  std::string reason;
  double output_error = kNotCompared;    ///< logits, or y of a mixer
  double loss_error = kNotCompared;      ///< relative
  double gradient_error = kNotCompared;  ///< of the worst parameter, or dx
  std::string worst_gradient;
  double step_error = kNotCompared;  ///< L steps against this library's own forward
  double output_tolerance = 0;       ///< of outputs, loss and steps
  double gradient_tolerance = 0;
};

/// Computes in `dtype`. Nothing about the content of a case makes this throw except a folder that
/// cannot be read. @throws IoError
[[nodiscard]] VerifyResult verify_case(Context& ctx, DType dtype,
                                       const std::filesystem::path& directory);

}  // namespace lrnn
