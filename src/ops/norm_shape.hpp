/// The shape of the sums of `global_norm`, which both backends follow.
#pragma once

#include <cstdint>

namespace lrnn::detail {

/// Elements summed by one block of work, in kNormLanes interleaved sums that are folded in halves.
/// The sums of the runs are folded by the same scheme.
inline constexpr std::int64_t kNormRun = 16384;
inline constexpr int kNormLanes = 1024;

[[nodiscard]] constexpr std::int64_t norm_runs(std::int64_t numel) noexcept {
  return (numel + kNormRun - 1) / kNormRun;
}

}  // namespace lrnn::detail
