/// What the mixers on `diagonal_scan` share: discretize, then scan, and both backward.
#pragma once

#include "lrnn/mixers/mixer.hpp"
#include "lrnn/ops/diagonal_scan.hpp"
#include "lrnn/ops/discretize.hpp"

namespace lrnn::detail {

/// What a step derives from the parameters alone. Kept beside the state, because to derive it again
/// takes longer than the step: from the parameters as they were when the state was made, or at the
/// last forward pass that left its state there.
struct DiagonalTables {
  Tensor a, a_low, gamma;  // [2, N]
  Tensor B;                // [N, H] or [2, N, H], in the dtype of the activations
  Tensor C;                // [H, 2, N], the same
  Tensor D;                // [H, H], the same, if D is a matrix
};

/// The state of a mixer with N complex lanes.
struct DiagonalState final : MixerState {
  Tensor lrnn_state;  // [B, 2, N], planes
  DiagonalTables tables;

  void visit(const Visitor& visitor) override { visitor("lrnn_state", lrnn_state); }

  static TensorView of(const MixerState* state) {
    return state == nullptr ? TensorView() : TensorView(state_as<DiagonalState>(*state).lrnn_state);
  }
  static MutableTensorView of(MixerState* state) {
    return state == nullptr ? MutableTensorView()
                            : MutableTensorView(state_as<DiagonalState>(*state).lrnn_state);
  }
};

/// Multipliers and input factors of one pass. With `tau`, the event form.
struct DiagonalRecurrence {
  Tensor a;      // [2, N]; fixed form
  Tensor a_low;  // [2, N]; fixed form
  Tensor z;      // [4, N]; event form
  Tensor gamma;  // [2, N]
  TensorView tau;
  bool event_bilinear = false;

  [[nodiscard]] ScanMultiplier multiplier() const {
    return {.a = a, .a_low = a_low, .z = z, .tau = tau, .event_bilinear = event_bilinear};
  }
};
[[nodiscard]] DiagonalRecurrence make_recurrence(Context& ctx, const LaneParameters& parameters,
                                                 TensorView tau);

/// Where the gradients of the parameters of the lanes go; absent ones are not computed.
struct LaneGradients {
  MutableTensorView A_re;
  MutableTensorView A_im;
  MutableTensorView dt = {};
  MutableTensorView gamma_log = {};
};
/// diagonal_scan_backward with everything about the multiplier filled in, then
/// discretize_backward. `args` has the operands and gradients of the sequence.
void recurrence_backward(Context& ctx, const DiagonalRecurrence& recurrence,
                         const LaneParameters& parameters, DiagonalScanBackward args,
                         const LaneGradients& gradients);

/// a, a_low and gamma of `tables`, which are allocated if need be.
void tabulate_recurrence(Context& ctx, const LaneParameters& parameters, DiagonalTables& tables);
/// The step by the tables of the state.
void diagonal_step(Context& ctx, const MixerStep& args, TensorView D);

/// `t` in `dtype`: `t` itself, or a converted copy owned by `storage`.
[[nodiscard]] TensorView in_dtype(Context& ctx, TensorView t, DType dtype, Tensor& storage);
/// `x` [B, L, H] with zeros at padding: `x` itself without lengths, or a copy owned by `storage`.
/// A weight gradient multiplies padded inputs by 0, which NaN would survive.
[[nodiscard]] TensorView without_padding(Context& ctx, TensorView x, TensorView lengths,
                                         Tensor& storage);

}  // namespace lrnn::detail
