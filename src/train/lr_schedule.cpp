#include "lrnn/train/lr_schedule.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "lrnn/core/error.hpp"

namespace lrnn {

void LrSchedule::validate() const {
  LRNN_CHECK(std::isfinite(lr) && lr >= 0.0, ConfigError, "LrSchedule.lr: expected >= 0, got ", lr);
  LRNN_CHECK(warmup_steps >= 0, ConfigError, "LrSchedule.warmup_steps: expected >= 0, got ",
             warmup_steps);
  LRNN_CHECK(final_fraction >= 0.0 && final_fraction <= 1.0, ConfigError,
             "LrSchedule.final_fraction: expected [0, 1], got ", final_fraction);
  if (kind == LrScheduleKind::Constant) return;
  LRNN_CHECK(total_steps > warmup_steps, ConfigError, "LrSchedule.total_steps: expected more than ",
             warmup_steps, " warm-up steps, got ", total_steps);
  LRNN_CHECK(decay_steps >= 0 && decay_steps <= total_steps - warmup_steps, ConfigError,
             "LrSchedule.decay_steps: expected at most ", total_steps - warmup_steps, ", got ",
             decay_steps);
}

double LrSchedule::at(std::int64_t step) const {
  if (step < warmup_steps)
    return lr * static_cast<double>(step + 1) / static_cast<double>(warmup_steps + 1);
  if (kind == LrScheduleKind::Constant) return lr;
  if (step >= total_steps) return lr * final_fraction;
  const std::int64_t first = kind == LrScheduleKind::Wsd ? total_steps - decay_steps : warmup_steps;
  if (step < first) return lr;
  const double p = static_cast<double>(step - first) / static_cast<double>(total_steps - first);
  const double fall =
      kind == LrScheduleKind::Cosine ? 0.5 * (1.0 - std::cos(std::numbers::pi * p)) : p;
  return lr * (1.0 - (1.0 - final_fraction) * fall);
}

const char* name_of(LrScheduleKind kind) {
  switch (kind) {
    case LrScheduleKind::Constant:
      return "constant";
    case LrScheduleKind::Linear:
      return "linear";
    case LrScheduleKind::Cosine:
      return "cosine";
    case LrScheduleKind::Wsd:
      return "wsd";
  }
  throw InternalError("name_of: unknown schedule");
}

LrScheduleKind lr_schedule_kind(std::string_view name) {
  for (const auto kind : {LrScheduleKind::Constant, LrScheduleKind::Linear, LrScheduleKind::Cosine,
                          LrScheduleKind::Wsd})
    if (name == name_of(kind)) return kind;
  throw ConfigError(
      detail::concat("schedule: expected constant, linear, cosine or wsd, got '", name, "'"));
}

}  // namespace lrnn
