#include "lrnn/mixers/mamba.hpp"

#include <algorithm>
#include <cmath>

#include "lrnn/ops/causal_conv1d.hpp"
#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/projected_conv1d.hpp"
#include "lrnn/ops/projected_selective_scan.hpp"

namespace lrnn {
namespace {

constexpr ParameterOptions kIslandWithoutDecay = {.weight_decay = false, .keep_float32 = true};

std::int64_t inner_width(const MambaConfig& config, const MixerBuild& build) {
  return static_cast<std::int64_t>(config.expand * static_cast<double>(build.d_model));
}

// log(n + 1): A = -1, -2, ..., -N in every channel (S4D-real).
void s4d_real(std::span<double> values, const Shape& shape, Rng&) {
  const auto dstate = static_cast<std::size_t>(shape[1]);
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = std::log(static_cast<double>(i % dstate + 1));
}

// softplus^-1 of a step size drawn log-uniformly from [dt_min, dt_max].
Initializer dt_bias_init(const MambaConfig& c) {
  return [c](std::span<double> values, const Shape&, Rng& rng) {
    for (double& v : values) {
      const double dt =
          std::max(std::exp(rng.uniform(std::log(c.dt_min), std::log(c.dt_max))), c.dt_init_floor);
      v = dt + std::log(-std::expm1(-dt));
    }
  };
}

Initializer dt_weight_init(const MambaConfig& c) {
  const double bound = c.dt_scale / std::sqrt(static_cast<double>(*c.dt_rank));
  return c.dt_init == MambaDtInit::Constant ? init::constant(bound) : init::uniform(bound);
}

Parameter* add_conv_bias(const MambaConfig& c, std::int64_t inner, const ParameterScope& scope) {
  if (!c.conv_bias) return nullptr;
  return &scope.add("conv1d.bias", {inner},
                    init::uniform(1.0 / std::sqrt(static_cast<double>(c.d_conv))),
                    {.weight_decay = false});
}

Parameter& add_dtA(const MambaConfig& c, std::int64_t inner, const ParameterScope& scope) {
  // The weight is read by no pass; it exists so that checkpoints of lrnnx keep their tensors.
  scope.add("dtA_proj.weight", {inner, *c.dt_rank},
            init::uniform(1.0 / std::sqrt(static_cast<double>(*c.dt_rank))),
            {.weight_decay = false, .optional_on_load = true});
  ParameterOptions options = kIslandWithoutDecay;
  options.optional_on_load = true;
  return scope.add("dtA_proj.bias", {inner}, init::constant(0.0), options);
}

}  // namespace

MambaConfig Mamba::resolve(MambaConfig config, const MixerBuild& build) {
  if (!config.d_state) config.d_state = build.d_state;
  if (!config.dt_rank) config.dt_rank = (build.d_model + 15) / 16;
  const auto positive = [](const char* option, std::int64_t value) {
    LRNN_CHECK(value >= 1, ConfigError, "mixer_kwargs.Mamba.", option,
               ": expected at least 1, got ", value);
  };
  positive("d_state", *config.d_state);
  positive("d_conv", config.d_conv);
  positive("dt_rank", *config.dt_rank);
  constexpr double kMaxExpand = 1024;  // keeps the width an integer of 64 bits
  LRNN_CHECK(config.expand <= kMaxExpand, ConfigError,
             "mixer_kwargs.Mamba.expand: expected at most ", kMaxExpand, ", got ", config.expand);
  LRNN_CHECK(config.expand > 0 && inner_width(config, build) >= 1, ConfigError,
             "mixer_kwargs.Mamba.expand: expected expand * d_model of at least 1, got ",
             config.expand, " * ", build.d_model);
  LRNN_CHECK(config.dt_min > 0 && config.dt_max >= config.dt_min, ConfigError,
             "mixer_kwargs.Mamba.dt_min: expected 0 < dt_min <= dt_max, got ", config.dt_min,
             " and ", config.dt_max);
  LRNN_CHECK(config.dt_init_floor > 0, ConfigError,
             "mixer_kwargs.Mamba.dt_init_floor: expected a positive number, got ",
             config.dt_init_floor);
  return config;
}

Mamba::Mamba(const MambaConfig& config, const MixerBuild& build, const ParameterScope& scope)
    : Mixer(build.d_model),
      discretization_(config.discretization),
      inner_(inner_width(config, build)),
      dstate_(*config.d_state),
      dt_rank_(*config.dt_rank),
      d_conv_(config.d_conv),
      in_proj_(scope / "in_proj", build.d_model, 2 * inner_, {.bias = config.bias}),
      conv_weight_(scope.add("conv1d.weight", {inner_, 1, d_conv_},
                             init::uniform(1.0 / std::sqrt(static_cast<double>(config.d_conv))))),
      conv_bias_(add_conv_bias(config, inner_, scope)),
      x_proj_(scope / "x_proj", inner_, dt_rank_ + 2 * dstate_),
      dt_weight_(scope.add("dt_proj.weight", {inner_, dt_rank_}, dt_weight_init(config),
                           {.matrix = true})),
      dt_bias_(scope.add("dt_proj.bias", {inner_}, dt_bias_init(config), kIslandWithoutDecay)),
      dtA_bias_(add_dtA(config, inner_, scope)),
      A_log_(scope.add("A_log", {inner_, dstate_}, s4d_real, kIslandWithoutDecay)),
      D_(scope.add("D", {inner_}, init::constant(1.0), kIslandWithoutDecay)),
      out_proj_(scope / "out_proj", inner_, build.d_model,
                {.bias = config.bias,
                 .weight_init = init::uniform(build.out_proj_scale /
                                              std::sqrt(static_cast<double>(inner_)))}) {}

std::unique_ptr<MixerState> Mamba::make_state(Context& ctx, std::int64_t batch, std::int64_t,
                                              DType dtype) const {
  auto state = std::make_unique<State>();
  state->conv_state = ctx.zeros({batch, inner_, d_conv_}, accumulate_dtype(dtype));
  state->lrnn_state = ctx.zeros({batch, inner_, dstate_}, accumulate_dtype(dtype));
  return state;
}

TensorView Mamba::conv_weight() const {
  return TensorView(conv_weight_.value).reshape({inner_, d_conv_});
}
TensorView Mamba::conv_bias() const {
  return conv_bias_ != nullptr ? TensorView(conv_bias_->value) : TensorView();
}

void Mamba::convolve(Context& ctx, TensorView xz, TensorView lengths, const State* state_in,
                     MutableTensorView u, MutableTensorView state_out) const {
  causal_conv1d_forward(
      ctx, {.x = xz.slice(2, 0, inner_),
            .weight = conv_weight(),
            .bias = conv_bias(),
            .activation = Activation::Silu,
            .lengths = lengths,
            .state_in = state_in != nullptr ? TensorView(state_in->conv_state) : TensorView(),
            .y = u,
            .state_out = state_out});
}

SelectiveScanInputs Mamba::scan_inputs(TensorView u, TensorView dt, TensorView xz, TensorView x_dbl,
                                       TensorView tau) const {
  return {.discretization = discretization_,
          .u = u,
          .dt = dt,
          .dt_bias = dt_bias_.value,
          .A_log = A_log_.value,
          .B = x_dbl ? x_dbl.slice(2, dt_rank_, dstate_) : TensorView(),
          .C = x_dbl ? x_dbl.slice(2, dt_rank_ + dstate_, dstate_) : TensorView(),
          .D = D_.value,
          .z = xz.slice(2, inner_, inner_),
          .integration_timesteps = tau,
          .dtA_bias = tau ? TensorView(dtA_bias_.value) : TensorView()};
}

std::unique_ptr<MixerSaved> Mamba::do_forward(Context& ctx, const MixerForward& args,
                                              bool keep_for_backward) const {
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t seqlen = args.x.dim(1);
  const DType dtype = args.x.dtype();
  const State* const state_in =
      args.state_in != nullptr ? &state_as<State>(*args.state_in) : nullptr;
  State* const state_out = args.state_out != nullptr ? &state_as<State>(*args.state_out) : nullptr;
  auto saved = std::make_unique<Saved>();
  saved->xz = ctx.empty({batch, seqlen, 2 * inner_}, dtype);
  saved->x_dbl = ctx.empty({batch, seqlen, dt_rank_ + 2 * dstate_}, dtype);
  if (keep_for_backward)
    saved->chunk_states =
        ctx.empty({batch, selective_scan_chunks(seqlen), inner_, dstate_}, accumulate_dtype(dtype));
  Tensor u = ctx.empty({batch, seqlen, inner_}, dtype);
  Tensor dt = ctx.empty({batch, seqlen, inner_}, dtype);
  in_proj_.forward(ctx, args.x, saved->xz);
  convolve(ctx, saved->xz, args.lengths, state_in, u,
           state_out != nullptr ? MutableTensorView(state_out->conv_state) : MutableTensorView());
  x_proj_.forward(ctx, u, saved->x_dbl);
  linear_forward(
      ctx, {.x = saved->x_dbl.view().slice(2, 0, dt_rank_), .weight = dt_weight_.value, .y = dt});
  SelectiveScanInputs in = scan_inputs(u, dt, saved->xz, saved->x_dbl, args.integration_timesteps);
  in.lengths = args.lengths;
  if (state_in != nullptr) in.state_in = state_in->lrnn_state;
  saved->y = ctx.empty({batch, seqlen, inner_}, dtype);
  selective_scan_forward(
      ctx, {.in = in,
            .y = saved->y,
            .state_out = state_out != nullptr ? MutableTensorView(state_out->lrnn_state)
                                              : MutableTensorView(),
            .chunk_states = saved->chunk_states});
  out_proj_.forward(ctx, saved->y, args.y);
  if (!keep_for_backward) return nullptr;
  saved->x = args.x;
  saved->integration_timesteps = args.integration_timesteps;
  saved->state_in = state_in;
  return saved;
}

void Mamba::do_backward(Context& ctx, MixerSaved& base, const MixerBackward& args) const {
  auto& saved = saved_as<Saved>(base);
  const std::int64_t batch = args.dy.dim(0);
  const std::int64_t seqlen = args.dy.dim(1);
  const DType dtype = args.dy.dtype();
  const Shape inner = {batch, seqlen, inner_};
  const State* const dstate_out =
      args.dstate_out != nullptr ? &state_as<State>(*args.dstate_out) : nullptr;
  State* const dstate_in = args.dstate_in != nullptr ? &state_as<State>(*args.dstate_in) : nullptr;

  // First, so that y is gone before the rest is there.
  Tensor dy = ctx.empty(inner, dtype);
  out_proj_.backward(ctx, args.dy, saved.y, dy);
  saved.y = Tensor();
  Tensor dxz = ctx.empty(saved.xz.shape(), dtype);
  // The gradient of the convolution's input takes the place of its output, which it does not read.
  const MutableTensorView u = dxz.view().slice(2, 0, inner_);
  Tensor dt = ctx.empty(inner, dtype);
  convolve(ctx, saved.xz, saved.lengths, saved.state_in, u, {});
  linear_forward(
      ctx, {.x = saved.x_dbl.view().slice(2, 0, dt_rank_), .weight = dt_weight_.value, .y = dt});
  SelectiveScanInputs in = scan_inputs(u, dt, saved.xz, saved.x_dbl, saved.integration_timesteps);
  in.lengths = saved.lengths;
  if (saved.state_in != nullptr) in.state_in = saved.state_in->lrnn_state;

  Tensor dx_dbl = ctx.empty(saved.x_dbl.shape(), dtype);
  Tensor& du = dy;  // in the place of what the scan reads last there
  Tensor& ddt = dt;
  Tensor dtau;
  if (saved.integration_timesteps) dtau = ctx.empty({batch, seqlen}, accumulate_dtype(dtype));
  selective_scan_backward(
      ctx, {.in = in,
            .dy = dy,
            .chunk_states = saved.chunk_states,
            .dstate_out = dstate_out != nullptr ? TensorView(dstate_out->lrnn_state) : TensorView(),
            .du = du,
            .ddt = ddt,
            .dB = dx_dbl.view().slice(2, dt_rank_, dstate_),
            .dC = dx_dbl.view().slice(2, dt_rank_ + dstate_, dstate_),
            .dz = dxz.view().slice(2, inner_, inner_),
            .ddt_bias = dt_bias_.grad,
            .dA_log = A_log_.grad,
            .dD = D_.grad,
            .ddtA_bias = saved.integration_timesteps ? dtA_bias_.grad : MutableTensorView(),
            .dintegration_timesteps = dtau,
            .dstate_in = dstate_in != nullptr ? MutableTensorView(dstate_in->lrnn_state)
                                              : MutableTensorView()});
  if (dtau && args.dintegration_timesteps)
    add_to(ctx, {.src = dtau, .dst = args.dintegration_timesteps});
  linear_backward(ctx, {.dy = ddt,
                        .x = saved.x_dbl.view().slice(2, 0, dt_rank_),
                        .weight = dt_weight_.value,
                        .dx = dx_dbl.view().slice(2, 0, dt_rank_),
                        .dweight = dt_weight_.grad});
  x_proj_.backward(ctx, dx_dbl, u, du, true);
  causal_conv1d_backward(
      ctx, {.dy = du,
            .x = saved.xz.view().slice(2, 0, inner_),
            .weight = conv_weight(),
            .bias = conv_bias(),
            .activation = Activation::Silu,
            .lengths = saved.lengths,
            .state_in =
                saved.state_in != nullptr ? TensorView(saved.state_in->conv_state) : TensorView(),
            .dstate_out = dstate_out != nullptr ? TensorView(dstate_out->conv_state) : TensorView(),
            .dx = u,
            .dweight = conv_weight_.grad.reshape({inner_, d_conv_}),
            .dbias = conv_bias_ != nullptr ? conv_bias_->grad : MutableTensorView(),
            .dstate_in = dstate_in != nullptr ? MutableTensorView(dstate_in->conv_state)
                                              : MutableTensorView()});
  in_proj_.backward(ctx, dxz, saved.x, args.dx);
}

std::optional<MambaStackLayer> Mamba::stack_layer(MixerState& base) const {
  const bool plain = discretization_ == SelectiveDiscretization::Mamba && !in_proj_.bias_value() &&
                     !out_proj_.bias_value();
  if (!plain) return {};
  State& state = state_as<State>(base);
  return MambaStackLayer{.norm_weight = {},
                         .in_proj = in_proj_.weight_value(),
                         .conv_weight = conv_weight(),
                         .conv_bias = conv_bias(),
                         .x_proj = x_proj_.weight_value(),
                         .dt_weight = dt_weight_.value,
                         .dt_bias = dt_bias_.value,
                         .A_log = A_log_.value,
                         .D = D_.value,
                         .out_proj = out_proj_.weight_value(),
                         .conv_state = state.conv_state,
                         .lrnn_state = state.lrnn_state};
}

void Mamba::do_step(Context& ctx, const MixerStep& args) const {
  const std::int64_t batch = args.x.dim(0);
  const DType dtype = args.x.dtype();
  State& state = state_as<State>(args.state);
  Tensor uz = ctx.empty({batch, 1, 2 * inner_}, dtype);
  Tensor y = ctx.empty({batch, 1, inner_}, dtype);
  projected_conv1d_step(ctx, {.x = args.x.reshape({batch, d_model()}),
                              .projection = in_proj_.weight_value(),
                              .projection_bias = in_proj_.bias_value(),
                              .weight = conv_weight(),
                              .bias = conv_bias(),
                              .activation = Activation::Silu,
                              .y = uz.view().reshape({batch, 2 * inner_}),
                              .state = state.conv_state,
                              .norm = args.norm});
  const TensorView u = uz.view().slice(2, 0, inner_);
  projected_selective_scan_step(ctx, {.in = scan_inputs(u, {}, uz, {}, args.integration_timesteps),
                                      .projection = x_proj_.weight_value(),
                                      .dt_weight = dt_weight_.value,
                                      .y = y,
                                      .state = state.lrnn_state});
  out_proj_.forward(ctx, y, args.y);
}

}  // namespace lrnn
