/// The selective state space recurrence of Mamba.
///
///   delta = softplus(dt + dt_bias),   A = -exp(A_log)
///   alpha = delta, or in event mode tau_t softplus(dtA_bias)
///   h_t[e, n] = a h_{t-1}[e, n] + k B_t[n] u_t[e]
///     Mamba     a = exp(alpha A)                        k = delta
///     Zoh       a = exp(alpha A)                        k = expm1(delta A) / A
///     Bilinear  a = (1 + alpha A/2) / (1 - alpha A/2)   k = delta / (1 - delta A/2)
///     Dirac     a = exp(alpha A)                        k = 1
///   y_t[e] = (sum_n C_t[n] h_t[e, n] + D[e] u_t[e]) silu(z_t[e])
///
/// B and C are shared by all channels. The state that enters every chunk of kSelectiveScanChunk
/// tokens is saved; backward recomputes the states inside a chunk.
/// Paper: Gu and Dao, arXiv:2312.00752. Matches: lrnnx/models/ltv/mamba.py.
///
/// On CUDA long sequences are cut, and tokens whose weight in the state at a cut is below 2^-64 are
/// skipped: a value that is not finite need not reach outputs a long way behind it.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

enum class SelectiveDiscretization { Mamba, Zoh, Bilinear, Dirac };

inline constexpr std::int64_t kSelectiveScanChunk = 32;

/// Number of chunks that a sequence is cut into.
[[nodiscard]] constexpr std::int64_t selective_scan_chunks(std::int64_t seqlen) {
  return (seqlen + kSelectiveScanChunk - 1) / kSelectiveScanChunk;
}

/// What all passes read. E channels, N states.
struct SelectiveScanInputs {
  SelectiveDiscretization discretization = SelectiveDiscretization::Mamba;
  TensorView u;                           ///< [B, L, E]
  TensorView dt;                          ///< [B, L, E], before bias and softplus
  TensorView dt_bias;                     ///< [E], float32 (float64)
  TensorView A_log;                       ///< [E, N], float32 (float64)
  TensorView B;                           ///< [B, L, N], rows may be column slices
  TensorView C;                           ///< [B, L, N], rows may be column slices
  TensorView D = {};                      ///< [E], float32 (float64)
  TensorView z = {};                      ///< [B, L, E], rows may be column slices
  TensorView integration_timesteps = {};  ///< tau [B, L], float32 (float64): event mode
  TensorView dtA_bias = {};               ///< [E], float32 (float64): event mode
  TensorView lengths = {};                ///< [B] int32
  TensorView state_in = {};               ///< [B, E, N], float32 (float64); absent: 0
};

struct SelectiveScanForward {
  SelectiveScanInputs in;
  MutableTensorView y;                  ///< [B, L, E]; zero at padding
  MutableTensorView state_out = {};     ///< [B, E, N]; may be in.state_in
  MutableTensorView chunk_states = {};  ///< [B, chunks, E, N], float32 (float64); saved
};

struct SelectiveScanBackward {
  SelectiveScanInputs in;
  TensorView dy;                                  ///< [B, L, E]
  TensorView chunk_states;                        ///< [B, chunks, E, N]
  TensorView dstate_out = {};                     ///< [B, E, N], float32 (float64); absent: 0
  MutableTensorView du;                           ///< [B, L, E], overwritten; may be dy
  MutableTensorView ddt;                          ///< [B, L, E], overwritten; may be in.dt
  MutableTensorView dB;                           ///< [B, L, N], overwritten; column slices
  MutableTensorView dC;                           ///< [B, L, N], overwritten; column slices
  MutableTensorView dz = {};                      ///< [B, L, E], overwritten; column slices
  MutableTensorView ddt_bias;                     ///< [E], float32 (float64), accumulated into
  MutableTensorView dA_log;                       ///< [E, N], accumulated into
  MutableTensorView dD = {};                      ///< [E], accumulated into
  MutableTensorView ddtA_bias = {};               ///< [E], accumulated into; event mode
  MutableTensorView dintegration_timesteps = {};  ///< [B, L], overwritten; event mode
  MutableTensorView dstate_in = {};               ///< [B, E, N], overwritten
};

/// One token; L = 1 in every operand of `in`, and `in.state_in` and `in.lengths` are absent.
///
/// The projection of dt may be left to the op: then `in.dt` is absent and dt = dt_low dt_weight^T,
/// rounded to the dtype of u.
struct SelectiveScanStep {
  SelectiveScanInputs in;
  TensorView dt_low = {};     ///< [B, 1, R], rows may be column slices
  TensorView dt_weight = {};  ///< [E, R], dtype of u
  MutableTensorView y;        ///< [B, 1, E]
  MutableTensorView state;    ///< [B, E, N], updated in place
};

/// @throws ShapeError, DTypeError, DeviceError
void selective_scan_forward(Context& ctx, const SelectiveScanForward& args);
void selective_scan_backward(Context& ctx, const SelectiveScanBackward& args);
void selective_scan_step(Context& ctx, const SelectiveScanStep& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void selective_scan_forward(Context& ctx, const SelectiveScanForward& args);
void selective_scan_backward(Context& ctx, const SelectiveScanBackward& args);
}  // namespace cpu
namespace cuda {
void selective_scan_forward(Context& ctx, const SelectiveScanForward& args);
void selective_scan_backward(Context& ctx, const SelectiveScanBackward& args);
void selective_scan_step(Context& ctx, const SelectiveScanStep& args);
}  // namespace cuda

}  // namespace lrnn
