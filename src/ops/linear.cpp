#include "lrnn/ops/linear.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

Shape with_last(Shape shape, std::int64_t last) {
  shape.set(shape.rank() - 1, last);
  return shape;
}

}  // namespace

void linear_forward(Context& ctx, const LinearForward& a) {
  constexpr const char* op = "linear_forward";
  LRNN_CHECK(a.x && a.x.rank() >= 1, ShapeError, op, ": x is required");
  detail::check_rank(op, "weight", a.weight, 2);
  const DType dtype = a.x.dtype();
  const std::int64_t out = a.weight.dim(0);
  detail::check_rows(op, "x", ctx, a.x, with_last(a.x.shape(), a.weight.dim(1)), dtype);
  detail::check_rows(op, "weight", ctx, a.weight, a.weight.shape(),
                     detail::weight_dtype(ctx, a.weight, dtype));
  detail::check_optional(op, "bias", ctx, a.bias, {out}, dtype);
  detail::check_rows(op, "y", ctx, a.y, with_last(a.x.shape(), out), dtype);
  LRNN_CHECK(!(a.accumulate && a.bias), InvalidArgument, op,
             ": accumulate and bias exclude each other");
  if (a.y.numel() == 0) return;
  LRNN_DISPATCH(linear_forward, ctx, a);
}

void linear_backward(Context& ctx, const LinearBackward& a) {
  constexpr const char* op = "linear_backward";
  LRNN_CHECK(a.dy && a.dy.rank() >= 1, ShapeError, op, ": dy is required");
  const DType dtype = a.dy.dtype();
  const std::int64_t out = a.dy.dim(-1);
  detail::check_rows(op, "dy", ctx, a.dy, a.dy.shape(), dtype);
  if (a.dx) {
    detail::check_rank(op, "weight", a.weight, 2);
    const std::int64_t in = a.weight.dim(1);
    detail::check_rows(op, "weight", ctx, a.weight, {out, in}, dtype);
    detail::check_rows(op, "dx", ctx, a.dx, with_last(a.dy.shape(), in), dtype);
  }
  if (a.dweight) {
    LRNN_CHECK(a.x && a.x.rank() >= 1, ShapeError, op, ": x is required for dweight");
    const std::int64_t in = a.x.dim(-1);
    detail::check_rows(op, "x", ctx, a.x, with_last(a.dy.shape(), in), dtype);
    detail::check_rows(op, "dweight", ctx, a.dweight, {out, in}, accumulate_dtype(dtype));
  }
  detail::check_optional(op, "dbias", ctx, a.dbias, {out}, accumulate_dtype(dtype));
  if (a.dy.numel() == 0) return;
  LRNN_DISPATCH(linear_backward, ctx, a);
}

}  // namespace lrnn
