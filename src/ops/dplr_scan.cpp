#include "ops/dplr_scan.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

using detail::DplrScanSizes;

// Operands that all passes share.
template <class Args>
DplrScanSizes check_parameters(const char* op, const Context& ctx, const Args& args) {
  detail::check_rank(op, "w", args.w, 4);
  detail::check_rank(op, "C", args.C, 4);
  detail::check_rank(op, "u", args.u, 3);
  const DplrScanSizes s(args.w, args.C, args.u);
  LRNN_CHECK(args.u.numel() > 0 && args.w.numel() > 0 && s.channels > 0, ShapeError, op,
             ": u: expected at least one token, head, state, rank and channel, got u ",
             args.u.shape(), ", w ", args.w.shape(), ", C ", args.C.shape());
  const DType state = accumulate_dtype(args.u.dtype());
  const Shape plane = {2, s.heads, s.states};
  const Shape planes = {s.rank, 2, s.heads, s.states};
  detail::check_operand(op, "e", ctx, args.e, plane, state);
  detail::check_operand(op, "w", ctx, args.w, planes, state);
  detail::check_operand(op, "k", ctx, args.k, planes, state);
  detail::check_operand(op, "b", ctx, args.b, plane, state);
  detail::check_operand(op, "C", ctx, args.C, {s.channels, s.heads, s.states, 2}, state);
  detail::check_optional(op, "D", ctx, args.D, {s.channels, s.heads}, state);
  detail::check_operand(op, "u", ctx, args.u, args.u.shape(), args.u.dtype());
  return s;
}
// Those that forward and backward share.
template <class Args>
DplrScanSizes check_shared(const char* op, const Context& ctx, const Args& args) {
  const DplrScanSizes s = check_parameters(op, ctx, args);
  detail::check_lengths_operand(op, ctx, args.lengths, s.batch);
  return s;
}

}  // namespace

void dplr_scan_forward(Context& ctx, const DplrScanForward& args) {
  constexpr const char* op = "dplr_scan_forward";
  const DplrScanSizes s = check_shared(op, ctx, args);
  const DType state = accumulate_dtype(args.u.dtype());
  const Shape states = {s.batch, 2, s.heads, s.states};
  detail::check_optional(op, "e_low", ctx, args.e_low, args.e.shape(), state);
  detail::check_optional(op, "state_in", ctx, args.state_in, states, state);
  detail::check_operand(op, "y", ctx, args.y, {s.batch, s.seqlen, s.channels * s.heads},
                        args.u.dtype());
  detail::check_optional(op, "state_out", ctx, args.state_out, states, state);
  detail::check_optional(op, "chunk_states", ctx, args.chunk_states,
                         {s.batch, s.chunks, 2, s.heads, s.states}, state);
  LRNN_DISPATCH(dplr_scan_forward, ctx, args);
}

void dplr_scan_backward(Context& ctx, const DplrScanBackward& args) {
  constexpr const char* op = "dplr_scan_backward";
  const DplrScanSizes s = check_shared(op, ctx, args);
  const DType state = accumulate_dtype(args.u.dtype());
  const Shape states = {s.batch, 2, s.heads, s.states};
  detail::check_operand(op, "dy", ctx, args.dy, {s.batch, s.seqlen, s.channels * s.heads},
                        args.u.dtype());
  detail::check_operand(op, "chunk_states", ctx, args.chunk_states,
                        {s.batch, s.chunks, 2, s.heads, s.states}, state);
  detail::check_optional(op, "dstate_out", ctx, args.dstate_out, states, state);
  detail::check_operand(op, "du", ctx, args.du, args.u.shape(), args.u.dtype());
  detail::check_optional(op, "de", ctx, args.de, args.e.shape(), state);
  detail::check_optional(op, "dw", ctx, args.dw, args.w.shape(), state);
  detail::check_optional(op, "dk", ctx, args.dk, args.k.shape(), state);
  detail::check_optional(op, "db", ctx, args.db, args.b.shape(), state);
  detail::check_optional(op, "dC", ctx, args.dC, args.C.shape(), state);
  detail::check_optional(op, "dD", ctx, args.dD, {s.channels, s.heads}, state);
  detail::check_optional(op, "dstate_in", ctx, args.dstate_in, states, state);
  LRNN_DISPATCH(dplr_scan_backward, ctx, args);
}

void dplr_scan_step(Context& ctx, const DplrScanStep& args) {
  constexpr const char* op = "dplr_scan_step";
  const DplrScanSizes s = check_parameters(op, ctx, args);
  detail::check_one_token(op, "u", args.u);
  detail::check_operand(op, "y", ctx, args.y, {s.batch, 1, s.channels * s.heads}, args.u.dtype());
  detail::check_operand(op, "state", ctx, args.state, {s.batch, 2, s.heads, s.states},
                        accumulate_dtype(args.u.dtype()));
  LRNN_DISPATCH(dplr_scan_step, ctx, args);
}

void detail::dplr_scan_step_by_parts(Context& ctx, const DplrScanStep& a) {
  dplr_scan_forward(ctx, {.e = a.e,
                          .w = a.w,
                          .k = a.k,
                          .b = a.b,
                          .C = a.C,
                          .D = a.D,
                          .u = a.u,
                          .state_in = a.state,
                          .y = a.y,
                          .state_out = a.state});
  if (a.activation != Activation::Identity)
    activation_forward(ctx, {.kind = a.activation, .x = a.y, .y = a.y, .twice = a.twice});
}

}  // namespace lrnn
