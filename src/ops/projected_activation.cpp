#include "lrnn/ops/projected_activation.hpp"

#include "lrnn/ops/linear.hpp"

#include "ops/dispatch.hpp"
#include "ops/projected_activation_parts.hpp"

namespace lrnn {

void projected_activation(Context& ctx, const ProjectedActivation& a) {
  constexpr const char* op = "projected_activation";
  LRNN_CHECK(a.x && a.x.rank() >= 1, ShapeError, op, ": x: expected [..., I], got ", a.x.shape());
  detail::check_rank(op, "weight", a.weight, 2);
  const DType dtype = a.x.dtype();
  const std::int64_t features = a.weight.dim(0);
  detail::check_rows(op, "x", ctx, a.x, a.x.shape(), dtype);
  detail::check_operand(op, "weight", ctx, a.weight, {features, a.x.dim(-1)},
                        detail::weight_dtype(ctx, a.weight, dtype));
  detail::check_optional(op, "bias", ctx, a.bias, {features}, dtype);
  Shape y = a.x.shape();
  y.set(y.rank() - 1, features);
  detail::check_rows(op, "y", ctx, a.y, y, dtype);
  if (a.y.numel() == 0) return;
  LRNN_DISPATCH(projected_activation, ctx, a);
}

void detail::projected_activation_by_parts(Context& ctx, const ProjectedActivation& a) {
  linear_forward(ctx,
                 {.x = a.x, .weight = a.weight, .bias = a.bias, .y = a.y, .stable_weight = true});
  activation_forward(ctx, {.kind = a.kind, .x = a.y, .y = a.y});
}

}  // namespace lrnn
