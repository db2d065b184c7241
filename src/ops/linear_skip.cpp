#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/linear.hpp"

#include "ops/dispatch.hpp"
#include "ops/linear_skip_parts.hpp"

namespace lrnn {
namespace {

Shape with_last(Shape shape, std::int64_t last) {
  shape.set(shape.rank() - 1, last);
  return shape;
}

}  // namespace

namespace detail {

void linear_skip_forward_by_parts(Context& ctx, const LinearSkipForward& a) {
  scale_columns(ctx, {.src = a.skip, .scale = a.scale, .dst = a.y});
  linear_forward(ctx, {.x = a.x, .weight = a.weight, .y = a.y, .accumulate = true});
}

void linear_skip_backward_by_parts(Context& ctx, const LinearSkipBackward& a) {
  scale_columns_backward(ctx,
                         {.dy = a.dy, .x = a.x, .scale = a.scale, .dx = a.dx, .dscale = a.dscale});
  linear_backward(ctx, {.dy = a.dv, .weight = a.weight, .dx = a.dx, .accumulate_dx = true});
}

}  // namespace detail

void linear_skip_forward(Context& ctx, const LinearSkipForward& a) {
  constexpr const char* op = "linear_skip_forward";
  LRNN_CHECK(a.x && a.x.rank() >= 1, ShapeError, op, ": x is required");
  detail::check_rank(op, "weight", a.weight, 2);
  const DType dtype = a.x.dtype();
  const std::int64_t out = a.weight.dim(0);
  const Shape rows = with_last(a.x.shape(), out);
  detail::check_rows(op, "x", ctx, a.x, with_last(rows, a.weight.dim(1)), dtype);
  detail::check_rows(op, "weight", ctx, a.weight, a.weight.shape(), dtype);
  detail::check_rows(op, "skip", ctx, a.skip, rows, dtype);
  detail::check_operand(op, "scale", ctx, a.scale, {out}, accumulate_dtype(dtype));
  detail::check_rows(op, "y", ctx, a.y, rows, dtype);
  if (a.y.numel() == 0) return;
  LRNN_DISPATCH(linear_skip_forward, ctx, a);
}

void linear_skip_backward(Context& ctx, const LinearSkipBackward& a) {
  constexpr const char* op = "linear_skip_backward";
  LRNN_CHECK(a.dv && a.dv.rank() >= 1, ShapeError, op, ": dv is required");
  detail::check_rank(op, "weight", a.weight, 2);
  const DType dtype = a.dv.dtype();
  const std::int64_t in = a.weight.dim(1);
  const Shape rows = with_last(a.dv.shape(), in);
  detail::check_rows(op, "dv", ctx, a.dv, with_last(rows, a.weight.dim(0)), dtype);
  detail::check_rows(op, "weight", ctx, a.weight, a.weight.shape(), dtype);
  detail::check_rows(op, "dy", ctx, a.dy, rows, dtype);
  detail::check_rows(op, "x", ctx, a.x, rows, dtype);
  detail::check_operand(op, "scale", ctx, a.scale, {in}, accumulate_dtype(dtype));
  detail::check_rows(op, "dx", ctx, a.dx, rows, dtype);
  detail::check_operand(op, "dscale", ctx, a.dscale, {in}, accumulate_dtype(dtype));
  if (a.dx.numel() == 0) return;
  LRNN_DISPATCH(linear_skip_backward, ctx, a);
}

}  // namespace lrnn
