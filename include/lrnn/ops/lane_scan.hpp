/// Diagonal recurrence of M complex sub-states per lane, all driven by one real number.
///
///   x_t[n, m] = (a + a_low)[n, m] x_{t-1}[n, m] + v_t[n mod I],   x_{-1} = state_in
///   w_t[c, n] = sum_m Re(W[c, n, m] x_t[n, m])
///
/// With as many lanes as inputs (N = I), every lane has C outputs of its own:
///   y_t[c I + n] = w_t[c, n] + skip[c, n] v_t[n]
/// With N = G I lanes and C = 1, lane n connects input n mod I to output n / I, and an output is
/// the sum over its I lanes:
///   y_t[o] = sum_i w_t[o I + i]
/// so that a full matrix of G x I lanes never exists over time. Factors of the drive belong into W.
///
/// a_low is what rounding a to float32 took from it: without it the memory of slow lanes drifts.
/// It is applied once per chunk of kLaneScanChunk tokens, where it costs nothing.
///
/// Gradients, with g_t = dy_t:
///   p_t = sum_c conj(W_c) g_{c,t} + conj(a) p_{t+1} (+ dstate_out at the last valid position)
///   dv_t = sum_m Re p_t (+ skip g_t),  dW_c = sum g_{c,t} conj(x_t),  dskip = sum g_{c,t} v_t,
///   da = sum p_t conj(x_{t-1}),  dlog_a = conj(a) da,  dstate_in = conj(a) p_0.
/// Nothing is divided by a multiplier, so a = 0 is an ordinary value.
///
/// Complex operands are planes: [..., 2, N, M] holds the real parts, then the imaginary parts.
/// Forward saves the state that enters every chunk; backward recomputes the states from them.
/// One token is forward with L = 1 and state_out = state_in, or lane_scan_step.
/// Papers: arXiv:2206.11893 (S4D), arXiv:2501.13230 (Centaurus).
#pragma once

#include "lrnn/ops/activation.hpp"

namespace lrnn {

inline constexpr std::int64_t kLaneScanChunk = 32;

/// Number of chunks that a sequence is cut into.
[[nodiscard]] constexpr std::int64_t lane_scan_chunks(std::int64_t seqlen) {
  return (seqlen + kLaneScanChunk - 1) / kLaneScanChunk;
}

struct LaneScanForward {
  TensorView a;                         ///< [2, N, M], float32 (float64)
  TensorView a_low = {};                ///< [2, N, M], absent: 0
  TensorView W;                         ///< [C, 2, N, M] or, real, [C, N, M]
  TensorView skip = {};                 ///< [C, N], float32 (float64); only if N = I
  TensorView v;                         ///< [B, L, I]
  TensorView lengths = {};              ///< [B] int32
  TensorView state_in = {};             ///< [B, 2, N, M], float32 (float64); absent: 0
  MutableTensorView y;                  ///< [B, L, C I] or [B, L, G]; 0 at padding
  MutableTensorView state_out = {};     ///< [B, 2, N, M]; may be state_in
  MutableTensorView chunk_states = {};  ///< [B, chunks, 2, N, M], float32 (float64); saved
};

struct LaneScanBackward {
  TensorView a;                      ///< as in forward
  TensorView a_low = {};             ///< as in forward
  TensorView W;                      ///< as in forward
  TensorView skip = {};              ///< as in forward
  TensorView v;                      ///< as in forward
  TensorView lengths = {};           ///< [B] int32
  TensorView dy;                     ///< shape of y
  TensorView chunk_states;           ///< [B, chunks, 2, N, M]
  TensorView dstate_out = {};        ///< [B, 2, N, M]; absent: 0
  MutableTensorView dv;              ///< [B, L, I], overwritten
  MutableTensorView da = {};         ///< [2, N, M], accumulated into
  MutableTensorView dlog_a = {};     ///< [2, N, M], accumulated into
  MutableTensorView dW = {};         ///< shape of W, accumulated into
  MutableTensorView dskip = {};      ///< [C, N], accumulated into
  MutableTensorView dstate_in = {};  ///< [B, 2, N, M], overwritten
};

/// One token, with the state in place and what an activation makes of the outputs, rounded before
/// it: y = f(y), or f(f(y)). It takes every token as a chunk of its own.
struct LaneScanStep {
  TensorView a;             ///< as in forward
  TensorView a_low = {};    ///< as in forward
  TensorView W;             ///< as in forward
  TensorView skip = {};     ///< as in forward
  TensorView v;             ///< [B, 1, I]
  MutableTensorView y;      ///< [B, 1, C I] or [B, 1, G]
  MutableTensorView state;  ///< [B, 2, N, M], float32 (float64), updated in place
  Activation activation = Activation::Identity;
  bool twice = false;
};

/// @throws ShapeError, DTypeError, DeviceError
void lane_scan_forward(Context& ctx, const LaneScanForward& args);
void lane_scan_backward(Context& ctx, const LaneScanBackward& args);
void lane_scan_step(Context& ctx, const LaneScanStep& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void lane_scan_forward(Context& ctx, const LaneScanForward& args);
void lane_scan_backward(Context& ctx, const LaneScanBackward& args);
void lane_scan_step(Context& ctx, const LaneScanStep& args);
}  // namespace cpu
namespace cuda {
void lane_scan_forward(Context& ctx, const LaneScanForward& args);
void lane_scan_backward(Context& ctx, const LaneScanBackward& args);
void lane_scan_step(Context& ctx, const LaneScanStep& args);
}  // namespace cuda

}  // namespace lrnn
