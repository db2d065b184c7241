/// Product of a value and an activated gate.
///
///   y = value * act(gate)
///
/// value and gate are usually the two halves of one projection, as column slices.
/// Backward overwrites dvalue = dy act(gate) and dgate = dy value act'(gate).
#pragma once

#include "lrnn/ops/activation.hpp"

namespace lrnn {

struct GatedActivationForward {
  Activation kind;
  TensorView value;     ///< [..., C]
  TensorView gate;      ///< [..., C]
  MutableTensorView y;  ///< [..., C]
};
struct GatedActivationBackward {
  Activation kind;
  TensorView dy;             ///< [..., C]
  TensorView value;          ///< [..., C]
  TensorView gate;           ///< [..., C]
  MutableTensorView dvalue;  ///< [..., C], overwritten
  MutableTensorView dgate;   ///< [..., C], overwritten
};

/// @throws ShapeError, DTypeError, DeviceError
void gated_activation_forward(Context& ctx, const GatedActivationForward& args);
void gated_activation_backward(Context& ctx, const GatedActivationBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void gated_activation_forward(Context& ctx, const GatedActivationForward& args);
void gated_activation_backward(Context& ctx, const GatedActivationBackward& args);
}  // namespace cpu
namespace cuda {
void gated_activation_forward(Context& ctx, const GatedActivationForward& args);
void gated_activation_backward(Context& ctx, const GatedActivationBackward& args);
}  // namespace cuda

}  // namespace lrnn
