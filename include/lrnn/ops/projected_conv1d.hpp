/// One token through a projection and the causal convolution behind it, as one step of decoding.
///
///   v = x projection^T (+ projection_bias)
///   y = the first C columns of v through causal_conv1d_step, the others as they are
///   side_y = x side_projection^T (+ side_bias)        if given: another projection of the same x
///
/// Columns of v are rounded to the dtype of x, so the result is that of the ops one by one. For few
/// sequences CUDA does it in one launch.
/// Paper: Gu and Dao, "Mamba", arXiv:2312.00752.
#pragma once

#include "lrnn/ops/activation.hpp"
#include "lrnn/ops/add_norm.hpp"

namespace lrnn {

struct ProjectedConv1dStep {
  TensorView x;                                  ///< [B, H]
  TensorView projection;                         ///< [N, H], N >= C
  TensorView projection_bias = {};               ///< [N], dtype of x
  TensorView side_projection = {};               ///< [M, H]
  TensorView side_bias = {};                     ///< [M], dtype of x
  TensorView weight;                             ///< [C, K], dtype of x
  TensorView bias = {};                          ///< [C], dtype of x
  Activation activation = Activation::Identity;  ///< Identity or Silu
  MutableTensorView y;                           ///< [B, N], rows may be column slices
  MutableTensorView side_y = {};                 ///< [B, M], rows may be column slices
  MutableTensorView state;                       ///< [B, C, K], float32 (float64), updated in place
  const AddNormForward* norm = nullptr;  ///< makes x, if given: see ops/add_norm.hpp
};

/// @throws ShapeError, DTypeError, DeviceError, InvalidArgument
void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& args);
}
namespace cuda {
void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& args);
}

}  // namespace lrnn
