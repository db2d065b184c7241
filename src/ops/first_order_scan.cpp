#include "lrnn/ops/first_order_scan.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_inputs(const char* op, const Context& ctx, const FirstOrderScanInputs& in) {
  detail::check_rank(op, "b", in.b, 3);
  const Shape& shape = in.b.shape();
  const DType accumulate = accumulate_dtype(in.b.dtype());
  detail::check_rows(op, "b", ctx, in.b, shape, in.b.dtype());
  LRNN_CHECK(static_cast<bool>(in.a) != static_cast<bool>(in.log_a), InvalidArgument, op,
             ": a, log_a: expected one of them, got ", in.a ? "both" : "none");
  if (in.a)
    detail::check_rows(op, "a", ctx, in.a, shape, in.b.dtype());
  else
    detail::check_rows(op, "log_a", ctx, in.log_a, shape, accumulate);
  detail::check_lengths_operand(op, ctx, in.lengths, shape[0]);
  detail::check_optional(op, "state_in", ctx, in.state_in, {shape[0], shape[2]}, accumulate);
}

}  // namespace

void first_order_scan_forward(Context& ctx, const FirstOrderScanForward& a) {
  constexpr const char* op = "first_order_scan_forward";
  check_inputs(op, ctx, a.in);
  const Shape& shape = a.in.b.shape();
  detail::check_rows(op, "h", ctx, a.h, shape, a.in.b.dtype());
  detail::check_optional(op, "state_out", ctx, a.state_out, {shape[0], shape[2]},
                         accumulate_dtype(a.in.b.dtype()));
  if (a.h.numel() == 0) return;
  LRNN_DISPATCH(first_order_scan_forward, ctx, a);
}

void first_order_scan_backward(Context& ctx, const FirstOrderScanBackward& a) {
  constexpr const char* op = "first_order_scan_backward";
  check_inputs(op, ctx, a.in);
  const Shape& shape = a.in.b.shape();
  const Shape state = {shape[0], shape[2]};
  const DType dtype = a.in.b.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  detail::check_rows(op, "h", ctx, a.h, shape, dtype);
  detail::check_rows(op, "dh", ctx, a.dh, shape, dtype);
  detail::check_optional(op, "dstate_out", ctx, a.dstate_out, state, accumulate);
  if (a.in.a)
    detail::check_rows(op, "da", ctx, a.da, shape, dtype);
  else
    detail::check_rows(op, "dlog_a", ctx, a.dlog_a, shape, accumulate);
  LRNN_CHECK(!(a.in.a ? a.dlog_a : a.da), InvalidArgument, op, ": ", a.in.a ? "dlog_a" : "da",
             ": expected none, because ", a.in.a ? "log_a" : "a", " is absent");
  detail::check_rows(op, "db", ctx, a.db, shape, dtype);
  detail::check_optional(op, "dstate_in", ctx, a.dstate_in, state, accumulate);
  if (a.dh.numel() == 0) return;
  LRNN_DISPATCH(first_order_scan_backward, ctx, a);
}

void first_order_scan_step(Context& ctx, const FirstOrderScanStep& a) {
  constexpr const char* op = "first_order_scan_step";
  detail::check_rank(op, "b", a.in.b, 3);
  const Shape& shape = a.in.b.shape();
  detail::check_one_token(op, "b", a.in.b);
  detail::check_inputs_of_step(op, a.in);
  detail::check_operand(op, "state", ctx, a.state, {shape[0], shape[2]},
                        accumulate_dtype(a.in.b.dtype()));
  FirstOrderScanForward forward{.in = a.in, .h = a.h, .state_out = a.state};
  forward.in.state_in = a.state;
  first_order_scan_forward(ctx, forward);
}

}  // namespace lrnn
