#include "lrnn/ops/projected_rglru.hpp"

#include "lrnn/ops/gated_activation.hpp"
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/rglru_scan.hpp"

#include "ops/dispatch.hpp"
#include "ops/projected_rglru_parts.hpp"

namespace lrnn {

void projected_rglru_step(Context& ctx, const ProjectedRglruStep& a) {
  constexpr const char* op = "projected_rglru_step";
  detail::check_rank(op, "v", a.v, 2);
  const DType dtype = a.v.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  const Shape& rows = a.v.shape();
  const std::int64_t width = rows[1];
  const auto check_projection = [&](const char* operand, TensorView weight, TensorView bias) {
    LRNN_CHECK(weight, ShapeError, op, ": ", operand, " is required");
    detail::check_rows(op, operand, ctx, weight, {width, width},
                       detail::weight_dtype(ctx, weight, dtype));
    detail::check_operand(op, operand, ctx, bias, {width}, dtype);
  };
  detail::check_rows(op, "v", ctx, a.v, rows, dtype);
  check_projection("r_projection", a.r_projection, a.r_bias);
  check_projection("i_projection", a.i_projection, a.i_bias);
  detail::check_operand(op, "a_log", ctx, a.a_log, {width}, accumulate);
  LRNN_CHECK(a.c > 0, InvalidArgument, op, ": c: expected a positive number, got ", a.c);
  detail::check_rows(op, "gate", ctx, a.gate, rows, dtype);
  detail::check_rows(op, "y", ctx, a.y, rows, dtype);
  detail::check_operand(op, "state", ctx, a.state, rows, accumulate);
  if (a.y.numel() == 0) return;
  LRNN_DISPATCH(projected_rglru_step, ctx, a);
}

void detail::projected_rglru_by_parts(Context& ctx, const ProjectedRglruStep& a) {
  const Shape& rows = a.v.shape();
  const Shape token = {rows[0], 1, rows[1]};
  Tensor pre_r = ctx.empty(rows, a.v.dtype());
  Tensor pre_i = ctx.empty(rows, a.v.dtype());
  Tensor h = ctx.empty(rows, a.v.dtype());
  linear_forward(ctx, {.x = a.v, .weight = a.r_projection, .bias = a.r_bias, .y = pre_r});
  linear_forward(ctx, {.x = a.v, .weight = a.i_projection, .bias = a.i_bias, .y = pre_i});
  rglru_scan_step(ctx, {.in = {.v = a.v.reshape(token),
                               .pre_r = pre_r.view().reshape(token),
                               .pre_i = pre_i.view().reshape(token),
                               .a_log = a.a_log,
                               .c = a.c},
                        .h = h.view().reshape(token),
                        .state = a.state});
  gated_activation_forward(ctx, {.kind = Activation::Gelu, .value = h, .gate = a.gate, .y = a.y});
}

}  // namespace lrnn
