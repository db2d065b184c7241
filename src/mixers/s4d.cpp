#include "lrnn/mixers/s4d.hpp"

#include "lrnn/ops/elementwise.hpp"

#include "mixers/diagonal_recurrence.hpp"
#include "mixers/lane_recurrence.hpp"
#include "mixers/s4_common.hpp"

namespace lrnn {

using detail::LaneState;

struct S4d::Saved final : MixerSaved {
  TensorView x;      // [B, L, H] input, zero at padding
  Tensor x_storage;  // owner of x, if there are lengths
  Tensor s;          // [B, L, channels H] output of the state-space models
  Tensor chunk_states;
  detail::LaneRecurrence recurrence;
};

S4dConfig S4d::resolve(S4dConfig config, const MixerBuild& build) {
  if (!config.disc) config.disc = S4dDiscretization::Zoh;
  detail::resolve_state_space("S4D", config, build);
  return config;
}

S4d::S4d(const S4dConfig& config, const MixerBuild& build, const ParameterScope& scope)
    : Mixer(build.d_model),
      config_(config),
      p_(std::make_unique<detail::StateSpaceParameters>(
          detail::add_state_space_parameters("S4D", config, build.d_model, scope))),
      head_(std::make_unique<detail::S4Head>(config, build.d_model, scope)) {}

S4d::~S4d() = default;

std::unique_ptr<MixerState> S4d::make_state(Context& ctx, std::int64_t batch, std::int64_t,
                                            DType dtype) const {
  auto state = std::make_unique<LaneState>();
  state->lrnn_state =
      ctx.zeros({batch, 2, d_model(), *config_.d_state / 2}, accumulate_dtype(dtype));
  detail::tabulate_recurrence(ctx, recurrence(), state->tables);
  return state;
}

detail::LaneRecurrenceParameters S4d::recurrence() const {
  const std::int64_t states = *config_.d_state / 2;
  return {
      .lanes = {.method = config_.disc == S4dDiscretization::Bilinear ? Discretization::Bilinear
                                                                      : Discretization::Zoh,
                .lanes = d_model() * states,
                .A_re = {.value = p_->A_real->value,
                         .transform = config_.real_transform,
                         .negate = true},
                .A_im = {.value = p_->A_imag->value,
                         .transform = config_.imag_transform,
                         .negate = true},
                .dt = {.value = p_->inv_dt->value,
                       .transform = config_.dt_transform,
                       .of_sinh = config_.dt_fast}},
      .factors = {
          .scale = 2.0, .B = p_->B->value.reshape({*config_.n_ssm, states, 2}), .C = p_->C->value}};
}

std::unique_ptr<MixerSaved> S4d::do_forward(Context& ctx, const MixerForward& args,
                                            bool keep_for_backward) const {
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t seqlen = args.x.dim(1);
  const DType dtype = args.x.dtype();
  if (args.state_out != nullptr)
    detail::tabulate_recurrence(ctx, recurrence(), state_as<LaneState>(*args.state_out).tables);
  auto saved = std::make_unique<Saved>();
  saved->x = detail::without_padding(ctx, args.x, args.lengths, saved->x_storage);
  saved->recurrence = detail::make_lane_recurrence(ctx, recurrence());
  saved->s = ctx.empty({batch, seqlen, config_.channels * d_model()}, dtype);
  if (keep_for_backward)
    saved->chunk_states =
        ctx.empty({batch, lane_scan_chunks(seqlen), 2, d_model(), *config_.d_state / 2},
                  accumulate_dtype(dtype));
  lane_scan_forward(ctx, {.a = saved->recurrence.a,
                          .a_low = saved->recurrence.a_low,
                          .W = saved->recurrence.W,
                          .skip = p_->D->value,
                          .v = saved->x,
                          .lengths = args.lengths,
                          .state_in = LaneState::of(args.state_in),
                          .y = saved->s,
                          .state_out = LaneState::of(args.state_out),
                          .chunk_states = saved->chunk_states});
  head_->forward(ctx, saved->x, saved->s, args.y);
  if (!keep_for_backward) return nullptr;
  return saved;
}

void S4d::do_backward(Context& ctx, MixerSaved& base, const MixerBackward& args) const {
  const auto& saved = saved_as<Saved>(base);
  Tensor ds = ctx.empty(saved.s.shape(), saved.s.dtype());
  Tensor dgate;
  if (head_->uses_input()) dgate = ctx.empty(args.dx.shape(), args.dx.dtype());
  head_->backward(ctx, saved.x, saved.s, args.dy, ds, dgate);
  detail::lane_recurrence_backward(
      ctx, saved.recurrence, recurrence(),
      {.a = {},
       .W = {},
       .skip = p_->D->value,
       .v = saved.x,
       .lengths = saved.lengths,
       .dy = ds,
       .chunk_states = saved.chunk_states,
       .dstate_out = LaneState::of(args.dstate_out),
       .dv = args.dx,
       .dskip = p_->D->grad,
       .dstate_in = LaneState::of(args.dstate_in)},
      {.A_re = p_->A_real->grad,
       .A_im = p_->A_imag->grad,
       .dt = p_->inv_dt->grad,
       .B = p_->B->grad.reshape({*config_.n_ssm, *config_.d_state / 2, 2}),
       .C = p_->C->grad});
  if (dgate) add_to(ctx, {.src = dgate, .dst = args.dx});
}

void S4d::do_step(Context& ctx, const MixerStep& args) const {
  auto& state = state_as<LaneState>(args.state);
  Tensor s = ctx.empty({args.x.dim(0), 1, config_.channels * d_model()}, args.x.dtype());
  lane_scan_step(ctx, {.a = state.tables.a,
                       .a_low = state.tables.a_low,
                       .W = state.tables.W,
                       .skip = p_->D->value,
                       .v = args.x,
                       .y = s,
                       .state = state.lrnn_state,
                       .activation = head_->step_activation(),
                       .twice = true});
  head_->step(ctx, args.x, s, args.y);
}

}  // namespace lrnn
