/// Multipliers and input factors of time-invariant diagonal recurrences, from their parameters.
///
/// A lane is one complex state: a rate A, a step dt and z = dt A give the multiplier a and the
/// factor gamma of the drive in x_t = a x_{t-1} + gamma v_t.
///
///   Zoh          a = exp(z)                gamma = (exp(z) - 1) / A = dt phi1(z)
///   Bilinear     a = (1 + z/2) / (1 - z/2) gamma = dt / (1 - z/2)
///   Dirac        a = exp(z)                gamma = 1
///   Euler        a = exp(z)                gamma = dt                      (Centaurus)
///   Exponential  a = exp(z)                gamma = exp(gamma_log)          (LRU)
///   None         a = A                     gamma = 1
///
/// Everything is evaluated in double from the parameters and rounded once: in float32 the angle
/// dt Im A (up to hundreds of radians) would lose all that matters, the powers would drift, and the
/// numerator of Zoh would cancel. O(lanes x powers).
///
/// Lane i uses element i mod (number of rates) of A and element i / (lanes / number of steps) of
/// dt: rates may be shared by consecutive groups of lanes, and a step by consecutive lanes.
/// A view of parameters is contiguous, or has a last dimension of 1 and rows at one distance
/// (a plane of interleaved pairs).
///
/// Papers: arXiv:2303.06349 (LRU), arXiv:2208.04933 (S5), arXiv:2206.11893 (S4D).
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

enum class Discretization { Zoh, Bilinear, Dirac, Euler, Exponential, None };

/// What a parameter p stands for: +-f(p), or +-f(sinh(p)).
/// Relu is max(p, 0) + 1e-4; Exp is clamped at exp(88).
enum class LaneTransform { Identity, Exp, Softplus, Relu, Sigmoid };

struct LaneParameter {
  TensorView value = {};
  LaneTransform transform = LaneTransform::Identity;
  bool negate = false;
  bool of_sinh = false;
};

/// How many lanes, and from what.
struct LaneParameters {
  Discretization method;
  std::int64_t lanes;
  LaneParameter A_re;         ///< K real parts, K divides lanes; float32 (float64)
  LaneParameter A_im;         ///< K imaginary parts, radians per unit of time
  LaneParameter dt = {};      ///< J steps > 0, J divides lanes; absent: 1
  TensorView gamma_log = {};  ///< [lanes], Exponential only
};

struct DiscretizeForward {
  LaneParameters parameters;
  MutableTensorView a = {};       ///< [2, lanes] planes (re, im) of a
  MutableTensorView a_low = {};   ///< [2, lanes] what rounding took from a; 0 in float64
  MutableTensorView gamma = {};   ///< [2, lanes]
  MutableTensorView powers = {};  ///< [Q + 1, 2, lanes] a^0, ..., a^Q
  /// [4, lanes] z for event form, each half as a sum of two numbers: high and low part of Re z in
  /// e-folds per unit of relative time, high and low part of Im z in turns.
  MutableTensorView z = {};
};

struct DiscretizeBackward {
  LaneParameters parameters;
  TensorView da = {};            ///< [2, lanes]
  TensorView dz = {};            ///< [2, lanes] gradient of z; of log a where a = exp(z)
  TensorView dgamma = {};        ///< [2, lanes]
  MutableTensorView dA_re = {};  ///< of the parameters, shapes of their views; accumulated into
  MutableTensorView dA_im = {};
  MutableTensorView ddt = {};
  MutableTensorView dgamma_log = {};
};

/// @throws ShapeError, DTypeError, DeviceError
void discretize_forward(Context& ctx, const DiscretizeForward& args);
void discretize_backward(Context& ctx, const DiscretizeBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void discretize_forward(Context& ctx, const DiscretizeForward& args);
void discretize_backward(Context& ctx, const DiscretizeBackward& args);
}  // namespace cpu
namespace cuda {
void discretize_forward(Context& ctx, const DiscretizeForward& args);
void discretize_backward(Context& ctx, const DiscretizeBackward& args);
}  // namespace cuda

}  // namespace lrnn
