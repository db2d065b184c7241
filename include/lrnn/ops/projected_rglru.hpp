/// One token through the gates of an RG-LRU, its recurrence and the gate of its output, as one step
/// of decoding.
///
///   pre_r = v r_projection^T + r_bias,   pre_i = v i_projection^T + i_bias
///   h = rglru_scan_step(v, pre_r, pre_i)
///   y = h gelu(gate)
///
/// pre_r, pre_i and h are rounded to the dtype of v, so the result is that of the ops one by one.
/// For few sequences CUDA does it in one launch.
/// Paper: De et al., "Griffin", arXiv:2402.19427.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct ProjectedRglruStep {
  TensorView v;             ///< [B, E]
  TensorView r_projection;  ///< [E, E]
  TensorView r_bias;        ///< [E], dtype of v
  TensorView i_projection;  ///< [E, E]
  TensorView i_bias;        ///< [E], dtype of v
  TensorView a_log;         ///< [E], float32 (float64)
  double c = 8.0;           ///< > 0
  TensorView gate;          ///< [B, E], before its activation
  MutableTensorView y;      ///< [B, E]; not v
  MutableTensorView state;  ///< [B, E], float32 (float64), updated in place
};

/// @throws ShapeError, DTypeError, DeviceError, InvalidArgument
void projected_rglru_step(Context& ctx, const ProjectedRglruStep& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void projected_rglru_step(Context& ctx, const ProjectedRglruStep& args);
}
namespace cuda {
void projected_rglru_step(Context& ctx, const ProjectedRglruStep& args);
}

}  // namespace lrnn
