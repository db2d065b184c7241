#include "lrnn/ops/dplr_discretize.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_parameter(const char* op, const char* operand, const Context& ctx,
                     const LaneParameter& parameter, std::int64_t count, DType dtype) {
  const TensorView& t = parameter.value;
  LRNN_CHECK(t, ShapeError, op, ": ", operand, ": expected ", count, " elements, got none");
  LRNN_CHECK(t.numel() == count, ShapeError, op, ": ", operand, ": expected ", count,
             " elements, got ", t.shape());
  detail::check_operand(op, operand, ctx, t, t.shape(), dtype);
}

struct Sizes {
  Shape plane;
  Shape planes;
};

Sizes check_parameters(const char* op, const Context& ctx, const DplrParameters& p) {
  detail::check_rank(op, "P", p.P, 4);
  const std::int64_t rank = p.P.dim(0);
  const std::int64_t copies = p.P.dim(1);
  const std::int64_t states = p.P.dim(2);
  const DType dtype = p.P.dtype();
  LRNN_CHECK(p.P.numel() > 0 && rank <= kMaxDplrRank, ShapeError, op,
             ": P: expected [R, K, N, 2] with 1 <= R <= ", kMaxDplrRank, ", got ", p.P.shape());
  LRNN_CHECK(p.heads > 0 && p.heads % copies == 0, ShapeError, op, ": P: expected a divisor of ",
             p.heads, " heads as number of copies, got ", copies);
  LRNN_CHECK(dtype == accumulate_dtype(dtype), DTypeError, op,
             ": P: expected float32 or float64, got ", dtype);
  detail::check_operand(op, "P", ctx, p.P, {rank, copies, states, 2}, dtype);
  detail::check_operand(op, "B", ctx, p.B, {copies, states, 2}, dtype);
  check_parameter(op, "A_re", ctx, p.A_re, copies * states, dtype);
  check_parameter(op, "A_im", ctx, p.A_im, copies * states, dtype);
  const bool of_heads = p.dt.value && p.dt.value.numel() == p.heads;
  check_parameter(op, "dt", ctx, p.dt, of_heads ? p.heads : p.heads * states, dtype);
  return {{2, p.heads, states}, {rank, 2, p.heads, states}};
}

}  // namespace

void dplr_discretize_forward(Context& ctx, const DplrDiscretizeForward& args) {
  constexpr const char* op = "dplr_discretize_forward";
  const Sizes s = check_parameters(op, ctx, args.parameters);
  const DType dtype = args.parameters.P.dtype();
  detail::check_operand(op, "e", ctx, args.e, s.plane, dtype);
  detail::check_optional(op, "e_low", ctx, args.e_low, s.plane, dtype);
  detail::check_operand(op, "w", ctx, args.w, s.planes, dtype);
  detail::check_operand(op, "k", ctx, args.k, s.planes, dtype);
  detail::check_operand(op, "b", ctx, args.b, s.plane, dtype);
  LRNN_DISPATCH(dplr_discretize_forward, ctx, args);
}

void dplr_discretize_backward(Context& ctx, const DplrDiscretizeBackward& args) {
  constexpr const char* op = "dplr_discretize_backward";
  const DplrParameters& p = args.parameters;
  const Sizes s = check_parameters(op, ctx, p);
  const DType dtype = p.P.dtype();
  detail::check_operand(op, "de", ctx, args.de, s.plane, dtype);
  detail::check_operand(op, "dw", ctx, args.dw, s.planes, dtype);
  detail::check_operand(op, "dk", ctx, args.dk, s.planes, dtype);
  detail::check_operand(op, "db", ctx, args.db, s.plane, dtype);
  detail::check_optional(op, "dA_re", ctx, args.dA_re, p.A_re.value.shape(), dtype);
  detail::check_optional(op, "dA_im", ctx, args.dA_im, p.A_im.value.shape(), dtype);
  detail::check_optional(op, "ddt", ctx, args.ddt, p.dt.value.shape(), dtype);
  detail::check_optional(op, "dP", ctx, args.dP, p.P.shape(), dtype);
  detail::check_optional(op, "dB", ctx, args.dB, p.B.shape(), dtype);
  LRNN_DISPATCH(dplr_discretize_backward, ctx, args);
}

}  // namespace lrnn
