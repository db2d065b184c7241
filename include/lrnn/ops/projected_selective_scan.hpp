/// The projection of Mamba's channels and the selective scan behind it, as one step of decoding.
///
///   [dt_low | B | C] = u projection^T,   dt = dt_low dt_weight^T
///   y, state = selective_scan_step(u, dt, B, C, ..)
///
/// Both products are rounded to the dtype of u, so the result is that of the ops one by one. On
/// Hopper the states of 17 to 256 sequences are on their way while the product is formed: that
/// needs both kernels to be launched by one op, which knows what ran before the scan. The bits of a
/// sequence are the same for 17 to 64 sequences, and for 65 to 256, which have a product of their
/// own: it adds eight parts of E, the other one as many as suit the sizes of the projection.
/// linear_forward may add in another order for up to 32 and from 129 sequences on.
/// Paper: Gu and Dao, "Mamba", arXiv:2312.00752.
#pragma once

#include "lrnn/ops/selective_scan.hpp"

namespace lrnn {

/// L = 1 in every operand of `in`; dt, B, C, lengths and state_in are absent there.
struct ProjectedSelectiveScanStep {
  SelectiveScanInputs in;
  TensorView projection;    ///< [R + 2 N, E], rows may be column slices
  TensorView dt_weight;     ///< [E, R], dtype of u
  MutableTensorView y;      ///< [B, 1, E]
  MutableTensorView state;  ///< [B, E, N], float32 (float64), updated in place
};

/// @throws ShapeError, DTypeError, DeviceError
void projected_selective_scan_step(Context& ctx, const ProjectedSelectiveScanStep& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void projected_selective_scan_step(Context& ctx, const ProjectedSelectiveScanStep& args);
}
namespace cuda {
void projected_selective_scan_step(Context& ctx, const ProjectedSelectiveScanStep& args);
}

}  // namespace lrnn
