#include "lrnn/nn/block.hpp"

#include "lrnn/mixers/mamba.hpp"

namespace lrnn {

Tensor BlockSaved::keep_first_norm() {
  Tensor residual = std::move(norm2.residual);
  mixer.reset();
  norm2 = {};
  mlp = {};
  return residual;
}

Block::Block(const BlockOptions& options, const ParameterScope& scope)
    : norm_(scope / "norm", options.mixer_build.d_model, options.norm),
      mixer_(make_mixer(options.mixer_type, options.mixer_kwargs, options.mixer_build,
                        scope / "mixer")),
      residual_dtype_(options.residual_dtype) {
  if (options.d_intermediate == 0) return;
  norm2_ = std::make_unique<AddNorm>(scope / "norm2", options.mixer_build.d_model, options.norm);
  mlp_ = make_mlp(options.mlp_cls,
                  {.d_model = options.mixer_build.d_model,
                   .d_intermediate = options.d_intermediate,
                   .residual_scale = options.mixer_build.out_proj_scale},
                  scope / "mlp");
}

Tensor Block::forward(Context& ctx, Tensor hidden, const BlockInputs& inputs, BlockSaved& saved,
                      bool keep_for_backward) const {
  saved.norm =
      norm_.forward(ctx, std::move(hidden), inputs.residual, residual_dtype_, keep_for_backward);
  return mix(ctx, inputs, saved, keep_for_backward);
}

void Block::run_again(Context& ctx, const BlockInputs& inputs, BlockSaved& saved) const {
  static_cast<void>(mix(ctx, inputs, saved, true));
}

Tensor Block::mix(Context& ctx, const BlockInputs& inputs, BlockSaved& saved,
                  bool keep_for_backward) const {
  Tensor mixed = ctx.empty(saved.norm.y.shape(), saved.norm.y.dtype());
  saved.mixer = mixer_->forward(ctx,
                                {.x = saved.norm.y,
                                 .integration_timesteps = inputs.integration_timesteps,
                                 .position_ids = inputs.position_ids,
                                 .lengths = inputs.lengths,
                                 .state_in = inputs.state,
                                 .y = mixed,
                                 .state_out = inputs.state},
                                keep_for_backward);
  return feed_forward(ctx, std::move(mixed), saved, keep_for_backward);
}

Tensor Block::step(Context& ctx, Tensor hidden, const BlockInputs& inputs,
                   BlockSaved& saved) const {
  PendingAddNorm norm = norm_.prepare(ctx, std::move(hidden), inputs.residual, residual_dtype_);
  Tensor mixed = ctx.empty(norm.out.y.shape(), norm.out.y.dtype());
  mixer_->step(ctx, {.x = norm.out.y,
                     .integration_timesteps = inputs.integration_timesteps,
                     .position_ids = inputs.position_ids,
                     .y = mixed,
                     .state = *inputs.state,
                     .norm = norm.norm()});
  saved.norm.residual = std::move(norm.out.residual);
  if (!mlp_) return mixed;
  PendingAddNorm norm2 =
      norm2_->prepare(ctx, std::move(mixed), saved.norm.residual, residual_dtype_);
  Tensor out = ctx.empty(norm2.out.y.shape(), norm2.out.y.dtype());
  mlp_->forward(ctx, norm2.out.y, out, norm2.norm());
  saved.norm2.residual = std::move(norm2.out.residual);
  return out;
}

std::optional<MambaStackLayer> Block::stack_layer(MixerState& state) const {
  const auto* const mamba = dynamic_cast<const Mamba*>(mixer_.get());
  const AddNorm::Options& norm = norm_.options();
  if (mamba == nullptr || mlp_ || norm.kind != NormKind::Rms || !norm.fused) return {};
  std::optional<MambaStackLayer> layer = mamba->stack_layer(state);
  if (layer) layer->norm_weight = norm_.weight_value();
  return layer;
}

Tensor Block::feed_forward(Context& ctx, Tensor hidden, BlockSaved& saved,
                           bool keep_for_backward) const {
  if (!keep_for_backward) saved.norm.y = Tensor();
  if (!mlp_) return hidden;
  saved.norm2 = norm2_->forward(ctx, std::move(hidden), saved.norm.residual, residual_dtype_,
                                keep_for_backward);
  Tensor out = ctx.empty(saved.norm2.y.shape(), saved.norm2.y.dtype());
  if (keep_for_backward) {
    mlp_->forward(ctx, saved.norm2.y, out, saved.mlp);
  } else {
    mlp_->forward(ctx, saved.norm2.y, out, nullptr);
    saved.norm2.y = Tensor();
  }
  return out;
}

AddNormGradients Block::backward(Context& ctx, BlockSaved saved, TensorView dhidden,
                                 TensorView dresidual) const {
  AddNormGradients gradients;
  if (mlp_) {
    Tensor dx = ctx.empty(dhidden.shape(), dhidden.dtype());
    mlp_->backward(ctx, saved.mlp, saved.norm2.y, dhidden, dx);
    gradients = norm2_->backward(ctx, saved.norm2, dx, dresidual);
    saved.mlp = {};
    saved.norm2 = {};
    dhidden = gradients.dx;
    dresidual = gradients.residual();
  }
  Tensor dx = ctx.empty(dhidden.shape(), dhidden.dtype());
  mixer_->backward(ctx, *saved.mixer, {.dy = dhidden, .dx = dx});
  saved.mixer.reset();
  return norm_.backward(ctx, saved.norm, dx, dresidual);
}

}  // namespace lrnn
