#include "lrnn/ops/projected_conv1d.hpp"

#include "ops/dispatch.hpp"
#include "ops/norm_in_front.hpp"
#include "ops/projected_conv1d_parts.hpp"

namespace lrnn {
namespace {

// One of the projections: [O, H] and its bias, to [B, O].
void check_projection(const char* op, const Context& ctx, TensorView x, TensorView projection,
                      TensorView bias, TensorView y) {
  detail::check_rank(op, "projection", projection, 2);
  const DType dtype = x.dtype();
  const std::int64_t out = projection.dim(0);
  detail::check_rows(op, "projection", ctx, projection, {out, x.dim(1)},
                     detail::weight_dtype(ctx, projection, dtype));
  detail::check_optional(op, "projection_bias", ctx, bias, {out}, dtype);
  detail::check_rows(op, "y", ctx, y, {x.dim(0), out}, dtype);
}

}  // namespace

void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& a) {
  constexpr const char* op = "projected_conv1d_step";
  detail::check_rank(op, "x", a.x, 2);
  detail::check_rank(op, "weight", a.weight, 2);
  const DType dtype = a.x.dtype();
  const std::int64_t channels = a.weight.dim(0);
  const std::int64_t width = a.weight.dim(1);
  detail::check_rows(op, "x", ctx, a.x, a.x.shape(), dtype);
  check_projection(op, ctx, a.x, a.projection, a.projection_bias, a.y);
  LRNN_CHECK(static_cast<bool>(a.side_projection) == static_cast<bool>(a.side_y), InvalidArgument,
             op, ": side_projection and side_y belong together");
  if (a.side_y) check_projection(op, ctx, a.x, a.side_projection, a.side_bias, a.side_y);
  LRNN_CHECK(width >= 1 && channels <= a.projection.dim(0), ShapeError, op,
             ": weight: expected up to ", a.projection.dim(0), " channels and a width, got ",
             a.weight.shape());
  LRNN_CHECK(a.activation == Activation::Identity || a.activation == Activation::Silu,
             InvalidArgument, op, ": activation: expected Identity or Silu");
  detail::check_operand(op, "weight", ctx, a.weight, {channels, width}, dtype);
  detail::check_optional(op, "bias", ctx, a.bias, {channels}, dtype);
  detail::check_operand(op, "state", ctx, a.state, {a.x.dim(0), channels, width},
                        accumulate_dtype(dtype));
  detail::check_norm_in_front(op, ctx, a.norm, a.x);
  if (a.y.numel() == 0) return detail::run_norm_in_front(ctx, a.norm);
  LRNN_DISPATCH(projected_conv1d_step, ctx, a);
}

void detail::projected_conv1d_by_parts(Context& ctx, const ProjectedConv1dStep& a) {
  run_norm_in_front(ctx, a.norm);
  linear_forward(ctx, {.x = a.x,
                       .weight = a.projection,
                       .bias = a.projection_bias,
                       .y = a.y,
                       .stable_weight = true});
  if (a.side_y)
    linear_forward(ctx, {.x = a.x,
                         .weight = a.side_projection,
                         .bias = a.side_bias,
                         .y = a.side_y,
                         .stable_weight = true});
  const MutableTensorView channels = a.y.slice(1, 0, a.weight.dim(0));
  causal_conv1d_step(ctx, {.x = channels,
                           .weight = a.weight,
                           .bias = a.bias,
                           .activation = a.activation,
                           .y = channels,
                           .state = a.state});
}

}  // namespace lrnn
