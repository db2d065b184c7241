#include "mixers/lane_recurrence.hpp"

namespace lrnn::detail {
namespace {

// Lanes and sub-states of the read-out parameter: [C, N, M, 2] or [N, M].
Shape lane_shape(const LaneWeightFactors& factors) {
  const TensorView& C = factors.C;
  const int first = C.rank() == 2 ? 0 : 1;
  return {2, C.dim(first), C.dim(first + 1)};
}
Shape weight_shape(const LaneWeightFactors& factors) {
  const TensorView& C = factors.C;
  if (C.rank() == 2) return {1, C.dim(0), C.dim(1)};
  return {C.dim(0), 2, C.dim(1), C.dim(2)};
}

}  // namespace

LaneRecurrence make_lane_recurrence(Context& ctx, LaneRecurrenceParameters parameters) {
  LaneRecurrence r;
  tabulate_recurrence(ctx, std::move(parameters), r);
  return r;
}

void tabulate_recurrence(Context& ctx, LaneRecurrenceParameters parameters, LaneRecurrence& r) {
  const DType dtype = parameters.lanes.A_re.value.dtype();
  const Shape shape = lane_shape(parameters.factors);
  const Shape flat = {2, parameters.lanes.lanes};
  if (!r.a) {
    r.a = ctx.empty(shape, dtype);
    r.a_low = ctx.empty(shape, dtype);
    r.gamma = ctx.empty(flat, dtype);
    r.W = ctx.empty(weight_shape(parameters.factors), dtype);
  }
  discretize_forward(ctx, {.parameters = parameters.lanes,
                           .a = r.a.view().reshape(flat),
                           .a_low = r.a_low.view().reshape(flat),
                           .gamma = r.gamma});
  parameters.factors.gamma = r.gamma;
  lane_weight_forward(ctx, {.factors = parameters.factors, .W = r.W});
}

void lane_recurrence_backward(Context& ctx, const LaneRecurrence& recurrence,
                              LaneRecurrenceParameters parameters, LaneScanBackward args,
                              const LaneRecurrenceGradients& gradients) {
  const DType dtype = parameters.lanes.A_re.value.dtype();
  const Shape flat = {2, parameters.lanes.lanes};
  Tensor dmultiplier = ctx.zeros(recurrence.a.shape(), dtype);
  Tensor dW = ctx.zeros(recurrence.W.shape(), dtype);
  Tensor dgamma = ctx.empty(flat, dtype);
  // Of exp(z), log a = z: no 1/a appears, and a = 0 does no harm.
  const bool exponential = parameters.lanes.method != Discretization::Bilinear &&
                           parameters.lanes.method != Discretization::None;
  args.a = recurrence.a;
  args.a_low = recurrence.a_low;
  args.W = recurrence.W;
  args.dW = dW;
  (exponential ? args.dlog_a : args.da) = dmultiplier;
  lane_scan_backward(ctx, args);
  parameters.factors.gamma = recurrence.gamma;
  lane_weight_backward(ctx, {.factors = parameters.factors,
                             .dW = dW,
                             .dgamma = dgamma,
                             .dB = gradients.B,
                             .dC = gradients.C,
                             .dleft = gradients.left,
                             .dright = gradients.right});
  DiscretizeBackward backward{.parameters = parameters.lanes,
                              .dgamma = dgamma,
                              .dA_re = gradients.A_re,
                              .dA_im = gradients.A_im,
                              .ddt = gradients.dt};
  (exponential ? backward.dz : backward.da) = dmultiplier.view().reshape(flat);
  discretize_backward(ctx, backward);
}

}  // namespace lrnn::detail
