#include "lrnn/ops/s7_scan.hpp"

#include "ops/dispatch.hpp"
#include "ops/s7_scan.hpp"

namespace lrnn {

void s7_scan_forward(Context& ctx, const S7ScanForward& a) {
  constexpr const char* op = "s7_scan_forward";
  detail::check_rank(op, "x", a.x, 3);
  detail::check_rank(op, "base", a.base, 1);
  const Shape& xs = a.x.shape();
  const detail::S7Rows rows{xs[2], a.base.dim(0)};
  const DType dtype = a.x.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  const Shape states = {xs[0], rows.dstate};
  const Shape sequence = {xs[0], xs[1], rows.dstate};
  detail::check_operand(op, "x", ctx, a.x, xs, dtype);
  detail::check_operand(op, "weight", ctx, a.weight, {rows.count(), rows.dim}, dtype);
  detail::check_operand(op, "base", ctx, a.base, {rows.dstate}, accumulate);
  detail::check_lengths_operand(op, ctx, a.lengths, xs[0]);
  detail::check_optional(op, "state_in", ctx, a.state_in, states, accumulate);
  detail::check_operand(op, "y", ctx, a.y, xs, dtype);
  detail::check_optional(op, "state_out", ctx, a.state_out, states, accumulate);
  detail::check_optional(op, "A", ctx, a.A, sequence, accumulate);
  detail::check_optional(op, "s", ctx, a.s, sequence, accumulate);
  LRNN_DISPATCH(s7_scan_forward, ctx, a);
}

void s7_scan_backward(Context& ctx, const S7ScanBackward& a) {
  constexpr const char* op = "s7_scan_backward";
  detail::check_rank(op, "x", a.x, 3);
  detail::check_rank(op, "A", a.A, 3);
  const Shape& xs = a.x.shape();
  const detail::S7Rows rows{xs[2], a.A.dim(2)};
  const DType dtype = a.x.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  const Shape states = {xs[0], rows.dstate};
  const Shape sequence = {xs[0], xs[1], rows.dstate};
  detail::check_operand(op, "dy", ctx, a.dy, xs, dtype);
  detail::check_operand(op, "x", ctx, a.x, xs, dtype);
  detail::check_operand(op, "weight", ctx, a.weight, {rows.count(), rows.dim}, dtype);
  detail::check_operand(op, "A", ctx, a.A, sequence, accumulate);
  detail::check_operand(op, "s", ctx, a.s, sequence, accumulate);
  detail::check_lengths_operand(op, ctx, a.lengths, xs[0]);
  detail::check_optional(op, "state_in", ctx, a.state_in, states, accumulate);
  detail::check_optional(op, "dstate_out", ctx, a.dstate_out, states, accumulate);
  detail::check_operand(op, "dx", ctx, a.dx, xs, dtype);
  detail::check_operand(op, "dweight", ctx, a.dweight, {rows.count(), rows.dim}, accumulate);
  detail::check_operand(op, "dbase", ctx, a.dbase, {rows.dstate}, accumulate);
  detail::check_optional(op, "dstate_in", ctx, a.dstate_in, states, accumulate);
  LRNN_DISPATCH(s7_scan_backward, ctx, a);
}

void s7_scan_step(Context& ctx, const S7ScanStep& a) {
  s7_scan_forward(ctx, {.x = a.x,
                        .weight = a.weight,
                        .base = a.base,
                        .state_in = a.state,
                        .y = a.y,
                        .state_out = a.state});
}

}  // namespace lrnn
