#include "lrnn/ops/projected_gate.hpp"

#include "lrnn/ops/gated_activation.hpp"
#include "lrnn/ops/linear.hpp"

#include "ops/dispatch.hpp"
#include "ops/norm_in_front.hpp"
#include "ops/projected_gate_parts.hpp"

namespace lrnn {
namespace {

Shape with_last(Shape shape, std::int64_t last) {
  shape.set(shape.rank() - 1, last);
  return shape;
}

}  // namespace

void projected_gate(Context& ctx, const ProjectedGate& a) {
  constexpr const char* op = "projected_gate";
  LRNN_CHECK(a.x && a.x.rank() >= 1, ShapeError, op, ": x: expected [..., H], got ", a.x.shape());
  detail::check_rank(op, "weight", a.weight, 3);
  const DType dtype = a.x.dtype();
  const std::int64_t features = a.weight.dim(1);
  detail::check_rows(op, "x", ctx, a.x, a.x.shape(), dtype);
  detail::check_operand(op, "weight", ctx, a.weight, {2, features, a.x.dim(-1)},
                        detail::weight_dtype(ctx, a.weight, dtype));
  detail::check_rows(op, "y", ctx, a.y, with_last(a.x.shape(), features), dtype);
  detail::check_norm_in_front(op, ctx, a.norm, a.x);
  if (a.y.numel() == 0) return detail::run_norm_in_front(ctx, a.norm);
  LRNN_DISPATCH(projected_gate, ctx, a);
}

void detail::projected_gate_by_parts(Context& ctx, const ProjectedGate& a) {
  run_norm_in_front(ctx, a.norm);
  const std::int64_t features = a.weight.dim(1);
  Tensor both = ctx.empty(with_last(a.x.shape(), 2 * features), a.x.dtype());
  linear_forward(ctx, {.x = a.x,
                       .weight = a.weight.reshape({2 * features, a.x.dim(-1)}),
                       .y = both,
                       .stable_weight = true});
  gated_activation_forward(ctx, {.kind = a.kind,
                                 .value = both.view().slice(-1, 0, features),
                                 .gate = both.view().slice(-1, features, features),
                                 .y = a.y});
}

}  // namespace lrnn
