#include "lrnn/ops/selective_scan.hpp"

#include "lrnn/ops/linear.hpp"

#include "ops/dispatch.hpp"
#include "ops/selective_scan_parts.hpp"

namespace lrnn {
namespace {

// Checks what all passes read and returns the shape of a state.
Shape check_inputs(const char* op, const Context& ctx, const SelectiveScanInputs& in,
                   bool has_dt = true) {
  detail::check_rank(op, "u", in.u, 3);
  detail::check_rank(op, "A_log", in.A_log, 2);
  const Shape& us = in.u.shape();
  const DType dtype = in.u.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  const std::int64_t dstate = in.A_log.dim(1);
  const Shape shared = {us[0], us[1], dstate};
  const Shape state = {us[0], us[2], dstate};
  detail::check_rows(op, "u", ctx, in.u, us, dtype);
  if (has_dt) detail::check_rows(op, "dt", ctx, in.dt, us, dtype);
  detail::check_operand(op, "dt_bias", ctx, in.dt_bias, {us[2]}, accumulate);
  detail::check_operand(op, "A_log", ctx, in.A_log, {us[2], dstate}, accumulate);
  detail::check_rows(op, "B", ctx, in.B, shared, dtype);
  detail::check_rows(op, "C", ctx, in.C, shared, dtype);
  detail::check_optional(op, "D", ctx, in.D, {us[2]}, accumulate);
  if (in.z) detail::check_rows(op, "z", ctx, in.z, us, dtype);
  detail::check_optional(op, "integration_timesteps", ctx, in.integration_timesteps, {us[0], us[1]},
                         accumulate);
  LRNN_CHECK(static_cast<bool>(in.integration_timesteps) == static_cast<bool>(in.dtA_bias),
             InvalidArgument, op, ": integration_timesteps and dtA_bias belong together");
  detail::check_optional(op, "dtA_bias", ctx, in.dtA_bias, {us[2]}, accumulate);
  detail::check_lengths_operand(op, ctx, in.lengths, us[0]);
  detail::check_optional(op, "state_in", ctx, in.state_in, state, accumulate);
  return state;
}

Shape chunk_shape(const SelectiveScanInputs& in, const Shape& state) {
  return {state[0], selective_scan_chunks(in.u.dim(1)), state[1], state[2]};
}

}  // namespace

void detail::selective_scan_step_after_projection(Context& ctx, SelectiveScanStep a) {
  Tensor dt = ctx.empty(a.in.u.shape(), a.in.u.dtype());
  linear_forward(ctx, {.x = a.dt_low, .weight = a.dt_weight, .y = dt, .stable_weight = true});
  a.in.dt = dt;
  a.dt_low = {};
  a.dt_weight = {};
  selective_scan_step(ctx, a);
}

void selective_scan_forward(Context& ctx, const SelectiveScanForward& a) {
  constexpr const char* op = "selective_scan_forward";
  const Shape state = check_inputs(op, ctx, a.in);
  const DType accumulate = accumulate_dtype(a.in.u.dtype());
  detail::check_rows(op, "y", ctx, a.y, a.in.u.shape(), a.in.u.dtype());
  detail::check_optional(op, "state_out", ctx, a.state_out, state, accumulate);
  detail::check_optional(op, "chunk_states", ctx, a.chunk_states, chunk_shape(a.in, state),
                         accumulate);
  if (a.y.numel() == 0) return;
  LRNN_DISPATCH(selective_scan_forward, ctx, a);
}

void selective_scan_backward(Context& ctx, const SelectiveScanBackward& a) {
  constexpr const char* op = "selective_scan_backward";
  const Shape state = check_inputs(op, ctx, a.in);
  const Shape& us = a.in.u.shape();
  const DType dtype = a.in.u.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  const Shape shared = {us[0], us[1], state[2]};
  detail::check_rows(op, "dy", ctx, a.dy, us, dtype);
  detail::check_operand(op, "chunk_states", ctx, a.chunk_states, chunk_shape(a.in, state),
                        accumulate);
  detail::check_optional(op, "dstate_out", ctx, a.dstate_out, state, accumulate);
  detail::check_rows(op, "du", ctx, a.du, us, dtype);
  detail::check_rows(op, "ddt", ctx, a.ddt, us, dtype);
  detail::check_rows(op, "dB", ctx, a.dB, shared, dtype);
  detail::check_rows(op, "dC", ctx, a.dC, shared, dtype);
  LRNN_CHECK(static_cast<bool>(a.dz) == static_cast<bool>(a.in.z), InvalidArgument, op,
             ": dz and z belong together");
  if (a.dz) detail::check_rows(op, "dz", ctx, a.dz, us, dtype);
  detail::check_operand(op, "ddt_bias", ctx, a.ddt_bias, {us[2]}, accumulate);
  detail::check_operand(op, "dA_log", ctx, a.dA_log, {us[2], state[2]}, accumulate);
  detail::check_optional(op, "dD", ctx, a.dD, {us[2]}, accumulate);
  detail::check_optional(op, "ddtA_bias", ctx, a.ddtA_bias, {us[2]}, accumulate);
  detail::check_optional(op, "dintegration_timesteps", ctx, a.dintegration_timesteps,
                         {us[0], us[1]}, accumulate);
  detail::check_optional(op, "dstate_in", ctx, a.dstate_in, state, accumulate);
  if (a.dy.numel() == 0) return;
  LRNN_DISPATCH(selective_scan_backward, ctx, a);
}

void selective_scan_step(Context& ctx, const SelectiveScanStep& a) {
  constexpr const char* op = "selective_scan_step";
  LRNN_CHECK(static_cast<bool>(a.dt_low) != static_cast<bool>(a.in.dt), InvalidArgument, op,
             ": expected either dt or dt_low");
  if (a.dt_low) {
    detail::check_rank(op, "u", a.in.u, 3);
    detail::check_rank(op, "dt_low", a.dt_low, 3);
    const std::int64_t rank = a.dt_low.dim(2);
    const DType dtype = a.in.u.dtype();
    detail::check_rows(op, "dt_low", ctx, a.dt_low, {a.in.u.dim(0), a.in.u.dim(1), rank}, dtype);
    if (ctx.device().is_cpu()) return detail::selective_scan_step_after_projection(ctx, a);
    detail::check_operand(op, "dt_weight", ctx, a.dt_weight, {a.in.u.dim(2), rank}, dtype);
  }
  const Shape state = check_inputs(op, ctx, a.in, !a.dt_low);
  detail::check_one_token(op, "u", a.in.u);
  detail::check_inputs_of_step(op, a.in);
  detail::check_rows(op, "y", ctx, a.y, a.in.u.shape(), a.in.u.dtype());
  detail::check_operand(op, "state", ctx, a.state, state, accumulate_dtype(a.in.u.dtype()));
  if (a.y.numel() == 0) return;
  if (ctx.device().is_cpu()) {
    SelectiveScanForward forward{.in = a.in, .y = a.y, .state_out = a.state};
    forward.in.state_in = a.state;
    return cpu::selective_scan_forward(ctx, forward);
  }
#if LRNN_WITH_CUDA
  detail::make_current(ctx);
  cuda::selective_scan_step(ctx, a);
#else
  detail::throw_built_without_cuda(op);
#endif
}

}  // namespace lrnn
