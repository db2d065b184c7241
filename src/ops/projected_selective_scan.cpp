#include "lrnn/ops/projected_selective_scan.hpp"

#include "ops/dispatch.hpp"
#include "ops/projected_selective_scan_parts.hpp"

namespace lrnn {

void projected_selective_scan_step(Context& ctx, const ProjectedSelectiveScanStep& a) {
  constexpr const char* op = "projected_selective_scan_step";
  detail::check_rank(op, "u", a.in.u, 3);
  detail::check_rank(op, "A_log", a.in.A_log, 2);
  detail::check_rank(op, "dt_weight", a.dt_weight, 2);
  const Shape& us = a.in.u.shape();
  const DType dtype = a.in.u.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  const std::int64_t rank = a.dt_weight.dim(1);
  const std::int64_t dstate = a.in.A_log.dim(1);
  detail::check_one_token(op, "u", a.in.u);
  LRNN_CHECK(!a.in.dt && !a.in.B && !a.in.C, InvalidArgument, op,
             ": dt, B and C are products of the op");
  detail::check_inputs_of_step(op, a.in);
  const auto matrix_dtype = [&](TensorView t) { return detail::weight_dtype(ctx, t, dtype); };
  detail::check_rows(op, "u", ctx, a.in.u, us, dtype);
  detail::check_rows(op, "projection", ctx, a.projection, {rank + 2 * dstate, us[2]},
                     matrix_dtype(a.projection));
  detail::check_operand(op, "dt_weight", ctx, a.dt_weight, {us[2], rank},
                        matrix_dtype(a.dt_weight));
  detail::check_operand(op, "dt_bias", ctx, a.in.dt_bias, {us[2]}, accumulate);
  detail::check_operand(op, "A_log", ctx, a.in.A_log, {us[2], dstate}, accumulate);
  detail::check_optional(op, "D", ctx, a.in.D, {us[2]}, accumulate);
  if (a.in.z) detail::check_rows(op, "z", ctx, a.in.z, us, dtype);
  detail::check_rows(op, "y", ctx, a.y, us, dtype);
  detail::check_operand(op, "state", ctx, a.state, {us[0], us[2], dstate}, accumulate);
  if (a.y.numel() == 0) return;
  LRNN_DISPATCH(projected_selective_scan_step, ctx, a);
}

void detail::projected_selective_scan_by_parts(Context& ctx, const ProjectedSelectiveScanStep& a) {
  const std::int64_t rank = a.dt_weight.dim(1);
  const std::int64_t dstate = a.in.A_log.dim(1);
  Tensor x_dbl = ctx.empty({a.in.u.dim(0), 1, rank + 2 * dstate}, a.in.u.dtype());
  linear_forward(ctx, {.x = a.in.u, .weight = a.projection, .y = x_dbl, .stable_weight = true});
  SelectiveScanInputs in = a.in;
  in.B = x_dbl.view().slice(2, rank, dstate);
  in.C = x_dbl.view().slice(2, rank + dstate, dstate);
  selective_scan_step(ctx, {.in = in,
                            .dt_low = x_dbl.view().slice(2, 0, rank),
                            .dt_weight = a.dt_weight,
                            .y = a.y,
                            .state = a.state});
}

}  // namespace lrnn
