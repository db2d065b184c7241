/// Recurrence with a transition that is diagonal plus rank R, driven by one real number per head.
///
///   x_t[h] = x_{t-1} + e x_{t-1} - sum_r w_r <k_r, x_{t-1}> + b u_t[h],   x_{-1} = state_in
///   y_t[c H + h] = 2 Re sum_n C[c, h, n] x_t[h, n] + D[c, h] u_t[h]
///
/// with <p, q> = 2 Re sum_n conj(p_n) q_n: N complex states stand for N conjugate pairs. This is
/// the bilinear (or any) discretization of A = diag(Lambda) - sum_r P_r P_r^*; see
/// `dplr_discretize`. The diagonal d comes as e = d - 1, because slow states live by the small
/// difference to 1, which rounding d to float32 would spoil. e_low is what rounding took from e:
/// forward applies e + e_low where that costs nothing.
///
/// Gradients, with g_t = dy_t and the adjoint q_t of x_t:
///   q_t = 2 sum_c conj(C_c) g_{c,t} + M^* q_{t+1} (+ dstate_out at the last valid position),
///   M^* q = q + conj(e) q - sum_r k_r <w_r, q>,  du_t = Re sum_n conj(b) q_t + sum_c D_c g_{c,t},
///   de = sum q_t conj(x_{t-1}),  dw_r = -sum <k_r, x_{t-1}> q_t,  dk_r = -sum <w_r, q_t> x_{t-1},
///   db = sum u_t q_t,  dC_c = 2 sum g_{c,t} conj(x_t),  dD_c = sum g_{c,t} u_t,
///   dstate_in = M^* q_0.
///
/// Complex operands are planes: [..., 2, H, N] holds the real parts, then the imaginary parts; C
/// has the pairs of its parameter. Forward saves the state that enters every chunk; backward
/// recomputes the states from them. One token is forward with L = 1 and state_out = state_in, or
/// dplr_scan_step.
/// Paper: arXiv:2111.00396 (S4).
#pragma once

#include "lrnn/ops/activation.hpp"

namespace lrnn {

inline constexpr std::int64_t kDplrScanChunk = 32;

/// Number of chunks that a sequence is cut into.
[[nodiscard]] constexpr std::int64_t dplr_scan_chunks(std::int64_t seqlen) {
  return (seqlen + kDplrScanChunk - 1) / kDplrScanChunk;
}

struct DplrScanForward {
  TensorView e;                         ///< [2, H, N], float32 (float64)
  TensorView e_low = {};                ///< [2, H, N], absent: 0
  TensorView w;                         ///< [R, 2, H, N]
  TensorView k;                         ///< [R, 2, H, N]
  TensorView b;                         ///< [2, H, N]
  TensorView C;                         ///< [C, H, N, 2] (re, im)
  TensorView D = {};                    ///< [C, H], absent: 0
  TensorView u;                         ///< [B, L, H]
  TensorView lengths = {};              ///< [B] int32
  TensorView state_in = {};             ///< [B, 2, H, N], float32 (float64); absent: 0
  MutableTensorView y;                  ///< [B, L, C H]; 0 at padding
  MutableTensorView state_out = {};     ///< [B, 2, H, N]; may be state_in
  MutableTensorView chunk_states = {};  ///< [B, chunks, 2, H, N], float32 (float64); saved
};

struct DplrScanBackward {
  TensorView e;                      ///< as in forward
  TensorView w;                      ///< as in forward
  TensorView k;                      ///< as in forward
  TensorView b;                      ///< as in forward
  TensorView C;                      ///< as in forward
  TensorView D = {};                 ///< as in forward
  TensorView u;                      ///< as in forward
  TensorView lengths = {};           ///< [B] int32
  TensorView dy;                     ///< [B, L, C H]
  TensorView chunk_states;           ///< [B, chunks, 2, H, N]
  TensorView dstate_out = {};        ///< [B, 2, H, N]; absent: 0
  MutableTensorView du;              ///< [B, L, H], overwritten
  MutableTensorView de = {};         ///< [2, H, N], accumulated into, as all below
  MutableTensorView dw = {};         ///< [R, 2, H, N]
  MutableTensorView dk = {};         ///< [R, 2, H, N]
  MutableTensorView db = {};         ///< [2, H, N]
  MutableTensorView dC = {};         ///< [C, H, N, 2]
  MutableTensorView dD = {};         ///< [C, H]
  MutableTensorView dstate_in = {};  ///< [B, 2, H, N], overwritten
};

/// One token, with the state in place and what an activation makes of the outputs, rounded before
/// it: y = f(y), or f(f(y)).
struct DplrScanStep {
  TensorView e;             ///< as in forward
  TensorView w;             ///< as in forward
  TensorView k;             ///< as in forward
  TensorView b;             ///< as in forward
  TensorView C;             ///< as in forward
  TensorView D = {};        ///< as in forward
  TensorView u;             ///< [B, 1, H]
  MutableTensorView y;      ///< [B, 1, C H]
  MutableTensorView state;  ///< [B, 2, H, N], float32 (float64), updated in place
  Activation activation = Activation::Identity;
  bool twice = false;
};

/// @throws ShapeError, DTypeError, DeviceError
void dplr_scan_forward(Context& ctx, const DplrScanForward& args);
void dplr_scan_backward(Context& ctx, const DplrScanBackward& args);
void dplr_scan_step(Context& ctx, const DplrScanStep& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void dplr_scan_forward(Context& ctx, const DplrScanForward& args);
void dplr_scan_backward(Context& ctx, const DplrScanBackward& args);
void dplr_scan_step(Context& ctx, const DplrScanStep& args);
}  // namespace cpu
namespace cuda {
void dplr_scan_forward(Context& ctx, const DplrScanForward& args);
void dplr_scan_backward(Context& ctx, const DplrScanBackward& args);
void dplr_scan_step(Context& ctx, const DplrScanStep& args);
}  // namespace cuda

}  // namespace lrnn
