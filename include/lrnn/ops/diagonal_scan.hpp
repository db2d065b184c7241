/// Diagonal complex recurrence over time: N lanes driven by N inputs.
///
///   x_t = a_t x_{t-1} + gamma v_t,    x_{-1} = state_in
///
/// v is real or complex. Fixed form: a_t = a + a_low, two parts because rounding a to float32
/// alone would make the memory of slow lanes drift. Event form: with relative time steps tau and
/// z of `discretize`, a_t = exp(tau_t z), or (1 + tau_t z/2) / (1 - tau_t z/2) if `event_bilinear`.
///
/// Gradients, with c_t = dx_t (+ dstate_out at the last valid position):
///   p_t = c_t + conj(a_{t+1}) p_{t+1},  dv_t = conj(gamma) p_t (its real part for real v),
///   da = sum p_t conj(x_{t-1}),  dlog_a = sum p_t conj(a x_{t-1}),  dgamma = sum p_t conj(v_t),
///   dstate_in = conj(a_0) p_0;   event form: dw_t = the gradient of w_t = tau_t z,
///   dz = sum tau_t dw_t,  dtau_t = sum over lanes of Re(dw_t conj(z)).
/// Nothing is divided by a multiplier, so a = 0 is an ordinary value.
///
/// Complex operands are planes: [..., 2, N] holds N real parts, then N imaginary parts.
/// Forward saves the state that enters every chunk of kDiagonalScanChunk tokens; backward
/// recomputes the states from them and writes those too if asked, for the gradient of a read-out.
/// One token is forward with L = 1 and state_out = state_in.
/// Papers: arXiv:2303.06349 (LRU), arXiv:2208.04933 (S5).
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

inline constexpr std::int64_t kDiagonalScanChunk = 32;

/// Number of chunks that a sequence is cut into.
[[nodiscard]] constexpr std::int64_t diagonal_scan_chunks(std::int64_t seqlen) {
  return (seqlen + kDiagonalScanChunk - 1) / kDiagonalScanChunk;
}

/// Either a (and a_low), or z and tau.
struct ScanMultiplier {
  TensorView a = {};      ///< [2, N], float32 (float64)
  TensorView a_low = {};  ///< [2, N], absent: 0
  TensorView z = {};      ///< [4, N], as written by discretize
  TensorView tau = {};    ///< [B, L], float32 (float64), > 0
  bool event_bilinear = false;
};

struct DiagonalScanForward {
  ScanMultiplier multiplier;
  TensorView gamma = {};                ///< [2, N], float32 (float64); absent: 1
  TensorView v;                         ///< [B, L, N] real or [B, L, 2, N] complex
  TensorView lengths = {};              ///< [B] int32
  TensorView state_in = {};             ///< [B, 2, N], float32 (float64); absent: 0
  MutableTensorView x;                  ///< [B, L, 2, N], dtype of v; 0 at padding
  MutableTensorView state_out = {};     ///< [B, 2, N]; may be state_in
  MutableTensorView chunk_states = {};  ///< [B, chunks, 2, N], float32 (float64); saved
};

struct DiagonalScanBackward {
  ScanMultiplier multiplier;
  TensorView gamma = {};             ///< [2, N]
  TensorView dx;                     ///< [B, L, 2, N]
  TensorView v;                      ///< as in forward
  TensorView chunk_states;           ///< [B, chunks, 2, N]
  TensorView lengths = {};           ///< [B] int32
  TensorView dstate_out = {};        ///< [B, 2, N], float32 (float64); absent: 0
  MutableTensorView dv;              ///< shape of v, overwritten; may be v
  MutableTensorView x = {};          ///< [B, L, 2, N], overwritten with the states
  MutableTensorView da = {};         ///< [2, N], accumulated into; fixed form
  MutableTensorView dlog_a = {};     ///< [2, N], accumulated into; fixed form
  MutableTensorView dz = {};         ///< [2, N], accumulated into; event form
  MutableTensorView dgamma = {};     ///< [2, N], accumulated into
  MutableTensorView dtau = {};       ///< [B, L], overwritten; event form
  MutableTensorView dstate_in = {};  ///< [B, 2, N], overwritten
};

/// @throws ShapeError, DTypeError, DeviceError
void diagonal_scan_forward(Context& ctx, const DiagonalScanForward& args);
void diagonal_scan_backward(Context& ctx, const DiagonalScanBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void diagonal_scan_forward(Context& ctx, const DiagonalScanForward& args);
void diagonal_scan_backward(Context& ctx, const DiagonalScanBackward& args);
}  // namespace cpu
namespace cuda {
void diagonal_scan_forward(Context& ctx, const DiagonalScanForward& args);
void diagonal_scan_backward(Context& ctx, const DiagonalScanBackward& args);
}  // namespace cuda

}  // namespace lrnn
