#include "lrnn/ops/complex_weight.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_plane(const char* op, const char* operand, const Context& ctx, const TensorView& t,
                 const Shape& shape, DType dtype) {
  const bool interleaved = t.rank() == 3 && t.dim(2) == 1;
  LRNN_CHECK(interleaved || t.rank() == 2, ShapeError, op, ": ", operand,
             ": expected [R, C] or [R, C, 1], got ", t.shape());
  if (interleaved)
    detail::check_rows(op, operand, ctx, t, shape, dtype);
  else
    detail::check_operand(op, operand, ctx, t, shape, dtype);
}

Shape weight_shape(ComplexProduct product, const TensorView& plane) {
  const std::int64_t rows = plane.dim(0);
  const std::int64_t cols = plane.dim(1);
  return product == ComplexProduct::Drive ? Shape{2, rows, cols} : Shape{rows, 2, cols};
}

}  // namespace

void complex_weight_forward(Context& ctx, const ComplexWeightForward& args) {
  constexpr const char* op = "complex_weight_forward";
  LRNN_CHECK(args.re && args.weight, ShapeError, op, ": re and weight are required");
  const DType dtype = accumulate_dtype(args.weight.dtype());
  check_plane(op, "re", ctx, args.re, args.re.shape(), dtype);
  check_plane(op, "im", ctx, args.im, args.re.shape(), dtype);
  detail::check_operand(op, "weight", ctx, args.weight, weight_shape(args.product, args.re),
                        args.weight.dtype());
  LRNN_DISPATCH(complex_weight_forward, ctx, args);
}

void complex_weight_backward(Context& ctx, const ComplexWeightBackward& args) {
  constexpr const char* op = "complex_weight_backward";
  LRNN_CHECK(args.dre && args.dweight, ShapeError, op, ": dre and dweight are required");
  const DType dtype = accumulate_dtype(args.dweight.dtype());
  check_plane(op, "dre", ctx, args.dre, args.dre.shape(), dtype);
  check_plane(op, "dim", ctx, args.dim, args.dre.shape(), dtype);
  detail::check_operand(op, "dweight", ctx, args.dweight, weight_shape(args.product, args.dre),
                        dtype);
  LRNN_DISPATCH(complex_weight_backward, ctx, args);
}

}  // namespace lrnn
