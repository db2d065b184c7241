#include "lrnn/mixers/attn.hpp"

#include <cmath>

#include "lrnn/ops/causal_conv1d.hpp"
#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/gated_activation.hpp"
#include "lrnn/ops/kv_cache.hpp"
#include "lrnn/ops/rotary.hpp"

namespace lrnn {
namespace {

std::int64_t round_up(std::int64_t n, std::int64_t step) {
  return (n + step - 1) / step * step;
}

std::int64_t projected_width(const AttentionConfig& c) {
  return *c.head_dim * (*c.num_heads + 2 * *c.num_heads_kv);
}

void require(bool ok, const char* option, const char* expected, std::int64_t got) {
  LRNN_CHECK(ok, ConfigError, "mixer_kwargs.attn.", option, ": expected ", expected, ", got ", got);
}

}  // namespace

void Attention::State::visit(const Visitor& visitor) {
  visitor("keys", keys);
  visitor("values", values);
  if (conv_state) visitor("conv_state", conv_state);
  visitor("positions", positions);
}

AttentionConfig Attention::resolve(AttentionConfig c, const MixerBuild& build) {
  if (!c.num_heads) {
    const std::int64_t heads = std::max<std::int64_t>(1, build.d_model / 64);
    LRNN_CHECK(build.d_model % heads == 0, ConfigError,
               "mixer_kwargs.attn.num_heads: required, because d_model = ", build.d_model,
               " does not divide into ", heads, " heads");
    c.num_heads = heads;
  }
  require(*c.num_heads >= 1, "num_heads", "at least 1", *c.num_heads);
  if (!c.num_heads_kv) c.num_heads_kv = c.num_heads;
  require(*c.num_heads_kv >= 1 && *c.num_heads % *c.num_heads_kv == 0, "num_heads_kv",
          "a divisor of num_heads", *c.num_heads_kv);
  if (!c.head_dim) {
    require(build.d_model % *c.num_heads == 0, "num_heads", "a divisor of d_model", *c.num_heads);
    c.head_dim = build.d_model / *c.num_heads;
  }
  require(*c.head_dim >= 1, "head_dim", "at least 1", *c.head_dim);
  require(c.mlp_dim >= 0, "mlp_dim", "at least 0", c.mlp_dim);
  require(c.d_conv >= 0, "d_conv", "at least 0", c.d_conv);
  require(c.rotary_emb_dim >= 0 && c.rotary_emb_dim % 2 == 0 && c.rotary_emb_dim <= *c.head_dim,
          "rotary_emb_dim", "an even number of at most head_dim", c.rotary_emb_dim);
  LRNN_CHECK(c.rotary_emb_base > 0, ConfigError,
             "mixer_kwargs.attn.rotary_emb_base: expected a positive number, got ",
             c.rotary_emb_base);
  if (!c.softmax_scale) c.softmax_scale = 1.0 / std::sqrt(static_cast<double>(*c.head_dim));
  return c;
}

Attention::Attention(const AttentionConfig& c, const MixerBuild& build, const ParameterScope& scope)
    : Mixer(build.d_model),
      causal_(c.causal),
      num_heads_(*c.num_heads),
      num_heads_kv_(*c.num_heads_kv),
      head_dim_(*c.head_dim),
      mlp_width_(round_up(c.mlp_dim, 256)),
      d_conv_(c.d_conv),
      softmax_scale_(*c.softmax_scale),
      rotary_dim_(c.rotary_emb_dim),
      rotary_base_(c.rotary_emb_base),
      rotary_interleaved_(c.rotary_emb_interleaved),
      in_proj_(scope / "in_proj", build.d_model, projected_width(c) + mlp_width_,
               {.bias = c.qkv_proj_bias}),
      out_proj_(scope / "out_proj", q_width() + mlp_width_ / 2, build.d_model,
                {.bias = c.out_proj_bias,
                 .weight_init =
                     init::uniform(build.out_proj_scale /
                                   std::sqrt(static_cast<double>(q_width() + mlp_width_ / 2)))}) {
  if (d_conv_ == 0) return;
  const Initializer conv_init = init::uniform(1.0 / std::sqrt(static_cast<double>(d_conv_)));
  conv_weight_ = &scope.add("conv1d.weight", {qkv_width(), 1, d_conv_}, conv_init);
  conv_bias_ = &scope.add("conv1d.bias", {qkv_width()}, conv_init, {.weight_decay = false});
}

TensorView Attention::conv_weight() const {
  return TensorView(conv_weight_->value).reshape({qkv_width(), d_conv_});
}
TensorView Attention::conv_bias() const {
  return conv_bias_->value;
}

std::unique_ptr<MixerState> Attention::make_state(Context& ctx, std::int64_t batch,
                                                  std::int64_t max_seqlen, DType dtype) const {
  LRNN_CHECK(causal_, InvalidArgument,
             "attn: causal = false has no state: step and prefill are impossible");
  auto state = std::make_unique<State>();
  state->keys = ctx.zeros({batch, max_seqlen, kv_width()}, dtype);
  state->values = ctx.zeros({batch, max_seqlen, kv_width()}, dtype);
  if (d_conv_ > 0)
    state->conv_state = ctx.zeros({batch, qkv_width(), d_conv_}, accumulate_dtype(dtype));
  state->positions = ctx.zeros({batch}, DType::int32);
  return state;
}

// q and k are neighbours, hence one call.
void Attention::rotate(Context& ctx, MutableTensorView qkv, TensorView positions,
                       TensorView position_ids, bool inverse) const {
  if (rotary_dim_ == 0) return;
  rotary(ctx, {.x = qkv.slice(2, 0, q_width() + kv_width()),
               .head_dim = head_dim_,
               .dim = rotary_dim_,
               .base = rotary_base_,
               .interleaved = rotary_interleaved_,
               .inverse = inverse,
               .positions = positions,
               .position_ids = position_ids});
}

AttentionInputs Attention::attention_inputs(TensorView qkv, TensorView keys, TensorView values,
                                            TensorView lengths, TensorView positions) const {
  return {.q = qkv.slice(2, 0, q_width()),
          .k = keys ? keys : qkv.slice(2, q_width(), kv_width()),
          .v = values ? values : qkv.slice(2, q_width() + kv_width(), kv_width()),
          .num_heads = num_heads_,
          .num_heads_kv = num_heads_kv_,
          .softmax_scale = softmax_scale_,
          .causal = causal_,
          .lengths = lengths,
          .positions = positions};
}

std::unique_ptr<MixerSaved> Attention::do_forward(Context& ctx, const MixerForward& args,
                                                  bool keep_for_backward) const {
  LRNN_CHECK(causal_ || (args.state_in == nullptr && args.state_out == nullptr), InvalidArgument,
             "attn: causal = false has no state: step and prefill are impossible");
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t seqlen = args.x.dim(1);
  const DType dtype = args.x.dtype();
  const State* const state_in =
      args.state_in != nullptr ? &state_as<State>(*args.state_in) : nullptr;
  State* const state_out = args.state_out != nullptr ? &state_as<State>(*args.state_out) : nullptr;
  auto saved = std::make_unique<Saved>();
  saved->p = ctx.empty({batch, seqlen, qkv_width() + mlp_width_}, dtype);
  saved->out = ctx.empty({batch, seqlen, q_width() + mlp_width_ / 2}, dtype);
  if (keep_for_backward)
    saved->lse = ctx.empty({batch, num_heads_, seqlen}, accumulate_dtype(dtype));
  in_proj_.forward(ctx, args.x, saved->p);
  MutableTensorView qkv = saved->p.view().slice(2, 0, qkv_width());
  if (d_conv_ > 0) {
    saved->qkv = ctx.empty({batch, seqlen, qkv_width()}, dtype);
    causal_conv1d_forward(
        ctx, {.x = qkv,
              .weight = conv_weight(),
              .bias = conv_bias(),
              .lengths = args.lengths,
              .state_in = state_in != nullptr ? TensorView(state_in->conv_state) : TensorView(),
              .y = saved->qkv,
              .state_out = state_out != nullptr ? MutableTensorView(state_out->conv_state)
                                                : MutableTensorView()});
    qkv = saved->qkv;
  }
  const TensorView offset = state_in != nullptr ? TensorView(state_in->positions) : TensorView();
  rotate(ctx, qkv, offset, args.position_ids, false);

  // The cache that this chunk is appended to: the caller's, or a copy that lives for this call.
  Tensor keys, values, positions;
  if (state_in != nullptr && (state_out == nullptr || keep_for_backward)) {
    keys = ctx.clone(state_in->keys);
    values = ctx.clone(state_in->values);
  }
  MutableTensorView key_cache, value_cache;
  if (keys) {
    key_cache = keys;
    value_cache = values;
  } else if (state_out != nullptr) {
    key_cache = state_out->keys;
    value_cache = state_out->values;
    if (state_in != nullptr && state_in != state_out) {
      ctx.copy(key_cache, state_in->keys);
      ctx.copy(value_cache, state_in->values);
    }
  }
  if (state_out != nullptr && state_in != state_out) {
    if (state_in != nullptr)
      ctx.copy(state_out->positions, state_in->positions);
    else
      ctx.zero(state_out->positions);
  }
  if (key_cache) {
    const TensorView at = state_in != nullptr ? offset : TensorView(state_out->positions);
    kv_cache_append(ctx, {.src = qkv.slice(2, q_width(), kv_width()),
                          .positions = at,
                          .lengths = args.lengths,
                          .cache = key_cache});
    kv_cache_append(ctx, {.src = qkv.slice(2, q_width() + kv_width(), kv_width()),
                          .positions = at,
                          .lengths = args.lengths,
                          .cache = value_cache});
    if (keys && state_out != nullptr) {
      ctx.copy(state_out->keys, keys);
      ctx.copy(state_out->values, values);
    }
  }
  const bool from_cache = state_in != nullptr;
  attention_forward(ctx,
                    {.in = attention_inputs(qkv, from_cache ? TensorView(key_cache) : TensorView(),
                                            from_cache ? TensorView(value_cache) : TensorView(),
                                            args.lengths, offset),
                     .o = saved->out.view().slice(2, 0, q_width()),
                     .lse = saved->lse});
  if (state_out != nullptr)
    advance_positions(
        ctx, {.positions = state_out->positions, .lengths = args.lengths, .seqlen = seqlen});
  if (mlp_width_ > 0)
    gated_activation_forward(
        ctx, {.kind = Activation::Silu,
              .value = saved->p.view().slice(2, qkv_width(), mlp_width_ / 2),
              .gate = saved->p.view().slice(2, qkv_width() + mlp_width_ / 2, mlp_width_ / 2),
              .y = saved->out.view().slice(2, q_width(), mlp_width_ / 2)});
  out_proj_.forward(ctx, saved->out, args.y);
  if (!keep_for_backward) return nullptr;
  saved->x = args.x;
  saved->position_ids = args.position_ids;
  saved->state_in = state_in;
  saved->keys = std::move(keys);
  saved->values = std::move(values);
  return saved;
}

// What the rows of the cache pass on: to the chunk's own keys and values, and to the state before.
void Attention::cache_gradients(Context& ctx, const Saved& saved, const MixerBackward& args,
                                MutableTensorView dkeys, MutableTensorView dvalues,
                                MutableTensorView dk, MutableTensorView dv) const {
  if (args.dstate_out != nullptr) {
    const auto& dstate_out = state_as<State>(*args.dstate_out);
    add_to(ctx, {.src = dstate_out.keys, .dst = dkeys});
    add_to(ctx, {.src = dstate_out.values, .dst = dvalues});
  }
  const TensorView positions = saved.state_in->positions;
  kv_cache_read(ctx, {.cache = dkeys, .positions = positions, .lengths = saved.lengths, .dst = dk});
  kv_cache_read(ctx,
                {.cache = dvalues, .positions = positions, .lengths = saved.lengths, .dst = dv});
  if (args.dstate_in == nullptr) return;
  auto& dstate_in = state_as<State>(*args.dstate_in);
  ctx.copy(dstate_in.keys, dkeys);
  ctx.copy(dstate_in.values, dvalues);
  mask_padding(ctx, {.x = dstate_in.keys, .lengths = positions});
  mask_padding(ctx, {.x = dstate_in.values, .lengths = positions});
  ctx.copy(dstate_in.positions, positions);
}

void Attention::attention_gradients(Context& ctx, const Saved& saved, const MixerBackward& args,
                                    TensorView d_o, MutableTensorView dqkv) const {
  const TensorView qkv =
      saved.qkv ? TensorView(saved.qkv) : saved.p.view().slice(2, 0, qkv_width());
  const MutableTensorView dk = dqkv.slice(2, q_width(), kv_width());
  const MutableTensorView dv = dqkv.slice(2, q_width() + kv_width(), kv_width());
  const bool from_cache = saved.state_in != nullptr;
  const TensorView offset = from_cache ? TensorView(saved.state_in->positions) : TensorView();
  Tensor dkeys, dvalues;
  if (from_cache) {
    dkeys = ctx.empty(saved.keys.shape(), saved.keys.dtype());
    dvalues = ctx.empty(saved.keys.shape(), saved.keys.dtype());
  }
  attention_backward(ctx,
                     {.in = attention_inputs(qkv, saved.keys, saved.values, saved.lengths, offset),
                      .o = saved.out.view().slice(2, 0, q_width()),
                      .lse = saved.lse,
                      .d_o = d_o,
                      .dq = dqkv.slice(2, 0, q_width()),
                      .dk = from_cache ? MutableTensorView(dkeys) : dk,
                      .dv = from_cache ? MutableTensorView(dvalues) : dv});
  if (from_cache) {
    cache_gradients(ctx, saved, args, dkeys, dvalues, dk, dv);
  } else if (args.dstate_out != nullptr) {  // the cache began with this chunk
    const auto& dstate_out = state_as<State>(*args.dstate_out);
    const Tensor start = ctx.zeros({dqkv.dim(0)}, DType::int32);
    kv_cache_read(ctx, {.cache = dstate_out.keys,
                        .positions = start,
                        .lengths = saved.lengths,
                        .dst = dk,
                        .accumulate = true});
    kv_cache_read(ctx, {.cache = dstate_out.values,
                        .positions = start,
                        .lengths = saved.lengths,
                        .dst = dv,
                        .accumulate = true});
  }
  rotate(ctx, dqkv, offset, saved.position_ids, true);
}

void Attention::do_backward(Context& ctx, MixerSaved& base, const MixerBackward& args) const {
  const auto& saved = saved_as<Saved>(base);
  const DType dtype = args.dy.dtype();
  Tensor dout = ctx.empty(saved.out.shape(), dtype);
  out_proj_.backward(ctx, args.dy, saved.out, dout);
  Tensor dp = ctx.empty(saved.p.shape(), dtype);
  if (mlp_width_ > 0)
    gated_activation_backward(
        ctx, {.kind = Activation::Silu,
              .dy = dout.view().slice(2, q_width(), mlp_width_ / 2),
              .value = saved.p.view().slice(2, qkv_width(), mlp_width_ / 2),
              .gate = saved.p.view().slice(2, qkv_width() + mlp_width_ / 2, mlp_width_ / 2),
              .dvalue = dp.view().slice(2, qkv_width(), mlp_width_ / 2),
              .dgate = dp.view().slice(2, qkv_width() + mlp_width_ / 2, mlp_width_ / 2)});
  const TensorView d_o = dout.view().slice(2, 0, q_width());
  if (d_conv_ == 0) {
    attention_gradients(ctx, saved, args, d_o, dp.view().slice(2, 0, qkv_width()));
  } else {
    Tensor dqkv = ctx.empty(saved.qkv.shape(), dtype);
    attention_gradients(ctx, saved, args, d_o, dqkv);
    State* const dstate_in =
        args.dstate_in != nullptr ? &state_as<State>(*args.dstate_in) : nullptr;
    causal_conv1d_backward(
        ctx, {.dy = dqkv,
              .x = saved.p.view().slice(2, 0, qkv_width()),
              .weight = conv_weight(),
              .bias = conv_bias(),
              .lengths = saved.lengths,
              .state_in =
                  saved.state_in != nullptr ? TensorView(saved.state_in->conv_state) : TensorView(),
              .dstate_out = args.dstate_out != nullptr
                                ? TensorView(state_as<State>(*args.dstate_out).conv_state)
                                : TensorView(),
              .dx = dp.view().slice(2, 0, qkv_width()),
              .dweight = conv_weight_->grad.reshape({qkv_width(), d_conv_}),
              .dbias = conv_bias_->grad,
              .dstate_in = dstate_in != nullptr ? MutableTensorView(dstate_in->conv_state)
                                                : MutableTensorView()});
  }
  in_proj_.backward(ctx, dp, saved.x, args.dx);
}

void Attention::do_step(Context& ctx, const MixerStep& args) const {
  static_cast<void>(do_forward(ctx,
                               {.x = args.x,
                                .position_ids = args.position_ids,
                                .state_in = &args.state,
                                .y = args.y,
                                .state_out = &args.state},
                               false));
}

}  // namespace lrnn
