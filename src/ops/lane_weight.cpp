#include "lrnn/ops/lane_weight.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

struct Sizes {
  bool real;
  std::int64_t channels;
  std::int64_t lanes;
  std::int64_t substates;
  DType dtype;

  [[nodiscard]] Shape weight() const {
    return real ? Shape{1, lanes, substates} : Shape{channels, 2, lanes, substates};
  }
  [[nodiscard]] Shape gamma() const { return {2, lanes * substates}; }
};

Sizes check_factors(const char* op, const Context& ctx, const LaneWeightFactors& f) {
  LRNN_CHECK(f.C && (f.C.rank() == 2 || (f.C.rank() == 4 && f.C.dim(3) == 2)), ShapeError, op,
             ": C: expected [C, N, M, 2] or [N, M], got ", f.C.shape());
  const bool real = f.C.rank() == 2;
  const Sizes s{real, real ? 1 : f.C.dim(0), f.C.dim(real ? 0 : 1), f.C.dim(real ? 1 : 2),
                f.C.dtype()};
  LRNN_CHECK(s.dtype == accumulate_dtype(s.dtype), DTypeError, op,
             ": C: expected float32 or float64, got ", s.dtype);
  LRNN_CHECK(f.C.numel() > 0, ShapeError, op, ": C: expected at least one element, got ",
             f.C.shape());
  detail::check_operand(op, "C", ctx, f.C, f.C.shape(), s.dtype);
  detail::check_optional(op, "gamma", ctx, f.gamma, s.gamma(), s.dtype);
  if (f.B) {
    detail::check_rank(op, "B", f.B, 3);
    LRNN_CHECK(!real, ShapeError, op, ": B belongs to the complex form");
    LRNN_CHECK(f.B.dim(0) > 0 && s.lanes % f.B.dim(0) == 0, ShapeError, op,
               ": B: expected a divisor of ", s.lanes, " lanes as copies, got ", f.B.shape());
    detail::check_operand(op, "B", ctx, f.B, {f.B.dim(0), s.substates, 2}, s.dtype);
  }
  detail::check_optional(op, "left", ctx, f.left, {s.lanes}, s.dtype);
  detail::check_optional(op, "right", ctx, f.right, {s.lanes}, s.dtype);
  return s;
}

void check_gradient(const char* op, const char* operand, const Context& ctx, const TensorView& grad,
                    const TensorView& factor, DType dtype) {
  if (!grad) return;
  LRNN_CHECK(factor, ShapeError, op, ": ", operand, " without its factor");
  detail::check_operand(op, operand, ctx, grad, factor.shape(), dtype);
}

}  // namespace

void lane_weight_forward(Context& ctx, const LaneWeightForward& args) {
  constexpr const char* op = "lane_weight_forward";
  const Sizes s = check_factors(op, ctx, args.factors);
  detail::check_operand(op, "W", ctx, args.W, s.weight(), s.dtype);
  LRNN_DISPATCH(lane_weight_forward, ctx, args);
}

void lane_weight_backward(Context& ctx, const LaneWeightBackward& args) {
  constexpr const char* op = "lane_weight_backward";
  const LaneWeightFactors& f = args.factors;
  const Sizes s = check_factors(op, ctx, f);
  detail::check_operand(op, "dW", ctx, args.dW, s.weight(), s.dtype);
  detail::check_optional(op, "dgamma", ctx, args.dgamma, s.gamma(), s.dtype);
  check_gradient(op, "dB", ctx, args.dB, f.B, s.dtype);
  detail::check_operand(op, "dC", ctx, args.dC, f.C.shape(), s.dtype);
  check_gradient(op, "dleft", ctx, args.dleft, f.left, s.dtype);
  check_gradient(op, "dright", ctx, args.dright, f.right, s.dtype);
  LRNN_DISPATCH(lane_weight_backward, ctx, args);
}

}  // namespace lrnn
