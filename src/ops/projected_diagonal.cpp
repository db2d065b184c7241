#include "lrnn/ops/projected_diagonal.hpp"

#include "lrnn/ops/diagonal_scan.hpp"
#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/linear.hpp"

#include "ops/dispatch.hpp"
#include "ops/norm_in_front.hpp"
#include "ops/projected_diagonal_parts.hpp"

namespace lrnn {

void projected_diagonal_step(Context& ctx, const ProjectedDiagonalStep& a) {
  constexpr const char* op = "projected_diagonal_step";
  detail::check_rank(op, "x", a.x, 2);
  detail::check_rank(op, "a", a.a, 2);
  LRNN_CHECK(a.B && (a.B.rank() == 2 || a.B.rank() == 3), ShapeError, op,
             ": B: expected [N, H] or [2, N, H], got ", a.B.shape());
  LRNN_CHECK(a.D && (a.D.rank() == 1 || a.D.rank() == 2), ShapeError, op,
             ": D: expected [H] or [H, H], got ", a.D.shape());
  const DType dtype = a.x.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  const std::int64_t width = a.x.dim(1);
  const std::int64_t lanes = a.a.dim(1);
  const Shape planes = {2, lanes};
  detail::check_rows(op, "x", ctx, a.x, a.x.shape(), dtype);
  detail::check_operand(op, "B", ctx, a.B,
                        a.B.rank() == 2 ? Shape{lanes, width} : Shape{2, lanes, width}, dtype);
  detail::check_operand(op, "a", ctx, a.a, planes, accumulate);
  detail::check_operand(op, "a_low", ctx, a.a_low, planes, accumulate);
  detail::check_operand(op, "gamma", ctx, a.gamma, planes, accumulate);
  detail::check_operand(op, "C", ctx, a.C, {width, 2, lanes}, dtype);
  if (a.D.rank() == 1)
    detail::check_operand(op, "D", ctx, a.D, {width}, accumulate);
  else
    detail::check_operand(op, "D", ctx, a.D, {width, width}, dtype);
  detail::check_rows(op, "y", ctx, a.y, a.x.shape(), dtype);
  detail::check_operand(op, "state", ctx, a.state, {a.x.dim(0), 2, lanes}, accumulate);
  detail::check_norm_in_front(op, ctx, a.norm, a.x);
  if (a.y.numel() == 0) return detail::run_norm_in_front(ctx, a.norm);
  LRNN_DISPATCH(projected_diagonal_step, ctx, a);
}

void detail::projected_diagonal_by_parts(Context& ctx, const ProjectedDiagonalStep& a) {
  run_norm_in_front(ctx, a.norm);
  const std::int64_t batch = a.x.dim(0);
  const std::int64_t width = a.x.dim(1);
  const std::int64_t lanes = a.a.dim(1);
  const bool complex = a.B.rank() == 3;
  const std::int64_t drives = complex ? 2 * lanes : lanes;
  Tensor v = ctx.empty({batch, drives}, a.x.dtype());
  Tensor states = ctx.empty({batch, 2 * lanes}, a.x.dtype());
  linear_forward(ctx, {.x = a.x, .weight = a.B.reshape({drives, width}), .y = v});
  diagonal_scan_forward(
      ctx, {.multiplier = {.a = a.a, .a_low = a.a_low},
            .gamma = a.gamma,
            .v = v.view().reshape(complex ? Shape{batch, 1, 2, lanes} : Shape{batch, 1, lanes}),
            .state_in = a.state,
            .x = states.view().reshape({batch, 1, 2, lanes}),
            .state_out = a.state});
  if (a.D.rank() == 1)
    scale_columns(ctx, {.src = a.x, .scale = a.D, .dst = a.y});
  else
    linear_forward(ctx, {.x = a.x, .weight = a.D, .y = a.y});
  linear_forward(
      ctx, {.x = states, .weight = a.C.reshape({width, 2 * lanes}), .y = a.y, .accumulate = true});
}

}  // namespace lrnn
