#include "lrnn/ops/activation.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {

void activation_forward(Context& ctx, const ActivationForward& a) {
  constexpr const char* op = "activation_forward";
  LRNN_CHECK(a.x && a.x.rank() >= 1, ShapeError, op, ": x is required");
  detail::check_rows(op, "x", ctx, a.x, a.x.shape(), a.x.dtype());
  detail::check_rows(op, "y", ctx, a.y, a.x.shape(), a.x.dtype());
  if (a.x.numel() == 0) return;
  LRNN_DISPATCH(activation_forward, ctx, a);
}

void activation_backward(Context& ctx, const ActivationBackward& a) {
  constexpr const char* op = "activation_backward";
  LRNN_CHECK(a.dy && a.dy.rank() >= 1, ShapeError, op, ": dy is required");
  detail::check_rows(op, "dy", ctx, a.dy, a.dy.shape(), a.dy.dtype());
  detail::check_rows(op, "x", ctx, a.x, a.dy.shape(), a.dy.dtype());
  detail::check_rows(op, "dx", ctx, a.dx, a.dy.shape(), a.dy.dtype());
  if (a.dy.numel() == 0) return;
  LRNN_DISPATCH(activation_backward, ctx, a);
}

}  // namespace lrnn
