#include "lrnn/nn/norm.hpp"

#include "lrnn/ops/elementwise.hpp"

namespace lrnn {
namespace {

Shape rows_of(const Shape& shape) {
  Shape out;
  for (int i = 0; i + 1 < shape.rank(); ++i) out.set(i, shape[i]);
  return out;
}

TensorView view_of(const Parameter* parameter) {
  return parameter != nullptr ? TensorView(parameter->value) : TensorView();
}
MutableTensorView view_if(Tensor& tensor) {
  return tensor ? tensor.view() : MutableTensorView();
}

}  // namespace

AddNorm::AddNorm(const ParameterScope& scope, std::int64_t d_model, const Options& options)
    : options_(options),
      weight_(&scope.add("weight", {d_model}, init::constant(1.0),
                         {.weight_decay = false, .keep_float32 = true})) {
  if (options.kind == NormKind::Layer)
    bias_ = &scope.add("bias", {d_model}, init::constant(0.0),
                       {.weight_decay = false, .keep_float32 = true});
}

AddNormOutput AddNorm::forward(Context& ctx, Tensor x, TensorView residual, DType residual_dtype,
                               bool keep_for_backward) const {
  AddNormOutput out;
  const Shape shape = x.shape();
  const DType wide = accumulate_dtype(x.dtype());
  out.y = ctx.empty(shape, x.dtype());
  if (keep_for_backward) {
    out.rstd = ctx.empty(rows_of(shape), wide);
    if (options_.kind == NormKind::Layer) out.mean = ctx.empty(rows_of(shape), wide);
  }
  AddNormForward args{.kind = options_.kind,
                      .x = x,
                      .weight = weight_->value,
                      .bias = view_of(bias_),
                      .eps = options_.eps,
                      .y = out.y,
                      .rstd = view_if(out.rstd),
                      .mean = view_if(out.mean)};
  const bool nothing_to_store = !residual && residual_dtype == x.dtype();
  if (!nothing_to_store) out.residual = ctx.empty(shape, residual_dtype);
  if (nothing_to_store || options_.fused) {
    args.residual = residual;
    args.residual_out = view_if(out.residual);
    add_norm_forward(ctx, args);
  } else {
    Tensor sum = ctx.empty(shape, wide);
    cast(ctx, {.src = x, .dst = sum});
    if (residual) add_to(ctx, {.src = residual, .dst = sum});
    cast(ctx, {.src = sum, .dst = out.residual});
    Tensor y = ctx.empty(shape, wide);
    args.x = sum;
    args.y = y;
    add_norm_forward(ctx, args);
    cast(ctx, {.src = y, .dst = out.y});
  }
  if (nothing_to_store) out.residual = std::move(x);
  return out;
}

Tensor AddNorm::normalize(Context& ctx, TensorView x, TensorView residual) const {
  Tensor y = ctx.empty(x.shape(), x.dtype());
  add_norm_forward(ctx, {.kind = options_.kind,
                         .x = x,
                         .residual = residual,
                         .weight = weight_->value,
                         .bias = view_of(bias_),
                         .eps = options_.eps,
                         .y = y});
  return y;
}

AddNormGradients AddNorm::backward(Context& ctx, const AddNormOutput& saved, TensorView dy,
                                   TensorView dresidual_out) const {
  AddNormGradients out;
  out.dx = ctx.empty(dy.shape(), dy.dtype());
  if (saved.residual.dtype() != dy.dtype())
    out.dresidual = ctx.empty(dy.shape(), saved.residual.dtype());
  add_norm_backward(ctx, {.kind = options_.kind,
                          .dy = dy,
                          .r = saved.residual,
                          .weight = weight_->value,
                          .rstd = saved.rstd,
                          .mean = saved.mean,
                          .dresidual_out = dresidual_out,
                          .dx = out.dx,
                          .dresidual = view_if(out.dresidual),
                          .dweight = weight_->grad,
                          .dbias = bias_ != nullptr ? bias_->grad : MutableTensorView()});
  return out;
}

}  // namespace lrnn
