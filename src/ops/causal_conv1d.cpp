#include "lrnn/ops/causal_conv1d.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_activation(const char* op, Activation activation) {
  LRNN_CHECK(activation == Activation::Identity || activation == Activation::Silu, InvalidArgument,
             op, ": activation: expected Identity or Silu");
}

}  // namespace

void causal_conv1d_forward(Context& ctx, const CausalConv1dForward& a) {
  constexpr const char* op = "causal_conv1d_forward";
  detail::check_rank(op, "x", a.x, 3);
  detail::check_rank(op, "weight", a.weight, 2);
  const Shape& xs = a.x.shape();
  const DType dtype = a.x.dtype();
  const Shape state = {xs[0], xs[2], a.weight.dim(1)};
  LRNN_CHECK(a.weight.dim(1) >= 1, ShapeError, op, ": weight: expected a width of at least 1");
  detail::check_rows(op, "x", ctx, a.x, xs, dtype);
  detail::check_operand(op, "weight", ctx, a.weight, {xs[2], a.weight.dim(1)}, dtype);
  detail::check_optional(op, "bias", ctx, a.bias, {xs[2]}, dtype);
  check_activation(op, a.activation);
  detail::check_lengths_operand(op, ctx, a.lengths, xs[0]);
  detail::check_optional(op, "state_in", ctx, a.state_in, state, accumulate_dtype(dtype));
  detail::check_rows(op, "y", ctx, a.y, xs, dtype);
  detail::check_optional(op, "state_out", ctx, a.state_out, state, accumulate_dtype(dtype));
  if (a.x.numel() == 0) return;
  LRNN_DISPATCH(causal_conv1d_forward, ctx, a);
}

void causal_conv1d_backward(Context& ctx, const CausalConv1dBackward& a) {
  constexpr const char* op = "causal_conv1d_backward";
  detail::check_rank(op, "x", a.x, 3);
  detail::check_rank(op, "weight", a.weight, 2);
  const Shape& xs = a.x.shape();
  const DType dtype = a.x.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  const Shape weight = {xs[2], a.weight.dim(1)};
  const Shape state = {xs[0], xs[2], a.weight.dim(1)};
  detail::check_rows(op, "dy", ctx, a.dy, xs, dtype);
  detail::check_rows(op, "x", ctx, a.x, xs, dtype);
  detail::check_operand(op, "weight", ctx, a.weight, weight, dtype);
  detail::check_optional(op, "bias", ctx, a.bias, {xs[2]}, dtype);
  check_activation(op, a.activation);
  detail::check_lengths_operand(op, ctx, a.lengths, xs[0]);
  detail::check_optional(op, "state_in", ctx, a.state_in, state, accumulate);
  detail::check_optional(op, "dstate_out", ctx, a.dstate_out, state, accumulate);
  detail::check_rows(op, "dx", ctx, a.dx, xs, dtype);
  detail::check_operand(op, "dweight", ctx, a.dweight, weight, accumulate);
  detail::check_optional(op, "dbias", ctx, a.dbias, {xs[2]}, accumulate);
  detail::check_optional(op, "dstate_in", ctx, a.dstate_in, state, accumulate);
  if (a.x.numel() == 0) return;
  LRNN_DISPATCH(causal_conv1d_backward, ctx, a);
}

void causal_conv1d_step(Context& ctx, const CausalConv1dStep& a) {
  constexpr const char* op = "causal_conv1d_step";
  detail::check_rank(op, "x", a.x, 2);
  detail::check_rank(op, "weight", a.weight, 2);
  const Shape& xs = a.x.shape();
  const DType dtype = a.x.dtype();
  detail::check_rows(op, "x", ctx, a.x, xs, dtype);
  detail::check_operand(op, "weight", ctx, a.weight, {xs[1], a.weight.dim(1)}, dtype);
  detail::check_optional(op, "bias", ctx, a.bias, {xs[1]}, dtype);
  check_activation(op, a.activation);
  detail::check_rows(op, "y", ctx, a.y, xs, dtype);
  detail::check_operand(op, "state", ctx, a.state, {xs[0], xs[1], a.weight.dim(1)},
                        accumulate_dtype(dtype));
  if (a.x.numel() == 0) return;
  LRNN_DISPATCH(causal_conv1d_step, ctx, a);
}

}  // namespace lrnn
