/// A gated activation with the projections in front of it, as the first half of a gated MLP.
///
///   y = (x value^T) act(x gate^T)
///
/// Both products are rounded to the dtype of x, so the result is that of the ops one by one. For
/// few rows CUDA does it in one launch. No gradient: for passes that keep nothing.
/// Paper: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
#pragma once

#include "lrnn/ops/activation.hpp"
#include "lrnn/ops/add_norm.hpp"

namespace lrnn {

struct ProjectedGate {
  Activation kind = Activation::Silu;
  TensorView x;         ///< [..., H]
  TensorView weight;    ///< [2, F, H]: of the value, then of the gate
  MutableTensorView y;  ///< [..., F]
  const AddNormForward* norm = nullptr;  ///< makes x, if given: see ops/add_norm.hpp
};

/// @throws ShapeError, DTypeError, DeviceError, InvalidArgument
void projected_gate(Context& ctx, const ProjectedGate& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void projected_gate(Context& ctx, const ProjectedGate& args);
}
namespace cuda {
void projected_gate(Context& ctx, const ProjectedGate& args);
}

}  // namespace lrnn
