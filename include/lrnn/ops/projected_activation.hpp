/// An activation with the projection in front of it.
///
///   y = act(x W^T (+ bias))
///
/// The product is rounded to the dtype of x, so the result is that of the ops one by one. For few
/// rows CUDA does it in one launch. No gradient: for passes that keep nothing.
#pragma once

#include "lrnn/ops/activation.hpp"

namespace lrnn {

struct ProjectedActivation {
  Activation kind;
  TensorView x;          ///< [..., I]
  TensorView weight;     ///< [O, I]
  TensorView bias = {};  ///< [O], dtype of x
  MutableTensorView y;   ///< [..., O]
};

/// @throws ShapeError, DTypeError, DeviceError
void projected_activation(Context& ctx, const ProjectedActivation& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void projected_activation(Context& ctx, const ProjectedActivation& args);
}
namespace cuda {
void projected_activation(Context& ctx, const ProjectedActivation& args);
}

}  // namespace lrnn
