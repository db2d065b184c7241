/// Read-out weights of `lane_scan`, as products of the parameters of a mixer.
///
///   W[c, n, m] = scale left[n] right[n] gamma[n, m] B[n mod S, m] C[c, n, m]
///
/// Complex (S4D: gamma of the discretisation, B and C) or real (Centaurus: gamma = dt, C is its E,
/// left and right its B and C). Absent factors are 1. Products and sums are in double, rounded
/// once. O(N M): made once per pass.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct LaneWeightFactors {
  double scale = 1.0;
  TensorView gamma = {};  ///< [2, N M] planes, as written by discretize; real form: real parts only
  TensorView B = {};      ///< [S, M, 2], S divides N; complex form only
  TensorView C;           ///< [C, N, M, 2]; real form: [N, M]
  TensorView left = {};   ///< [N]
  TensorView right = {};  ///< [N]
};

struct LaneWeightForward {
  LaneWeightFactors factors;
  MutableTensorView W;  ///< [C, 2, N, M], real form: [1, N, M]; float32 (float64) like all operands
};

struct LaneWeightBackward {
  LaneWeightFactors factors;
  TensorView dW;                  ///< shape of W
  MutableTensorView dgamma = {};  ///< [2, N M], overwritten
  MutableTensorView dB = {};      ///< accumulated into, like all of the following
  MutableTensorView dC;
  MutableTensorView dleft = {};
  MutableTensorView dright = {};
};

/// @throws ShapeError, DTypeError, DeviceError
void lane_weight_forward(Context& ctx, const LaneWeightForward& args);
void lane_weight_backward(Context& ctx, const LaneWeightBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void lane_weight_forward(Context& ctx, const LaneWeightForward& args);
void lane_weight_backward(Context& ctx, const LaneWeightBackward& args);
}  // namespace cpu
namespace cuda {
void lane_weight_forward(Context& ctx, const LaneWeightForward& args);
void lane_weight_backward(Context& ctx, const LaneWeightBackward& args);
}  // namespace cuda

}  // namespace lrnn
