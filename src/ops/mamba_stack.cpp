#include "lrnn/ops/mamba_stack.hpp"

#include "lrnn/ops/add_norm.hpp"
#include "lrnn/ops/linear.hpp"

#include "ops/dispatch.hpp"
#include "ops/mamba_stack_parts.hpp"

namespace lrnn {
namespace {

constexpr const char* kOp = "mamba_stack_step";

struct Sizes {
  std::int64_t batch, inputs, channels, states, rank, width;

  Sizes(TensorView x, const MambaStackLayer& layer)
      : batch(x.dim(0)),
        inputs(x.dim(1)),
        channels(layer.A_log.dim(0)),
        states(layer.A_log.dim(1)),
        rank(layer.dt_weight.dim(1)),
        width(layer.conv_weight.dim(1)) {}
  [[nodiscard]] std::int64_t x_dbl() const { return rank + 2 * states; }
};

void check_layer(const Context& ctx, const MambaStackLayer& l, const Sizes& z, DType dtype) {
  const DType accumulate = accumulate_dtype(dtype);
  const auto matrix = [&](const char* operand, TensorView t, const Shape& shape) {
    detail::check_operand(kOp, operand, ctx, t, shape, detail::weight_dtype(ctx, t, dtype));
  };
  detail::check_operand(kOp, "norm_weight", ctx, l.norm_weight, {z.inputs}, accumulate);
  matrix("in_proj", l.in_proj, {2 * z.channels, z.inputs});
  detail::check_operand(kOp, "conv_weight", ctx, l.conv_weight, {z.channels, z.width}, dtype);
  detail::check_optional(kOp, "conv_bias", ctx, l.conv_bias, {z.channels}, dtype);
  matrix("x_proj", l.x_proj, {z.x_dbl(), z.channels});
  matrix("dt_weight", l.dt_weight, {z.channels, z.rank});
  detail::check_operand(kOp, "dt_bias", ctx, l.dt_bias, {z.channels}, accumulate);
  detail::check_operand(kOp, "A_log", ctx, l.A_log, {z.channels, z.states}, accumulate);
  detail::check_operand(kOp, "D", ctx, l.D, {z.channels}, accumulate);
  matrix("out_proj", l.out_proj, {z.inputs, z.channels});
  detail::check_operand(kOp, "conv_state", ctx, l.conv_state, {z.batch, z.channels, z.width},
                        accumulate);
  detail::check_operand(kOp, "lrnn_state", ctx, l.lrnn_state, {z.batch, z.channels, z.states},
                        accumulate);
}

// What lies between the stages of a layer, for all layers.
struct Values {
  Tensor n, uz, v;

  Values(Context& ctx, const Sizes& z, DType dtype)
      : n(ctx.empty({z.batch, z.inputs}, dtype)),
        uz(ctx.empty({z.batch, 1, 2 * z.channels}, dtype)),
        v(ctx.empty({z.batch, 1, z.channels}, dtype)) {}
};

// y = mixer(t.n)
void mixer_by_parts(Context& ctx, const MambaStackLayer& l, const Sizes& z, Values& t,
                    MutableTensorView y) {
  projected_conv1d_step(ctx, detail::mamba_stack_conv(l, t.n, t.uz));
  projected_selective_scan_step(ctx, detail::mamba_stack_scan(l, t.uz, t.v));
  linear_forward(ctx, {.x = t.v.view().reshape({z.batch, z.channels}),
                       .weight = l.out_proj,
                       .y = y,
                       .stable_weight = true});
}

}  // namespace

ProjectedConv1dStep detail::mamba_stack_conv(const MambaStackLayer& l, TensorView n,
                                             MutableTensorView uz) {
  return {.x = n,
          .projection = l.in_proj,
          .weight = l.conv_weight,
          .bias = l.conv_bias,
          .activation = Activation::Silu,
          .y = uz.reshape({uz.dim(0), uz.dim(2)}),
          .state = l.conv_state};
}

ProjectedSelectiveScanStep detail::mamba_stack_scan(const MambaStackLayer& l, TensorView uz,
                                                    MutableTensorView v) {
  const std::int64_t channels = l.A_log.dim(0);
  return {.in = {.u = uz.slice(2, 0, channels),
                 .dt = {},
                 .dt_bias = l.dt_bias,
                 .A_log = l.A_log,
                 .B = {},
                 .C = {},
                 .D = l.D,
                 .z = uz.slice(2, channels, channels)},
          .projection = l.x_proj,
          .dt_weight = l.dt_weight,
          .y = v,
          .state = l.lrnn_state};
}

void detail::mamba_stack_by_parts(Context& ctx, const MambaStackStep& a) {
  const Sizes z(a.x, a.layers.front());
  Values values(ctx, z, a.x.dtype());
  TensorView hidden = a.x;
  TensorView residual = a.residual;
  for (const MambaStackLayer& layer : a.layers) {
    add_norm_forward(ctx, {.x = hidden,
                           .residual = residual,
                           .weight = layer.norm_weight,
                           .eps = a.eps,
                           .y = values.n,
                           .residual_out = a.residual_out});
    mixer_by_parts(ctx, layer, z, values, a.y);
    hidden = a.y;
    residual = a.residual_out;
  }
}

void mamba_stack_step(Context& ctx, const MambaStackStep& a) {
  LRNN_CHECK(!a.layers.empty(), InvalidArgument, kOp, ": layers: expected at least one");
  detail::check_rank(kOp, "x", a.x, 2);
  const MambaStackLayer& first = a.layers.front();
  detail::check_rank(kOp, "A_log", first.A_log, 2);
  detail::check_rank(kOp, "dt_weight", first.dt_weight, 2);
  detail::check_rank(kOp, "conv_weight", first.conv_weight, 2);
  const DType dtype = a.x.dtype();
  const Sizes sizes(a.x, first);
  detail::check_operand(kOp, "x", ctx, a.x, a.x.shape(), dtype);
  detail::check_operand(kOp, "y", ctx, a.y, a.x.shape(), dtype);
  LRNN_CHECK(a.residual_out, ShapeError, kOp, ": residual_out is required");
  const DType wide = a.residual_out.dtype();
  LRNN_CHECK(wide == dtype || wide == accumulate_dtype(dtype), DTypeError, kOp,
             ": residual_out: expected ", dtype, " or ", accumulate_dtype(dtype), ", got ", wide);
  detail::check_operand(kOp, "residual_out", ctx, a.residual_out, a.x.shape(), wide);
  detail::check_optional(kOp, "residual", ctx, a.residual, a.x.shape(), wide);
  for (const MambaStackLayer& layer : a.layers) check_layer(ctx, layer, sizes, dtype);
  if (a.x.numel() == 0) return;
  LRNN_DISPATCH(mamba_stack_step, ctx, a);
}

}  // namespace lrnn
