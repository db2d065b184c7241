#include "lrnn/ops/gated_activation.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {

void gated_activation_forward(Context& ctx, const GatedActivationForward& a) {
  constexpr const char* op = "gated_activation_forward";
  LRNN_CHECK(a.value && a.value.rank() >= 1, ShapeError, op, ": value is required");
  detail::check_rows(op, "value", ctx, a.value, a.value.shape(), a.value.dtype());
  detail::check_rows(op, "gate", ctx, a.gate, a.value.shape(), a.value.dtype());
  detail::check_rows(op, "y", ctx, a.y, a.value.shape(), a.value.dtype());
  if (a.value.numel() == 0) return;
  LRNN_DISPATCH(gated_activation_forward, ctx, a);
}

void gated_activation_backward(Context& ctx, const GatedActivationBackward& a) {
  constexpr const char* op = "gated_activation_backward";
  LRNN_CHECK(a.dy && a.dy.rank() >= 1, ShapeError, op, ": dy is required");
  detail::check_rows(op, "dy", ctx, a.dy, a.dy.shape(), a.dy.dtype());
  detail::check_rows(op, "value", ctx, a.value, a.dy.shape(), a.dy.dtype());
  detail::check_rows(op, "gate", ctx, a.gate, a.dy.shape(), a.dy.dtype());
  detail::check_rows(op, "dvalue", ctx, a.dvalue, a.dy.shape(), a.dy.dtype());
  detail::check_rows(op, "dgate", ctx, a.dgate, a.dy.shape(), a.dy.dtype());
  if (a.dy.numel() == 0) return;
  LRNN_DISPATCH(gated_activation_backward, ctx, a);
}

}  // namespace lrnn
