/// One token through a diagonal complex recurrence with its projections, as one step of decoding.
///
///   v = x B^T                                   N real or complex drives
///   s = diagonal_scan_forward of one token      multiplier a + a_low, factor gamma
///   y = s C^T + D x
///
/// D is a factor per column or a matrix. v and s are rounded to the dtype of x, so the result is
/// that of the ops one by one, but for a rounding of D x. For few sequences CUDA does it in two
/// launches.
/// Paper: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences",
/// arXiv:2303.06349.
#pragma once

#include "lrnn/ops/add_norm.hpp"

namespace lrnn {

struct ProjectedDiagonalStep {
  TensorView x;             ///< [B, H]
  TensorView B;             ///< [N, H] or, complex, [2, N, H], dtype of x
  TensorView a;             ///< [2, N], float32 (float64)
  TensorView a_low;         ///< [2, N], float32 (float64)
  TensorView gamma;         ///< [2, N], float32 (float64)
  TensorView C;             ///< [H, 2, N], dtype of x, as complex_weight_forward makes it
  TensorView D;             ///< [H], float32 (float64), or [H, H], dtype of x: D x is x D^T
  MutableTensorView y;      ///< [B, H]
  MutableTensorView state;  ///< [B, 2, N], float32 (float64), updated in place
  const AddNormForward* norm = nullptr;  ///< makes x, if given: see ops/add_norm.hpp
};

/// @throws ShapeError, DTypeError, DeviceError, InvalidArgument
void projected_diagonal_step(Context& ctx, const ProjectedDiagonalStep& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void projected_diagonal_step(Context& ctx, const ProjectedDiagonalStep& args);
}
namespace cuda {
void projected_diagonal_step(Context& ctx, const ProjectedDiagonalStep& args);
}

}  // namespace lrnn
