/// Dense projection of the last dimension.
///
///   y = x W^T (+ bias)
///
/// Gradients: dx = dy W, dW += dy^T x, dbias += sum over rows of dy.
/// The CPU also multiplies float32 x with a bfloat16 weight: its elements are exact in float32, in
/// which products and sums are taken, so that y is that of the widened weight.
/// x, y, dy and dx may be column slices of wider tensors (one row stride).
/// float32 products on CUDA have the accuracy of float32 unless Context::allow_tf32(). Large ones
/// run on Hopper's tensor cores, every number split into two or three of 16 bits; numbers below
/// 2^-110 lose bits there, infinities and NaN are those of float32.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct LinearForward {
  TensorView x;             ///< [..., I]
  TensorView weight;        ///< [O, I], dtype of x; on the CPU also bfloat16 with float32 x
  TensorView bias = {};     ///< [O], dtype of x
  MutableTensorView y;      ///< [..., O], overwritten, or accumulated into if `accumulate`
  bool accumulate = false;  ///< y += instead of y =; not together with bias
  /// The weight was written long ago, as a parameter in decoding: CUDA may read it while kernels
  /// enqueued before this product still run.
  bool stable_weight = false;
};

struct LinearBackward {
  TensorView dy;                   ///< [..., O]
  TensorView x = {};               ///< [..., I]; needed for dweight
  TensorView weight = {};          ///< [O, I]; needed for dx
  MutableTensorView dx = {};       ///< [..., I], overwritten, or accumulated into
  MutableTensorView dweight = {};  ///< [O, I], float32 (float64), accumulated into
  MutableTensorView dbias = {};    ///< [O], float32 (float64), accumulated into
  bool accumulate_dx = false;      ///< dx += instead of dx =
};

/// @throws ShapeError, DTypeError, DeviceError
void linear_forward(Context& ctx, const LinearForward& args);
void linear_backward(Context& ctx, const LinearBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void linear_forward(Context& ctx, const LinearForward& args);
void linear_backward(Context& ctx, const LinearBackward& args);
}  // namespace cpu
namespace cuda {
void linear_forward(Context& ctx, const LinearForward& args);
void linear_backward(Context& ctx, const LinearBackward& args);
}  // namespace cuda

}  // namespace lrnn
