#include "lrnn/ops/discretize.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_elements(const char* op, const char* operand, const Context& ctx, const TensorView& t,
                    DType dtype) {
  const bool plane = t.rank() > 1 && t.dim(-1) == 1;
  if (plane)
    detail::check_rows(op, operand, ctx, t, t.shape(), dtype);
  else
    detail::check_operand(op, operand, ctx, t, t.shape(), dtype);
}

void check_parameter(const char* op, const char* operand, const Context& ctx, const TensorView& t,
                     std::int64_t lanes, DType dtype) {
  LRNN_CHECK(t, ShapeError, op, ": ", operand, " is required");
  check_elements(op, operand, ctx, t, dtype);
  LRNN_CHECK(t.numel() > 0 && lanes % t.numel() == 0, ShapeError, op, ": ", operand,
             ": expected a divisor of ", lanes, " lanes, got ", t.shape());
}

void check_parameters(const char* op, const Context& ctx, const LaneParameters& p) {
  LRNN_CHECK(p.lanes > 0, ShapeError, op, ": lanes: expected > 0, got ", p.lanes);
  LRNN_CHECK(p.A_re.value, ShapeError, op, ": A_re is required");
  const DType dtype = p.A_re.value.dtype();
  LRNN_CHECK(dtype == accumulate_dtype(dtype), DTypeError, op,
             ": A_re: expected float32 or float64, got ", dtype);
  check_parameter(op, "A_re", ctx, p.A_re.value, p.lanes, dtype);
  check_parameter(op, "A_im", ctx, p.A_im.value, p.lanes, dtype);
  LRNN_CHECK(p.A_im.value.numel() == p.A_re.value.numel(), ShapeError, op,
             ": A_im: expected as many elements as A_re ", p.A_re.value.shape(), ", got ",
             p.A_im.value.shape());
  if (p.dt.value) check_parameter(op, "dt", ctx, p.dt.value, p.lanes, dtype);
  LRNN_CHECK(static_cast<bool>(p.gamma_log) == (p.method == Discretization::Exponential),
             ShapeError, op, ": gamma_log belongs to the exponential method, and to it alone");
  detail::check_optional(op, "gamma_log", ctx, p.gamma_log, {p.lanes}, dtype);
}

void check_gradient(const char* op, const char* operand, const Context& ctx, const TensorView& t,
                    const TensorView& value) {
  if (!t) return;
  LRNN_CHECK(value, ShapeError, op, ": ", operand, " of an absent parameter");
  LRNN_CHECK(t.shape() == value.shape(), ShapeError, op, ": ", operand, ": expected ",
             value.shape(), ", got ", t.shape());
  check_elements(op, operand, ctx, t, value.dtype());
}

}  // namespace

void discretize_forward(Context& ctx, const DiscretizeForward& args) {
  constexpr const char* op = "discretize_forward";
  const LaneParameters& p = args.parameters;
  check_parameters(op, ctx, p);
  const DType dtype = p.A_re.value.dtype();
  detail::check_optional(op, "a", ctx, args.a, {2, p.lanes}, dtype);
  detail::check_optional(op, "a_low", ctx, args.a_low, {2, p.lanes}, dtype);
  detail::check_optional(op, "gamma", ctx, args.gamma, {2, p.lanes}, dtype);
  if (args.powers)
    detail::check_operand(op, "powers", ctx, args.powers, {args.powers.dim(0), 2, p.lanes}, dtype);
  detail::check_optional(op, "z", ctx, args.z, {4, p.lanes}, dtype);
  LRNN_CHECK(!args.z || p.method != Discretization::None, ShapeError, op,
             ": z does not exist without a discretization");
  LRNN_DISPATCH(discretize_forward, ctx, args);
}

void discretize_backward(Context& ctx, const DiscretizeBackward& args) {
  constexpr const char* op = "discretize_backward";
  const LaneParameters& p = args.parameters;
  check_parameters(op, ctx, p);
  const DType dtype = p.A_re.value.dtype();
  detail::check_optional(op, "da", ctx, args.da, {2, p.lanes}, dtype);
  detail::check_optional(op, "dz", ctx, args.dz, {2, p.lanes}, dtype);
  detail::check_optional(op, "dgamma", ctx, args.dgamma, {2, p.lanes}, dtype);
  LRNN_CHECK(!args.dz || p.method != Discretization::None, ShapeError, op,
             ": dz does not exist without a discretization");
  check_gradient(op, "dA_re", ctx, args.dA_re, p.A_re.value);
  check_gradient(op, "dA_im", ctx, args.dA_im, p.A_im.value);
  check_gradient(op, "ddt", ctx, args.ddt, p.dt.value);
  check_gradient(op, "dgamma_log", ctx, args.dgamma_log, p.gamma_log);
  LRNN_DISPATCH(discretize_backward, ctx, args);
}

}  // namespace lrnn
