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

// Whether the sum is x itself.
bool stores_nothing(const Tensor& x, TensorView residual, DType residual_dtype) {
  return !residual && residual_dtype == x.dtype();
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

bool AddNorm::adds_by_itself(const Tensor& x, TensorView residual, DType residual_dtype) const {
  return !options_.fused && !stores_nothing(x, residual, residual_dtype);
}

PendingAddNorm AddNorm::prepare(Context& ctx, Tensor x, TensorView residual,
                                DType residual_dtype) const {
  if (adds_by_itself(x, residual, residual_dtype))
    return {.out = add_then_norm(ctx, std::move(x), residual, residual_dtype, false), .args = {}};
  PendingAddNorm pending;
  AddNormOutput& out = pending.out;
  out.y = ctx.empty(x.shape(), x.dtype());
  const bool nothing = stores_nothing(x, residual, residual_dtype);
  if (!nothing) out.residual = ctx.empty(x.shape(), residual_dtype);
  pending.args = AddNormForward{.kind = options_.kind,
                                .x = x,
                                .residual = residual,
                                .weight = weight_->value,
                                .bias = view_of(bias_),
                                .eps = options_.eps,
                                .y = out.y,
                                .residual_out = view_if(out.residual)};
  (nothing ? out.residual : pending.x) = std::move(x);
  return pending;
}

AddNormOutput AddNorm::forward(Context& ctx, Tensor x, TensorView residual, DType residual_dtype,
                               bool keep_for_backward) const {
  if (adds_by_itself(x, residual, residual_dtype))
    return add_then_norm(ctx, std::move(x), residual, residual_dtype, keep_for_backward);
  PendingAddNorm pending = prepare(ctx, std::move(x), residual, residual_dtype);
  if (keep_for_backward) {
    keep_statistics(ctx, pending.out);
    pending.args->rstd = pending.out.rstd;
    pending.args->mean = view_if(pending.out.mean);
  }
  add_norm_forward(ctx, *pending.args);
  return std::move(pending.out);
}

void AddNorm::keep_statistics(Context& ctx, AddNormOutput& out) const {
  const Shape rows = rows_of(out.y.shape());
  const DType wide = accumulate_dtype(out.y.dtype());
  out.rstd = ctx.empty(rows, wide);
  if (options_.kind == NormKind::Layer) out.mean = ctx.empty(rows, wide);
}

AddNormOutput AddNorm::add_then_norm(Context& ctx, Tensor x, TensorView residual,
                                     DType residual_dtype, bool keep_for_backward) const {
  AddNormOutput out;
  const Shape shape = x.shape();
  const DType wide = accumulate_dtype(x.dtype());
  out.y = ctx.empty(shape, x.dtype());
  if (keep_for_backward) keep_statistics(ctx, out);
  out.residual = ctx.empty(shape, residual_dtype);
  Tensor sum = ctx.empty(shape, wide);
  cast(ctx, {.src = x, .dst = sum});
  if (residual) add_to(ctx, {.src = residual, .dst = sum});
  cast(ctx, {.src = sum, .dst = out.residual});
  Tensor y = ctx.empty(shape, wide);
  add_norm_forward(ctx, {.kind = options_.kind,
                         .x = sum,
                         .weight = weight_->value,
                         .bias = view_of(bias_),
                         .eps = options_.eps,
                         .y = y,
                         .rstd = view_if(out.rstd),
                         .mean = view_if(out.mean)});
  cast(ctx, {.src = y, .dst = out.y});
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
