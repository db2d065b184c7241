/// Sizes of lane_scan, derived from its operands the same way by the checks and both backends.
#pragma once

#include "lrnn/ops/lane_scan.hpp"

namespace lrnn::detail {

struct LaneScanSizes {
  std::int64_t batch;
  std::int64_t seqlen;
  std::int64_t inputs;     // I
  std::int64_t lanes;      // N
  std::int64_t groups;     // G; 1 if lanes have outputs of their own
  std::int64_t channels;   // C
  std::int64_t substates;  // M
  std::int64_t outputs;    // width of y
  std::int64_t chunks;
  bool real_weight;

  /// Of operands of the right rank.
  LaneScanSizes(const TensorView& a, const TensorView& W, const TensorView& v)
      : batch(v.dim(0)),
        seqlen(v.dim(1)),
        inputs(v.dim(2)),
        lanes(a.dim(1)),
        groups(inputs > 0 ? lanes / inputs : 0),
        channels(W.dim(0)),
        substates(a.dim(2)),
        outputs(groups == 1 ? channels * inputs : groups),
        chunks(lane_scan_chunks(seqlen)),
        real_weight(W.rank() == 3) {}

  /// Elements of one plane of a or of the state of one sequence.
  [[nodiscard]] std::int64_t plane() const { return lanes * substates; }
};

/// lane_scan_step by the ops that it stands for.
void lane_scan_step_by_parts(Context& ctx, const LaneScanStep& args);

}  // namespace lrnn::detail
