/// A dense projection beside a skip connection that is scaled by column, as a state space model
/// reads its states out and its input beside them.
///
///   forward:   y = x W^T + scale o skip
///   backward:  dx = dv W + scale o dy,   dscale += sum over rows of dy o x
///
/// Backward is that of an input x with two consumers: a drive v = x W^T and the skip of y.
/// Gradients of weights and of the states are those of `linear`. All rows may be column slices of
/// wider tensors (one row stride). float32 products on CUDA use full float32 unless
/// Context::allow_tf32().
/// Paper: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences",
/// arXiv:2303.06349.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct LinearSkipForward {
  TensorView x;         ///< [..., I]
  TensorView weight;    ///< [O, I], dtype of x
  TensorView skip;      ///< [..., O], dtype of x
  TensorView scale;     ///< [O], float32 (float64)
  MutableTensorView y;  ///< [..., O], overwritten
};

struct LinearSkipBackward {
  TensorView dv;             ///< [..., O]
  TensorView weight;         ///< [O, I], dtype of dv
  TensorView dy;             ///< [..., I], dtype of dv
  TensorView x;              ///< [..., I], dtype of dv
  TensorView scale;          ///< [I], float32 (float64)
  MutableTensorView dx;      ///< [..., I], overwritten
  MutableTensorView dscale;  ///< [I], float32 (float64), accumulated into
};

/// @throws ShapeError, DTypeError, DeviceError
void linear_skip_forward(Context& ctx, const LinearSkipForward& args);
void linear_skip_backward(Context& ctx, const LinearSkipBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void linear_skip_forward(Context& ctx, const LinearSkipForward& args);
void linear_skip_backward(Context& ctx, const LinearSkipBackward& args);
}  // namespace cpu
namespace cuda {
void linear_skip_forward(Context& ctx, const LinearSkipForward& args);
void linear_skip_backward(Context& ctx, const LinearSkipBackward& args);
}  // namespace cuda

}  // namespace lrnn
