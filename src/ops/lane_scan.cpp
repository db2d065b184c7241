#include "ops/lane_scan.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

using detail::LaneScanSizes;

LaneScanSizes check_sizes(const char* op, const TensorView& a, const TensorView& W,
                          const TensorView& v) {
  detail::check_rank(op, "a", a, 3);
  detail::check_rank(op, "v", v, 3);
  LRNN_CHECK(W && (W.rank() == 3 || W.rank() == 4), ShapeError, op,
             ": W: expected [C, 2, N, M] or [C, N, M], got ", W.shape());
  const LaneScanSizes s(a, W, v);
  LRNN_CHECK(v.numel() > 0 && a.numel() > 0 && s.channels > 0, ShapeError, op,
             ": expected at least one token, lane, sub-state and channel, got v ", v.shape(),
             ", a ", a.shape(), ", W ", W.shape());
  LRNN_CHECK(s.lanes % s.inputs == 0, ShapeError, op, ": a: expected a multiple of ", s.inputs,
             " inputs as lanes, got ", s.lanes);
  LRNN_CHECK(s.groups == 1 || s.channels == 1, ShapeError, op,
             ": W: expected one channel where outputs sum over lanes, got ", s.channels);
  return s;
}

// Operands that all passes share.
template <class Args>
void check_parameters(const char* op, const Context& ctx, const Args& args,
                      const LaneScanSizes& s) {
  const DType state = accumulate_dtype(args.v.dtype());
  const Shape plane = {2, s.lanes, s.substates};
  detail::check_operand(op, "a", ctx, args.a, plane, state);
  detail::check_optional(op, "a_low", ctx, args.a_low, plane, state);
  detail::check_operand(op, "W", ctx, args.W,
                        s.real_weight ? Shape{s.channels, s.lanes, s.substates}
                                      : Shape{s.channels, 2, s.lanes, s.substates},
                        state);
  detail::check_operand(op, "v", ctx, args.v, args.v.shape(), args.v.dtype());
  LRNN_CHECK(!args.skip || s.groups == 1, ShapeError, op,
             ": skip: expected as many lanes as inputs");
  detail::check_optional(op, "skip", ctx, args.skip, {s.channels, s.lanes}, state);
}
// Those that forward and backward share.
template <class Args>
void check_shared(const char* op, const Context& ctx, const Args& args, const LaneScanSizes& s) {
  check_parameters(op, ctx, args, s);
  detail::check_lengths_operand(op, ctx, args.lengths, s.batch);
}

}  // namespace

void lane_scan_forward(Context& ctx, const LaneScanForward& args) {
  constexpr const char* op = "lane_scan_forward";
  const LaneScanSizes s = check_sizes(op, args.a, args.W, args.v);
  check_shared(op, ctx, args, s);
  const DType state = accumulate_dtype(args.v.dtype());
  const Shape states = {s.batch, 2, s.lanes, s.substates};
  detail::check_optional(op, "state_in", ctx, args.state_in, states, state);
  detail::check_operand(op, "y", ctx, args.y, {s.batch, s.seqlen, s.outputs}, args.v.dtype());
  detail::check_optional(op, "state_out", ctx, args.state_out, states, state);
  detail::check_optional(op, "chunk_states", ctx, args.chunk_states,
                         {s.batch, s.chunks, 2, s.lanes, s.substates}, state);
  LRNN_DISPATCH(lane_scan_forward, ctx, args);
}

void lane_scan_backward(Context& ctx, const LaneScanBackward& args) {
  constexpr const char* op = "lane_scan_backward";
  const LaneScanSizes s = check_sizes(op, args.a, args.W, args.v);
  check_shared(op, ctx, args, s);
  const DType state = accumulate_dtype(args.v.dtype());
  const Shape states = {s.batch, 2, s.lanes, s.substates};
  detail::check_operand(op, "dy", ctx, args.dy, {s.batch, s.seqlen, s.outputs}, args.v.dtype());
  detail::check_operand(op, "chunk_states", ctx, args.chunk_states,
                        {s.batch, s.chunks, 2, s.lanes, s.substates}, state);
  detail::check_optional(op, "dstate_out", ctx, args.dstate_out, states, state);
  detail::check_operand(op, "dv", ctx, args.dv, args.v.shape(), args.v.dtype());
  detail::check_optional(op, "da", ctx, args.da, args.a.shape(), state);
  detail::check_optional(op, "dlog_a", ctx, args.dlog_a, args.a.shape(), state);
  detail::check_optional(op, "dW", ctx, args.dW, args.W.shape(), state);
  LRNN_CHECK(!args.dskip || s.groups == 1, ShapeError, op,
             ": dskip: expected as many lanes as inputs");
  detail::check_optional(op, "dskip", ctx, args.dskip, {s.channels, s.lanes}, state);
  detail::check_optional(op, "dstate_in", ctx, args.dstate_in, states, state);
  LRNN_DISPATCH(lane_scan_backward, ctx, args);
}

void lane_scan_step(Context& ctx, const LaneScanStep& args) {
  constexpr const char* op = "lane_scan_step";
  const LaneScanSizes s = check_sizes(op, args.a, args.W, args.v);
  detail::check_one_token(op, "v", args.v);
  check_parameters(op, ctx, args, s);
  detail::check_operand(op, "y", ctx, args.y, {s.batch, 1, s.outputs}, args.v.dtype());
  detail::check_operand(op, "state", ctx, args.state, {s.batch, 2, s.lanes, s.substates},
                        accumulate_dtype(args.v.dtype()));
  LRNN_DISPATCH(lane_scan_step, ctx, args);
}

void detail::lane_scan_step_by_parts(Context& ctx, const LaneScanStep& a) {
  lane_scan_forward(ctx, {.a = a.a,
                          .a_low = a.a_low,
                          .W = a.W,
                          .skip = a.skip,
                          .v = a.v,
                          .state_in = a.state,
                          .y = a.y,
                          .state_out = a.state});
  if (a.activation != Activation::Identity)
    activation_forward(ctx, {.kind = a.activation, .x = a.y, .y = a.y, .twice = a.twice});
}

}  // namespace lrnn
