/// Sizes of dplr_scan, derived from its operands the same way by the checks and both backends.
#pragma once

#include "lrnn/ops/dplr_scan.hpp"

namespace lrnn::detail {

struct DplrScanSizes {
  std::int64_t batch;
  std::int64_t seqlen;
  std::int64_t heads;
  std::int64_t states;  // N
  std::int64_t rank;
  std::int64_t channels;
  std::int64_t chunks;

  /// Of operands of the right rank.
  DplrScanSizes(const TensorView& w, const TensorView& C, const TensorView& u)
      : batch(u.dim(0)),
        seqlen(u.dim(1)),
        heads(u.dim(2)),
        states(w.dim(3)),
        rank(w.dim(0)),
        channels(C.dim(0)),
        chunks(dplr_scan_chunks(seqlen)) {}

  /// Elements of one plane of e or of the state of one sequence.
  [[nodiscard]] std::int64_t plane() const { return heads * states; }
  /// Complex numbers per state that all tokens share: e, b, w, k, C.
  [[nodiscard]] std::int64_t fields() const { return 2 + 2 * rank + channels; }
};

/// dplr_scan_step by the ops that it stands for.
void dplr_scan_step_by_parts(Context& ctx, const DplrScanStep& args);

}  // namespace lrnn::detail
