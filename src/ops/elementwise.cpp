#include "lrnn/ops/elementwise.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_pair(const char* op, const Context& ctx, TensorView src, MutableTensorView dst) {
  LRNN_CHECK(src && src.rank() >= 1, ShapeError, op, ": src is required");
  detail::check_rows(op, "src", ctx, src, src.shape(), src.dtype());
  LRNN_CHECK(dst, ShapeError, op, ": dst is required");
  detail::check_rows(op, "dst", ctx, dst, src.shape(), dst.dtype());
}

}  // namespace

void cast(Context& ctx, const Cast& a) {
  check_pair("cast", ctx, a.src, a.dst);
  if (a.src.numel() == 0) return;
  LRNN_DISPATCH(cast, ctx, a);
}

void transpose(Context& ctx, const Transpose& a) {
  constexpr const char* op = "transpose";
  detail::check_rank(op, "src", a.src, 2);
  detail::check_rows(op, "src", ctx, a.src, a.src.shape(), a.src.dtype());
  LRNN_CHECK(a.dst, ShapeError, op, ": dst is required");
  detail::check_rows(op, "dst", ctx, a.dst, {a.src.dim(1), a.src.dim(0)}, a.dst.dtype());
  if (a.src.numel() == 0) return;
  LRNN_DISPATCH(transpose, ctx, a);
}

void add_to(Context& ctx, const AddTo& a) {
  check_pair("add_to", ctx, a.src, a.dst);
  if (a.src.numel() == 0) return;
  LRNN_DISPATCH(add_to, ctx, a);
}

void fill(Context& ctx, const Fill& a) {
  LRNN_CHECK(a.dst, ShapeError, "fill: dst is required");
  detail::check_operand("fill", "dst", ctx, a.dst, a.dst.shape(), a.dst.dtype());
  if (a.dst.numel() == 0) return;
  LRNN_DISPATCH(fill, ctx, a);
}

void mask_padding(Context& ctx, const MaskPadding& a) {
  constexpr const char* op = "mask_padding";
  LRNN_CHECK(a.x && a.x.rank() >= 2, ShapeError, op, ": x: expected [B, L, ...]");
  detail::check_operand(op, "x", ctx, a.x, a.x.shape(), a.x.dtype());
  detail::check_operand(op, "lengths", ctx, a.lengths, {a.x.dim(0)}, DType::int32);
  if (a.x.numel() == 0) return;
  LRNN_DISPATCH(mask_padding, ctx, a);
}

void scale_columns(Context& ctx, const ScaleColumns& a) {
  constexpr const char* op = "scale_columns";
  check_pair(op, ctx, a.src, a.dst);
  const DType dtype = a.src.dtype();
  detail::check_operand(op, "scale", ctx, a.scale, {a.src.dim(-1)}, accumulate_dtype(dtype));
  LRNN_CHECK(a.dst.dtype() == dtype, DTypeError, op, ": dst: expected ", dtype, ", got ",
             a.dst.dtype());
  if (a.src.numel() == 0) return;
  LRNN_DISPATCH(scale_columns, ctx, a);
}

void scale_columns_backward(Context& ctx, const ScaleColumnsBackward& a) {
  constexpr const char* op = "scale_columns_backward";
  LRNN_CHECK(a.dy && a.dy.rank() >= 1, ShapeError, op, ": dy is required");
  const DType dtype = a.dy.dtype();
  const Shape columns = {a.dy.dim(-1)};
  detail::check_rows(op, "dy", ctx, a.dy, a.dy.shape(), dtype);
  detail::check_rows(op, "x", ctx, a.x, a.dy.shape(), dtype);
  detail::check_operand(op, "scale", ctx, a.scale, columns, accumulate_dtype(dtype));
  detail::check_rows(op, "dx", ctx, a.dx, a.dy.shape(), dtype);
  detail::check_operand(op, "dscale", ctx, a.dscale, columns, accumulate_dtype(dtype));
  if (a.dy.numel() == 0) return;
  LRNN_DISPATCH(scale_columns_backward, ctx, a);
}

void sum_columns(Context& ctx, const SumColumns& a) {
  constexpr const char* op = "sum_columns";
  LRNN_CHECK(a.a && a.a.rank() >= 1, ShapeError, op, ": a is required");
  const DType dtype = a.a.dtype();
  detail::check_rows(op, "a", ctx, a.a, a.a.shape(), dtype);
  if (a.b) detail::check_rows(op, "b", ctx, a.b, a.a.shape(), dtype);
  detail::check_operand(op, "out", ctx, a.out, {a.a.dim(-1)}, accumulate_dtype(dtype));
  if (a.a.numel() == 0) return;
  LRNN_DISPATCH(sum_columns, ctx, a);
}

}  // namespace lrnn
