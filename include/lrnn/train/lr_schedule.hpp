/// Learning rate as a function of the step.
///
/// With s the step (0 for the first), W warm-up steps, N total steps, p = (s - W) / (N - W) and
/// f = final_fraction, for s >= W:
///   Constant  lr
///   Linear    lr (1 - (1 - f) p)
///   Cosine    lr (f + (1 - f) (1 + cos(pi p)) / 2)
///   Wsd       lr until N - decay_steps, then linear to f lr   (warm-up, stable, decay)
/// During warm-up lr (s + 1) / (W + 1); from step N on f lr (lr for Constant).
/// Papers: arXiv:1608.03983 (cosine), arXiv:2404.06395 (wsd).
#pragma once

#include <cstdint>
#include <string_view>

namespace lrnn {

enum class LrScheduleKind { Constant, Linear, Cosine, Wsd };

struct LrSchedule {
  LrScheduleKind kind = LrScheduleKind::Constant;
  double lr = 1e-3;               ///< the greatest value
  std::int64_t warmup_steps = 0;  ///< W
  std::int64_t total_steps = 0;   ///< N; not used by Constant
  std::int64_t decay_steps = 0;   ///< Wsd: the last steps
  double final_fraction = 0.0;    ///< f

  /// @throws ConfigError naming the field
  void validate() const;
  /// Learning rate of step `step` >= 0.
  [[nodiscard]] double at(std::int64_t step) const;
};

/// "constant", "linear", "cosine", "wsd".
[[nodiscard]] const char* name_of(LrScheduleKind kind);
/// @throws ConfigError
[[nodiscard]] LrScheduleKind lr_schedule_kind(std::string_view name);

}  // namespace lrnn
