#include "lrnn/ops/diagonal_scan.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

struct Sizes {
  std::int64_t batch;
  std::int64_t seqlen;
  std::int64_t lanes;
  DType dtype;
  DType state;
};

Sizes check_drive(const char* op, const Context& ctx, const TensorView& v) {
  LRNN_CHECK(v, ShapeError, op, ": v is required");
  LRNN_CHECK(v.rank() == 3 || (v.rank() == 4 && v.dim(2) == 2), ShapeError, op,
             ": v: expected [B, L, N] or [B, L, 2, N], got ", v.shape());
  detail::check_operand(op, "v", ctx, v, v.shape(), v.dtype());
  LRNN_CHECK(v.numel() > 0, ShapeError, op, ": v: expected at least one token and lane, got ",
             v.shape());
  return {v.dim(0), v.dim(1), v.dim(-1), v.dtype(), accumulate_dtype(v.dtype())};
}

void check_multiplier(const char* op, const Context& ctx, const ScanMultiplier& m, const Sizes& s) {
  LRNN_CHECK(static_cast<bool>(m.a) != static_cast<bool>(m.z), ShapeError, op,
             ": expected either a or z");
  LRNN_CHECK(static_cast<bool>(m.z) == static_cast<bool>(m.tau), ShapeError, op,
             ": z and tau belong together");
  LRNN_CHECK(!m.a_low || m.a, ShapeError, op, ": a_low without a");
  detail::check_optional(op, "a", ctx, m.a, {2, s.lanes}, s.state);
  detail::check_optional(op, "a_low", ctx, m.a_low, {2, s.lanes}, s.state);
  detail::check_optional(op, "z", ctx, m.z, {4, s.lanes}, s.state);
  detail::check_optional(op, "tau", ctx, m.tau, {s.batch, s.seqlen}, s.state);
}

}  // namespace

void diagonal_scan_forward(Context& ctx, const DiagonalScanForward& args) {
  constexpr const char* op = "diagonal_scan_forward";
  const Sizes s = check_drive(op, ctx, args.v);
  check_multiplier(op, ctx, args.multiplier, s);
  detail::check_optional(op, "gamma", ctx, args.gamma, {2, s.lanes}, s.state);
  detail::check_lengths_operand(op, ctx, args.lengths, s.batch);
  detail::check_optional(op, "state_in", ctx, args.state_in, {s.batch, 2, s.lanes}, s.state);
  detail::check_operand(op, "x", ctx, args.x, {s.batch, s.seqlen, 2, s.lanes}, s.dtype);
  detail::check_optional(op, "state_out", ctx, args.state_out, {s.batch, 2, s.lanes}, s.state);
  detail::check_optional(op, "chunk_states", ctx, args.chunk_states,
                         {s.batch, diagonal_scan_chunks(s.seqlen), 2, s.lanes}, s.state);
  LRNN_DISPATCH(diagonal_scan_forward, ctx, args);
}

void diagonal_scan_backward(Context& ctx, const DiagonalScanBackward& args) {
  constexpr const char* op = "diagonal_scan_backward";
  const Sizes s = check_drive(op, ctx, args.v);
  check_multiplier(op, ctx, args.multiplier, s);
  const Shape states = {s.batch, s.seqlen, 2, s.lanes};
  detail::check_optional(op, "gamma", ctx, args.gamma, {2, s.lanes}, s.state);
  detail::check_operand(op, "dx", ctx, args.dx, states, s.dtype);
  detail::check_operand(op, "chunk_states", ctx, args.chunk_states,
                        {s.batch, diagonal_scan_chunks(s.seqlen), 2, s.lanes}, s.state);
  detail::check_lengths_operand(op, ctx, args.lengths, s.batch);
  detail::check_optional(op, "dstate_out", ctx, args.dstate_out, {s.batch, 2, s.lanes}, s.state);
  detail::check_operand(op, "dv", ctx, args.dv, args.v.shape(), s.dtype);
  detail::check_optional(op, "x", ctx, args.x, states, s.dtype);
  detail::check_optional(op, "da", ctx, args.da, {2, s.lanes}, s.state);
  detail::check_optional(op, "dlog_a", ctx, args.dlog_a, {2, s.lanes}, s.state);
  detail::check_optional(op, "dz", ctx, args.dz, {2, s.lanes}, s.state);
  detail::check_optional(op, "dgamma", ctx, args.dgamma, {2, s.lanes}, s.state);
  detail::check_optional(op, "dtau", ctx, args.dtau, {s.batch, s.seqlen}, s.state);
  detail::check_optional(op, "dstate_in", ctx, args.dstate_in, {s.batch, 2, s.lanes}, s.state);
  const bool event = static_cast<bool>(args.multiplier.z);
  LRNN_CHECK(!event || (!args.da && !args.dlog_a), ShapeError, op,
             ": da and dlog_a belong to the fixed form");
  LRNN_CHECK(event || (!args.dz && !args.dtau), ShapeError, op,
             ": dz and dtau belong to the event form");
  LRNN_DISPATCH(diagonal_scan_backward, ctx, args);
}

}  // namespace lrnn
