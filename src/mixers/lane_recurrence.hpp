/// What the mixers on `lane_scan` share: discretize, weights, scan, and all three backward.
#pragma once

#include "lrnn/mixers/mixer.hpp"
#include "lrnn/ops/discretize.hpp"
#include "lrnn/ops/lane_scan.hpp"
#include "lrnn/ops/lane_weight.hpp"

namespace lrnn::detail {

/// Multipliers and weights of one pass.
struct LaneRecurrence {
  Tensor a;      // [2, N, M]
  Tensor a_low;  // [2, N, M]
  Tensor gamma;  // [2, N M]
  Tensor W;      // [C, 2, N, M] or [1, N, M]
};

/// The state of a mixer with N lanes of M sub-states.
struct LaneState final : MixerState {
  Tensor lrnn_state;  // [B, 2, N, M], planes
  /// What a step derives from the parameters alone, as DiagonalTables are kept.
  LaneRecurrence tables;
  Tensor B;  // [N, H] projections in the dtype of the activations, if the mixer has any
  Tensor C;  // [H, N]

  void visit(const Visitor& visitor) override { visitor("lrnn_state", lrnn_state); }

  static TensorView of(const MixerState* state) {
    return state == nullptr ? TensorView() : TensorView(state_as<LaneState>(*state).lrnn_state);
  }
  static MutableTensorView of(MixerState* state) {
    return state == nullptr ? MutableTensorView()
                            : MutableTensorView(state_as<LaneState>(*state).lrnn_state);
  }
};

/// From the parameters of a mixer. `factors` is completed with gamma.
struct LaneRecurrenceParameters {
  LaneParameters lanes;
  LaneWeightFactors factors;
};
[[nodiscard]] LaneRecurrence make_lane_recurrence(Context& ctx,
                                                  LaneRecurrenceParameters parameters);
/// The same into `r`, which is allocated if need be.
void tabulate_recurrence(Context& ctx, LaneRecurrenceParameters parameters, LaneRecurrence& r);

/// Where the gradients of the parameters go.
struct LaneRecurrenceGradients {
  MutableTensorView A_re;
  MutableTensorView A_im;
  MutableTensorView dt;
  MutableTensorView B = {};
  MutableTensorView C;
  MutableTensorView left = {};
  MutableTensorView right = {};
};
/// lane_scan_backward with everything about multipliers and weights filled in, then those of the
/// weights and of discretize. `args` has the operands and gradients of the sequence.
void lane_recurrence_backward(Context& ctx, const LaneRecurrence& recurrence,
                              LaneRecurrenceParameters parameters, LaneScanBackward args,
                              const LaneRecurrenceGradients& gradients);

}  // namespace lrnn::detail
