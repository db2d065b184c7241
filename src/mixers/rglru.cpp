#include "lrnn/mixers/rglru.hpp"

#include <cmath>

#include "lrnn/ops/causal_conv1d.hpp"
#include "lrnn/ops/gated_activation.hpp"
#include "lrnn/ops/projected_conv1d.hpp"
#include "lrnn/ops/projected_rglru.hpp"

namespace lrnn {
namespace {

std::int64_t inner_width(const RglruConfig& config, const MixerBuild& build) {
  return static_cast<std::int64_t>(config.expand * static_cast<double>(build.d_model));
}

// logit(a), a uniform in the range.
Initializer a_log_init(const RglruConfig& c) {
  return [range = c.a_init_range](std::span<double> values, const Shape&, Rng& rng) {
    for (double& v : values) {
      const double a = rng.uniform(range[0], range[1]);
      v = std::log(a) - std::log1p(-a);
    }
  };
}

Initializer conv_init(const RglruConfig& c) {
  return init::uniform(1.0 / std::sqrt(static_cast<double>(c.d_conv)));
}

Parameter* add_conv_bias(const RglruConfig& c, std::int64_t inner, const ParameterScope& scope) {
  if (!c.conv_bias) return nullptr;
  return &scope.add("conv1d.bias", {inner}, conv_init(c), {.weight_decay = false});
}

}  // namespace

RglruConfig Rglru::resolve(RglruConfig config, const MixerBuild& build) {
  if (!config.d_state) config.d_state = build.d_state;
  LRNN_CHECK(*config.d_state >= 1, ConfigError,
             "mixer_kwargs.RGLRU.d_state: expected at least 1, got ", *config.d_state);
  LRNN_CHECK(config.d_conv >= 1, ConfigError,
             "mixer_kwargs.RGLRU.d_conv: expected at least 1, got ", config.d_conv);
  constexpr double kMaxExpand = 1024;  // keeps the width an integer of 64 bits
  LRNN_CHECK(config.expand <= kMaxExpand, ConfigError,
             "mixer_kwargs.RGLRU.expand: expected at most ", kMaxExpand, ", got ", config.expand);
  LRNN_CHECK(config.expand > 0 && inner_width(config, build) >= 1, ConfigError,
             "mixer_kwargs.RGLRU.expand: expected expand * d_model of at least 1, got ",
             config.expand, " * ", build.d_model);
  LRNN_CHECK(config.c > 0, ConfigError, "mixer_kwargs.RGLRU.c: expected a positive number, got ",
             config.c);
  const auto [low, high] = config.a_init_range;
  LRNN_CHECK(low > 0 && low <= high && high < 1, ConfigError,
             "mixer_kwargs.RGLRU.a_init_range: expected 0 < low <= high < 1, got ", low, " and ",
             high);
  return config;
}

Rglru::Rglru(const RglruConfig& config, const MixerBuild& build, const ParameterScope& scope)
    : Mixer(build.d_model),
      inner_(inner_width(config, build)),
      d_conv_(config.d_conv),
      c_(config.c),
      a_log_(scope.add("a_log", {inner_, 1}, a_log_init(config),
                       {.weight_decay = false, .keep_float32 = true})),
      gate_proj_(scope / "gate_proj", build.d_model, inner_, {.bias = config.bias}),
      in_proj_(scope / "in_proj", build.d_model, inner_, {.bias = config.bias}),
      conv_weight_(scope.add("conv1d.weight", {inner_, 1, d_conv_}, conv_init(config))),
      conv_bias_(add_conv_bias(config, inner_, scope)),
      recurrent_gate_proj_(scope / "recurrent_gate_proj", inner_, inner_, {.bias = true}),
      input_gate_proj_(scope / "input_gate_proj", inner_, inner_, {.bias = true}),
      out_proj_(scope / "out_proj", inner_, build.d_model,
                {.bias = config.bias,
                 .weight_init = init::uniform(build.out_proj_scale /
                                              std::sqrt(static_cast<double>(inner_)))}) {}

std::unique_ptr<MixerState> Rglru::make_state(Context& ctx, std::int64_t batch, std::int64_t,
                                              DType dtype) const {
  auto state = std::make_unique<State>();
  state->conv_state = ctx.zeros({batch, inner_, d_conv_}, accumulate_dtype(dtype));
  state->lrnn_state = ctx.zeros({batch, inner_, 1}, accumulate_dtype(dtype));
  return state;
}

TensorView Rglru::conv_weight() const {
  return TensorView(conv_weight_.value).reshape({inner_, d_conv_});
}
TensorView Rglru::conv_bias() const {
  return conv_bias_ != nullptr ? TensorView(conv_bias_->value) : TensorView();
}

void Rglru::convolve(Context& ctx, TensorView u, TensorView lengths, const State* state_in,
                     MutableTensorView w, MutableTensorView state_out) const {
  causal_conv1d_forward(
      ctx, {.x = u,
            .weight = conv_weight(),
            .bias = conv_bias(),
            .lengths = lengths,
            .state_in = state_in != nullptr ? TensorView(state_in->conv_state) : TensorView(),
            .y = w,
            .state_out = state_out});
}

RglruScanInputs Rglru::scan_inputs(TensorView w, TensorView pre_r, TensorView pre_i) const {
  return {.v = w,
          .pre_r = pre_r,
          .pre_i = pre_i,
          .a_log = TensorView(a_log_.value).reshape({inner_}),
          .c = c_};
}

std::unique_ptr<MixerSaved> Rglru::do_forward(Context& ctx, const MixerForward& args,
                                              bool keep_for_backward) const {
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t seqlen = args.x.dim(1);
  const DType dtype = args.x.dtype();
  const Shape inner = {batch, seqlen, inner_};
  const State* const state_in =
      args.state_in != nullptr ? &state_as<State>(*args.state_in) : nullptr;
  State* const state_out = args.state_out != nullptr ? &state_as<State>(*args.state_out) : nullptr;
  auto saved = std::make_unique<Saved>();
  saved->pre_gate = ctx.empty(inner, dtype);
  saved->u = ctx.empty(inner, dtype);
  saved->pre_r = ctx.empty(inner, dtype);
  saved->pre_i = ctx.empty(inner, dtype);
  saved->h = ctx.empty(inner, dtype);
  if (keep_for_backward)
    saved->chunk_states =
        ctx.empty({batch, rglru_scan_chunks(seqlen), inner_}, accumulate_dtype(dtype));
  gate_proj_.forward(ctx, args.x, saved->pre_gate);
  in_proj_.forward(ctx, args.x, saved->u);
  Tensor w = ctx.empty(inner, dtype);
  convolve(ctx, saved->u, args.lengths, state_in, w,
           state_out != nullptr ? MutableTensorView(state_out->conv_state) : MutableTensorView());
  recurrent_gate_proj_.forward(ctx, w, saved->pre_r);
  input_gate_proj_.forward(ctx, w, saved->pre_i);
  RglruScanInputs in = scan_inputs(w, saved->pre_r, saved->pre_i);
  in.lengths = args.lengths;
  if (state_in != nullptr) in.state_in = scan_state(TensorView(state_in->lrnn_state));
  rglru_scan_forward(
      ctx, {.in = in,
            .h = saved->h,
            .state_out = state_out != nullptr ? scan_state(MutableTensorView(state_out->lrnn_state))
                                              : MutableTensorView(),
            .chunk_states = saved->chunk_states});
  // w is not read again and has the size of the product.
  gated_activation_forward(
      ctx, {.kind = Activation::Gelu, .value = saved->h, .gate = saved->pre_gate, .y = w});
  out_proj_.forward(ctx, w, args.y);
  if (!keep_for_backward) return nullptr;
  saved->x = args.x;
  saved->state_in = state_in;
  return saved;
}

void Rglru::do_backward(Context& ctx, MixerSaved& base, const MixerBackward& args) const {
  const auto& saved = saved_as<Saved>(base);
  const DType dtype = args.dy.dtype();
  const Shape& inner = saved.u.shape();
  const State* const dstate_out =
      args.dstate_out != nullptr ? &state_as<State>(*args.dstate_out) : nullptr;
  State* const dstate_in = args.dstate_in != nullptr ? &state_as<State>(*args.dstate_in) : nullptr;

  Tensor dpre_gate = ctx.empty(inner, dtype);
  Tensor dh = ctx.empty(inner, dtype);
  {
    Tensor product = ctx.empty(inner, dtype);
    Tensor dproduct = ctx.empty(inner, dtype);
    gated_activation_forward(
        ctx, {.kind = Activation::Gelu, .value = saved.h, .gate = saved.pre_gate, .y = product});
    out_proj_.backward(ctx, args.dy, product, dproduct);
    gated_activation_backward(ctx, {.kind = Activation::Gelu,
                                    .dy = dproduct,
                                    .value = saved.h,
                                    .gate = saved.pre_gate,
                                    .dvalue = dh,
                                    .dgate = dpre_gate});
  }
  gate_proj_.backward(ctx, dpre_gate, saved.x, args.dx);

  Tensor w = ctx.empty(inner, dtype);
  Tensor dw = ctx.empty(inner, dtype);
  Tensor dpre_r = ctx.empty(inner, dtype);
  Tensor dpre_i = ctx.empty(inner, dtype);
  convolve(ctx, saved.u, saved.lengths, saved.state_in, w, {});
  RglruScanInputs in = scan_inputs(w, saved.pre_r, saved.pre_i);
  in.lengths = saved.lengths;
  rglru_scan_backward(
      ctx, {.in = in,
            .dh = dh,
            .chunk_states = saved.chunk_states,
            .dstate_out = dstate_out != nullptr ? scan_state(TensorView(dstate_out->lrnn_state))
                                                : TensorView(),
            .dv = dw,
            .dpre_r = dpre_r,
            .dpre_i = dpre_i,
            .da_log = a_log_.grad.reshape({inner_}),
            .dstate_in = dstate_in != nullptr ? scan_state(MutableTensorView(dstate_in->lrnn_state))
                                              : MutableTensorView()});
  recurrent_gate_proj_.backward(ctx, dpre_r, w, dw, true);
  input_gate_proj_.backward(ctx, dpre_i, w, dw, true);

  Tensor& du = dh;  // not read again
  causal_conv1d_backward(
      ctx, {.dy = dw,
            .x = saved.u,
            .weight = conv_weight(),
            .bias = conv_bias(),
            .lengths = saved.lengths,
            .state_in =
                saved.state_in != nullptr ? TensorView(saved.state_in->conv_state) : TensorView(),
            .dstate_out = dstate_out != nullptr ? TensorView(dstate_out->conv_state) : TensorView(),
            .dx = du,
            .dweight = conv_weight_.grad.reshape({inner_, d_conv_}),
            .dbias = conv_bias_ != nullptr ? conv_bias_->grad : MutableTensorView(),
            .dstate_in = dstate_in != nullptr ? MutableTensorView(dstate_in->conv_state)
                                              : MutableTensorView()});
  in_proj_.backward(ctx, du, saved.x, args.dx, true);
}

void Rglru::do_step(Context& ctx, const MixerStep& args) const {
  const std::int64_t batch = args.x.dim(0);
  const DType dtype = args.x.dtype();
  const Shape inner = {batch, inner_};
  State& state = state_as<State>(args.state);
  Tensor gate = ctx.empty(inner, dtype);
  Tensor w = ctx.empty(inner, dtype);
  Tensor product = ctx.empty(inner, dtype);
  projected_conv1d_step(ctx, {.x = args.x.reshape({batch, d_model()}),
                              .projection = in_proj_.weight_value(),
                              .projection_bias = in_proj_.bias_value(),
                              .side_projection = gate_proj_.weight_value(),
                              .side_bias = gate_proj_.bias_value(),
                              .weight = conv_weight(),
                              .bias = conv_bias(),
                              .y = w,
                              .side_y = gate,
                              .state = state.conv_state,
                              .norm = args.norm});
  projected_rglru_step(ctx, {.v = w,
                             .r_projection = recurrent_gate_proj_.weight_value(),
                             .r_bias = recurrent_gate_proj_.bias_value(),
                             .i_projection = input_gate_proj_.weight_value(),
                             .i_bias = input_gate_proj_.bias_value(),
                             .a_log = TensorView(a_log_.value).reshape({inner_}),
                             .c = c_,
                             .gate = gate,
                             .y = product,
                             .state = state.lrnn_state.view().reshape(inner)});
  out_proj_.forward(ctx, product, args.y.reshape({batch, d_model()}));
}

}  // namespace lrnn
