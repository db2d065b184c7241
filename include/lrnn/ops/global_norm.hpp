/// Euclidean norm of a set of blocks, for gradient clipping and metrics.
///
///   norm = scale sqrt(sum over all blocks and elements of grad^2)
///
/// Squares are summed in double in a fixed shape: 1024 interleaved sums over each run of 16384
/// elements, folded in halves; then the runs in order. The square of a float32 is exact in double,
/// so the CPU and CUDA give the same bits, for any number of threads. An infinite or NaN gradient
/// gives an infinite or NaN norm.
#pragma once

#include <vector>

#include "lrnn/core/context.hpp"

namespace lrnn {

struct GlobalNorm {
  std::vector<TensorView> grads;  ///< one or more blocks of any shape, float32 (float64)
  double scale = 1.0;             ///< applied to the norm, not to the gradients
  MutableTensorView norm;         ///< [], float32 (float64)
};

/// @throws ShapeError, DTypeError, DeviceError
void global_norm(Context& ctx, const GlobalNorm& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void global_norm(Context& ctx, const GlobalNorm& args);
}
namespace cuda {
void global_norm(Context& ctx, const GlobalNorm& args);
}

}  // namespace lrnn
