#include "lrnn/ops/s7_gated_step.hpp"

#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/gated_activation.hpp"
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/s7_scan.hpp"

#include "ops/dispatch.hpp"
#include "ops/s7_gated_step_parts.hpp"
#include "ops/s7_scan.hpp"

namespace lrnn {

void s7_gated_step(Context& ctx, const S7GatedStep& a) {
  constexpr const char* op = "s7_gated_step";
  detail::check_rank(op, "x", a.x, 3);
  detail::check_rank(op, "base", a.base, 1);
  const Shape& xs = a.x.shape();
  detail::check_one_token(op, "x", a.x);
  const detail::S7Rows rows{xs[2], a.base.dim(0)};
  const DType dtype = a.x.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  detail::check_operand(op, "x", ctx, a.x, xs, dtype);
  detail::check_operand(op, "weight", ctx, a.weight, {rows.count(), rows.dim}, dtype);
  detail::check_operand(op, "base", ctx, a.base, {rows.dstate}, accumulate);
  detail::check_operand(op, "gate", ctx, a.gate, {rows.dim, rows.dim},
                        detail::weight_dtype(ctx, a.gate, dtype));
  detail::check_operand(op, "hid", ctx, a.hid, xs, dtype);
  detail::check_operand(op, "y", ctx, a.y, xs, dtype);
  detail::check_operand(op, "state", ctx, a.state, {xs[0], rows.dstate}, accumulate);
  if (a.y.numel() == 0) return;
  LRNN_DISPATCH(s7_gated_step, ctx, a);
}

void detail::s7_gated_step_by_parts(Context& ctx, const S7GatedStep& a) {
  const auto make = [&] { return ctx.empty(a.x.shape(), a.x.dtype()); };
  Tensor v = make();
  Tensor activated = make();
  Tensor pre_gate = make();
  s7_scan_step(ctx, {.x = a.x, .weight = a.weight, .base = a.base, .y = v, .state = a.state});
  activation_forward(ctx, {.kind = Activation::Gelu, .x = v, .y = activated});
  linear_forward(ctx, {.x = activated, .weight = a.gate, .y = pre_gate, .stable_weight = true});
  gated_activation_forward(ctx,
                           {.kind = Activation::Sigmoid, .value = v, .gate = pre_gate, .y = a.y});
  add_to(ctx, {.src = a.hid, .dst = a.y});
}

}  // namespace lrnn
