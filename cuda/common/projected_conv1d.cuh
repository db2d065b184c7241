/// What the kernels of projected_conv1d_step share.
#pragma once

#include "lrnn/ops/projected_conv1d.hpp"

#include "common/causal_conv1d.cuh"
#include "common/linear_two_products.cuh"
#include "common/row_scale.cuh"

namespace lrnn::cuda {

namespace conv {

/// The convolution behind the projection.
template <class T>
Conv<T> step_conv(const ProjectedConv1dStep& a) {
  return {.x = nullptr,
          .x_stride = 0,
          .weight = a.weight.data<T>(),
          .bias = a.bias ? a.bias.data<T>() : nullptr,
          .state_in = nullptr,
          .lengths = nullptr,
          .batch = a.x.dim(0),
          .seqlen = 1,
          .channels = a.weight.dim(0),
          .width = static_cast<int>(a.weight.dim(1)),
          .silu = a.activation == Activation::Silu};
}

}  // namespace conv

namespace linear_sm90 {

/// Hopper's kernel for sequences or weights that the product of few rows leaves to it.
bool takes(const ProjectedConv1dStep& args);
void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& args);

/// The same with a factor of every row of the projection, if scales_rows(). weight_once: the
/// projection is the first to leave L2.
bool scales_rows(const ProjectedConv1dStep& args);
void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& args, const RowScale& scale,
                           bool weight_once);

}  // namespace linear_sm90

}  // namespace lrnn::cuda
