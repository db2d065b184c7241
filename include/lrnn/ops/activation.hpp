/// Elementwise activations.
///
///   silu(v) = v sig(v)      gelu(v) = v Phi(v) (exact erf form)      sigmoid(v) = sig(v)
///   softplus(v) = log(1 + e^v), as max(v, 0) + log1p(exp(-|v|))
///   identity(v) = v
///
/// y = f(x) and dx = dy f'(x), or both of f twice in one pass: y = f(f(x)), dx = dy f'(f(x)) f'(x).
/// Rows may be column slices of wider tensors.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

enum class Activation { Identity, Silu, Gelu, Sigmoid, Softplus };

struct ActivationForward {
  Activation kind;
  TensorView x;         ///< [..., C]
  MutableTensorView y;  ///< [..., C]; may be x
  bool twice = false;
};
struct ActivationBackward {
  Activation kind;
  TensorView dy;         ///< [..., C]
  TensorView x;          ///< [..., C]
  MutableTensorView dx;  ///< [..., C], overwritten; may be dy
  bool twice = false;
};

/// @throws ShapeError, DTypeError, DeviceError
void activation_forward(Context& ctx, const ActivationForward& args);
void activation_backward(Context& ctx, const ActivationBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void activation_forward(Context& ctx, const ActivationForward& args);
void activation_backward(Context& ctx, const ActivationBackward& args);
}  // namespace cpu
namespace cuda {
void activation_forward(Context& ctx, const ActivationForward& args);
void activation_backward(Context& ctx, const ActivationBackward& args);
}  // namespace cuda

}  // namespace lrnn
