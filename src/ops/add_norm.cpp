#include "lrnn/ops/add_norm.hpp"

#include "ops/dispatch.hpp"
#include "ops/norm_in_front.hpp"

namespace lrnn {
namespace {

Shape drop_last(const Shape& s) {
  Shape rows;
  for (int i = 0; i + 1 < s.rank(); ++i) rows.set(i, s[i]);
  return rows;
}

// A residual is kept in the dtype of x or in the accumulation dtype.
void check_residual(const char* op, const char* operand, const Context& ctx, TensorView t,
                    const Shape& shape, DType dtype) {
  if (!t) return;
  const DType wide = accumulate_dtype(dtype);
  LRNN_CHECK(t.dtype() == dtype || t.dtype() == wide, DTypeError, op, ": ", operand, ": expected ",
             dtype, " or ", wide, ", got ", t.dtype());
  detail::check_operand(op, operand, ctx, t, shape, t.dtype());
}

}  // namespace

void detail::check_add_norm_forward(const Context& ctx, const AddNormForward& a) {
  constexpr const char* op = "add_norm_forward";
  LRNN_CHECK(a.x && a.x.rank() >= 1, ShapeError, op, ": x is required");
  const Shape& xs = a.x.shape();
  const DType dtype = a.x.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  detail::check_operand(op, "x", ctx, a.x, xs, dtype);
  check_residual(op, "residual", ctx, a.residual, xs, dtype);
  detail::check_operand(op, "weight", ctx, a.weight, {xs[-1]}, accumulate);
  detail::check_optional(op, "bias", ctx, a.bias, {xs[-1]}, accumulate);
  LRNN_CHECK(!(a.kind == NormKind::Rms && (a.bias || a.mean)), InvalidArgument, op,
             ": bias and mean belong to the layer norm");
  detail::check_operand(op, "y", ctx, a.y, xs, dtype);
  check_residual(op, "residual_out", ctx, a.residual_out, xs, dtype);
  detail::check_optional(op, "rstd", ctx, a.rstd, drop_last(xs), accumulate);
  detail::check_optional(op, "mean", ctx, a.mean, drop_last(xs), accumulate);
}

void detail::check_norm_in_front(const char* op, const Context& ctx, const AddNormForward* norm,
                                 TensorView x) {
  if (norm == nullptr) return;
  check_add_norm_forward(ctx, *norm);
  LRNN_CHECK(x.raw() == norm->y.raw() && x.numel() == norm->y.numel() && x.is_contiguous() &&
                 x.dim(-1) == norm->y.dim(-1),
             InvalidArgument, op, ": norm: expected x as its y, got other memory or another shape");
}

void add_norm_forward(Context& ctx, const AddNormForward& a) {
  detail::check_add_norm_forward(ctx, a);
  if (a.x.numel() == 0) return;
  LRNN_DISPATCH(add_norm_forward, ctx, a);
}

void add_norm_backward(Context& ctx, const AddNormBackward& a) {
  constexpr const char* op = "add_norm_backward";
  LRNN_CHECK(a.dy && a.dy.rank() >= 1, ShapeError, op, ": dy is required");
  const Shape& xs = a.dy.shape();
  const DType dtype = a.dy.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  detail::check_operand(op, "dy", ctx, a.dy, xs, dtype);
  LRNN_CHECK(a.r, ShapeError, op, ": r is required");
  check_residual(op, "r", ctx, a.r, xs, dtype);
  detail::check_operand(op, "weight", ctx, a.weight, {xs[-1]}, accumulate);
  detail::check_operand(op, "rstd", ctx, a.rstd, drop_last(xs), accumulate);
  if (a.kind == NormKind::Layer)
    detail::check_operand(op, "mean", ctx, a.mean, drop_last(xs), accumulate);
  detail::check_optional(op, "dresidual_out", ctx, a.dresidual_out, xs, a.r.dtype());
  detail::check_operand(op, "dx", ctx, a.dx, xs, dtype);
  detail::check_optional(op, "dresidual", ctx, a.dresidual, xs, a.r.dtype());
  detail::check_operand(op, "dweight", ctx, a.dweight, {xs[-1]}, accumulate);
  detail::check_optional(op, "dbias", ctx, a.dbias, {xs[-1]}, accumulate);
  if (a.dy.numel() == 0) return;
  LRNN_DISPATCH(add_norm_backward, ctx, a);
}

}  // namespace lrnn
