/// One token of S7 behind its input projection: scan, gate and residual.
///
///   v = s7_scan_step(x; weight, base)                            (see ops/s7_scan.hpp)
///   y = sig(gelu(v) gate^T) v + hid
///
/// v, gelu(v), both products and sig(...) v are rounded to the dtype of x, so the result is that of
/// the ops one by one, but for the order of sums. No gradient: for passes that keep nothing.
/// Paper: arXiv:2410.03464.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct S7GatedStep {
  TensorView x;             ///< [B, 1, H]
  TensorView weight;        ///< [2 H N + H + 2 N, H], dtype of x
  TensorView base;          ///< [N], float32 (float64)
  TensorView gate;          ///< [H, H], as a weight of linear
  TensorView hid;           ///< [B, 1, H]
  MutableTensorView y;      ///< [B, 1, H]
  MutableTensorView state;  ///< [B, N], float32 (float64), updated in place
};

/// @throws ShapeError, DTypeError, DeviceError
void s7_gated_step(Context& ctx, const S7GatedStep& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void s7_gated_step(Context& ctx, const S7GatedStep& args);
}
namespace cuda {
void s7_gated_step(Context& ctx, const S7GatedStep& args);
}

}  // namespace lrnn
