/// One token through a stack of residual Mamba blocks, as one step of decoding.
///
///   for every layer:
///     r = x + r,   n = rms_norm(r) weight                  (ops/add_norm.hpp)
///     [u0 | z] = n in_proj^T,   u = silu(conv1d(u0))       (ops/projected_conv1d.hpp)
///     [q | B | C] = u x_proj^T,   dt = q dt_weight^T
///     v = selective_scan_step(u, dt, A_log, B, C, D, z)    (ops/projected_selective_scan.hpp)
///     x = v out_proj^T
///
/// x and r are what the last layer leaves to its successor. By parts the result is that of those
/// ops. For up to 16 sequences in bfloat16 CUDA does it in one launch: every value is rounded where
/// those ops round it, but for n, which is rounded before its factor 1 / rms is applied, and the
/// order of sums differs. For one or two sequences it is one order, for more another; beyond that
/// it depends on the sizes of a layer alone. For 65 to 128 sequences Hopper has kernels that leave
/// out the norms between layers: n is rounded there before its factor as well.
/// Paper: Gu and Dao, "Mamba", arXiv:2312.00752.
#pragma once

#include <span>

#include "lrnn/core/context.hpp"

namespace lrnn {

/// H inputs, E channels, N states, rank R, convolution of width K.
struct MambaStackLayer {
  TensorView norm_weight;        ///< [H], float32 (float64)
  TensorView in_proj;            ///< [2 E, H], dtype of x
  TensorView conv_weight;        ///< [E, K], dtype of x
  TensorView conv_bias = {};     ///< [E], dtype of x
  TensorView x_proj;             ///< [R + 2 N, E], dtype of x
  TensorView dt_weight;          ///< [E, R], dtype of x
  TensorView dt_bias;            ///< [E], float32 (float64)
  TensorView A_log;              ///< [E, N], float32 (float64)
  TensorView D;                  ///< [E], float32 (float64)
  TensorView out_proj;           ///< [H, E], dtype of x
  MutableTensorView conv_state;  ///< [B, E, K], float32 (float64), updated in place
  MutableTensorView lrnn_state;  ///< [B, E, N], float32 (float64), updated in place
};

struct MambaStackStep {
  std::span<const MambaStackLayer> layers;  ///< of equal sizes, at least one
  double eps = 1e-5;                        ///< of the norms
  TensorView x;                             ///< [B, H]
  TensorView residual = {};                 ///< [B, H], dtype of residual_out; absent: 0
  MutableTensorView y;                      ///< [B, H]
  MutableTensorView residual_out;           ///< [B, H], float32 (float64) or dtype of x
};

/// @throws ShapeError, DTypeError, DeviceError
void mamba_stack_step(Context& ctx, const MambaStackStep& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void mamba_stack_step(Context& ctx, const MambaStackStep& args);
}
namespace cuda {
void mamba_stack_step(Context& ctx, const MambaStackStep& args);
}

}  // namespace lrnn
