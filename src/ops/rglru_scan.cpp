#include "lrnn/ops/rglru_scan.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_inputs(const char* op, const Context& ctx, const RglruScanInputs& in) {
  detail::check_rank(op, "v", in.v, 3);
  const Shape& vs = in.v.shape();
  const DType dtype = in.v.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  detail::check_rows(op, "v", ctx, in.v, vs, dtype);
  detail::check_rows(op, "pre_r", ctx, in.pre_r, vs, dtype);
  detail::check_rows(op, "pre_i", ctx, in.pre_i, vs, dtype);
  detail::check_operand(op, "a_log", ctx, in.a_log, {vs[2]}, accumulate);
  LRNN_CHECK(in.c > 0, InvalidArgument, op, ": c: expected a positive number, got ", in.c);
  detail::check_lengths_operand(op, ctx, in.lengths, vs[0]);
  detail::check_optional(op, "state_in", ctx, in.state_in, {vs[0], vs[2]}, accumulate);
}

Shape chunk_shape(const Shape& vs) {
  return {vs[0], rglru_scan_chunks(vs[1]), vs[2]};
}

}  // namespace

void rglru_scan_forward(Context& ctx, const RglruScanForward& a) {
  constexpr const char* op = "rglru_scan_forward";
  check_inputs(op, ctx, a.in);
  const Shape& vs = a.in.v.shape();
  const DType dtype = a.in.v.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  detail::check_rows(op, "h", ctx, a.h, vs, dtype);
  detail::check_optional(op, "state_out", ctx, a.state_out, {vs[0], vs[2]}, accumulate);
  detail::check_optional(op, "chunk_states", ctx, a.chunk_states, chunk_shape(vs), accumulate);
  if (a.h.numel() == 0) return;
  LRNN_DISPATCH(rglru_scan_forward, ctx, a);
}

void rglru_scan_backward(Context& ctx, const RglruScanBackward& a) {
  constexpr const char* op = "rglru_scan_backward";
  check_inputs(op, ctx, a.in);
  const Shape& vs = a.in.v.shape();
  const Shape state = {vs[0], vs[2]};
  const DType dtype = a.in.v.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  detail::check_rows(op, "dh", ctx, a.dh, vs, dtype);
  detail::check_operand(op, "chunk_states", ctx, a.chunk_states, chunk_shape(vs), accumulate);
  detail::check_optional(op, "dstate_out", ctx, a.dstate_out, state, accumulate);
  detail::check_rows(op, "dv", ctx, a.dv, vs, dtype);
  detail::check_rows(op, "dpre_r", ctx, a.dpre_r, vs, dtype);
  detail::check_rows(op, "dpre_i", ctx, a.dpre_i, vs, dtype);
  detail::check_operand(op, "da_log", ctx, a.da_log, {vs[2]}, accumulate);
  detail::check_optional(op, "dstate_in", ctx, a.dstate_in, state, accumulate);
  if (a.dh.numel() == 0) return;
  LRNN_DISPATCH(rglru_scan_backward, ctx, a);
}

void rglru_scan_step(Context& ctx, const RglruScanStep& a) {
  constexpr const char* op = "rglru_scan_step";
  detail::check_rank(op, "v", a.in.v, 3);
  const Shape& vs = a.in.v.shape();
  detail::check_one_token(op, "v", a.in.v);
  detail::check_inputs_of_step(op, a.in);
  detail::check_operand(op, "state", ctx, a.state, {vs[0], vs[2]},
                        accumulate_dtype(a.in.v.dtype()));
  RglruScanForward forward{.in = a.in, .h = a.h, .state_out = a.state};
  forward.in.state_in = a.state;
  rglru_scan_forward(ctx, forward);
}

}  // namespace lrnn
