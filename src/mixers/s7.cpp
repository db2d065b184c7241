#include "lrnn/mixers/s7.hpp"

#include "lrnn/ops/activation.hpp"
#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/gated_activation.hpp"
#include "lrnn/ops/s7_gated_step.hpp"
#include "lrnn/ops/s7_scan.hpp"

namespace lrnn {

S7Config S7::resolve(S7Config config, const MixerBuild& build) {
  if (!config.d_state) config.d_state = build.d_state;
  LRNN_CHECK(*config.d_state >= 1, ConfigError,
             "mixer_kwargs.S7.d_state: expected at least 1, got ", *config.d_state);
  LRNN_CHECK(config.J >= 1 && *config.d_state % config.J == 0, ConfigError,
             "mixer_kwargs.S7.J: expected a divisor of d_state = ", *config.d_state, ", got ",
             config.J);
  return config;
}

S7::S7(const S7Config& config, const MixerBuild& build, const ParameterScope& scope)
    : Mixer(build.d_model),
      dstate_(*config.d_state),
      in_proj_(scope / "in_proj", build.d_model, build.d_model),
      // The real part of every HiPPO-DPLR eigenvalue.
      base_params_(scope.add("base_params", {dstate_}, init::constant(-0.5),
                             {.weight_decay = false, .keep_float32 = true})),
      x_proj_(scope.add("x_proj.weight",
                        {2 * build.d_model * dstate_ + build.d_model + 2 * dstate_, build.d_model},
                        init::normal(0.02))),
      gate_proj_(scope / "gate_proj", build.d_model, build.d_model) {}

std::unique_ptr<MixerState> S7::make_state(Context& ctx, std::int64_t batch, std::int64_t,
                                           DType dtype) const {
  auto state = std::make_unique<State>();
  state->lrnn_state = ctx.zeros({batch, dstate_}, accumulate_dtype(dtype));
  return state;
}

void S7::gate(Context& ctx, TensorView y, TensorView hid, MutableTensorView pre_gate,
              MutableTensorView out) const {
  Tensor activated = ctx.empty(y.shape(), y.dtype());
  activation_forward(ctx, {.kind = Activation::Gelu, .x = y, .y = activated});
  gate_proj_.forward(ctx, activated, pre_gate);
  gated_activation_forward(ctx,
                           {.kind = Activation::Sigmoid, .value = y, .gate = pre_gate, .y = out});
  add_to(ctx, {.src = hid, .dst = out});
}

std::unique_ptr<MixerSaved> S7::do_forward(Context& ctx, const MixerForward& args,
                                           bool keep_for_backward) const {
  const Shape& shape = args.x.shape();
  const DType dtype = args.x.dtype();
  auto saved = std::make_unique<Saved>();
  saved->x = ctx.empty(shape, dtype);
  saved->y = ctx.empty(shape, dtype);
  saved->pre_gate = ctx.empty(shape, dtype);
  if (keep_for_backward) {
    const Shape states = {shape[0], shape[1], dstate_};
    saved->A = ctx.empty(states, accumulate_dtype(dtype));
    saved->s = ctx.empty(states, accumulate_dtype(dtype));
    saved->hid = args.x;
    if (args.state_in != nullptr) saved->state_in = state_as<State>(*args.state_in).lrnn_state;
  }
  in_proj_.forward(ctx, args.x, saved->x);
  s7_scan_forward(
      ctx,
      {.x = saved->x,
       .weight = x_proj_.value,
       .base = base_params_.value,
       .lengths = args.lengths,
       .state_in = args.state_in != nullptr ? TensorView(state_as<State>(*args.state_in).lrnn_state)
                                            : TensorView(),
       .y = saved->y,
       .state_out = args.state_out != nullptr
                        ? MutableTensorView(state_as<State>(*args.state_out).lrnn_state)
                        : MutableTensorView(),
       .A = saved->A,
       .s = saved->s});
  gate(ctx, saved->y, args.x, saved->pre_gate, args.y);
  if (!keep_for_backward) return nullptr;
  return saved;
}

void S7::do_backward(Context& ctx, MixerSaved& base, const MixerBackward& args) const {
  const auto& saved = saved_as<Saved>(base);
  const Shape& shape = args.dy.shape();
  const DType dtype = args.dy.dtype();
  Tensor dy = ctx.empty(shape, dtype);
  Tensor dpre_gate = ctx.empty(shape, dtype);
  gated_activation_backward(ctx, {.kind = Activation::Sigmoid,
                                  .dy = args.dy,
                                  .value = saved.y,
                                  .gate = saved.pre_gate,
                                  .dvalue = dy,
                                  .dgate = dpre_gate});
  {
    Tensor activated = ctx.empty(shape, dtype);
    activation_forward(ctx, {.kind = Activation::Gelu, .x = saved.y, .y = activated});
    Tensor dactivated = ctx.empty(shape, dtype);
    gate_proj_.backward(ctx, dpre_gate, activated, dactivated);
    activation_backward(
        ctx, {.kind = Activation::Gelu, .dy = dactivated, .x = saved.y, .dx = dactivated});
    add_to(ctx, {.src = dactivated, .dst = dy});
  }
  Tensor dx = ctx.empty(shape, dtype);
  s7_scan_backward(
      ctx, {.dy = dy,
            .x = saved.x,
            .weight = x_proj_.value,
            .A = saved.A,
            .s = saved.s,
            .lengths = saved.lengths,
            .state_in = saved.state_in,
            .dstate_out = args.dstate_out != nullptr
                              ? TensorView(state_as<State>(*args.dstate_out).lrnn_state)
                              : TensorView(),
            .dx = dx,
            .dweight = x_proj_.grad,
            .dbase = base_params_.grad,
            .dstate_in = args.dstate_in != nullptr
                             ? MutableTensorView(state_as<State>(*args.dstate_in).lrnn_state)
                             : MutableTensorView()});
  in_proj_.backward(ctx, dx, saved.hid, args.dx);
  add_to(ctx, {.src = args.dy, .dst = args.dx});
}

void S7::do_step(Context& ctx, const MixerStep& args) const {
  Tensor x = ctx.empty(args.x.shape(), args.x.dtype());
  in_proj_.forward(ctx, args.x, x);
  s7_gated_step(ctx, {.x = x,
                      .weight = x_proj_.value,
                      .base = base_params_.value,
                      .gate = gate_proj_.weight_value(),
                      .hid = args.x,
                      .y = args.y,
                      .state = state_as<State>(args.state).lrnn_state});
}

}  // namespace lrnn
