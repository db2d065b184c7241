/// Input-dependent recurrence of S7 in factored form.
///
///   [pA | pB | pC | pD | bias]_t = x_t W^T          rows of W: [N | H N | H N | H | N]
///   A_t = pA_t + base,   a_t = 1 - 1 / (A_t^2 + 0.5)
///   s_t[n] = a_t[n] s_{t-1}[n] + sum_h pB_t[h, n] x_t[h] + bias_t[n]
///   y_t[h] = sum_n pC_t[h, n] s_t[n] + pD_t[h] x_t[h]
///
/// One state vector of N numbers serves all channels. pB and pC, of size H N per token, exist for a
/// bounded tile of tokens at a time only; what is saved is A and s, both [B, L, N].
/// Paper: Soydan et al., "S7: Selective and Simplified State Space Layers for Sequence Modeling",
/// arXiv:2410.03464. Matches: lrnnx/models/ltv/s7.py.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct S7ScanForward {
  TensorView x;                      ///< [B, L, H]
  TensorView weight;                 ///< [2 H N + H + 2 N, H], dtype of x
  TensorView base;                   ///< [N], float32 (float64)
  TensorView lengths = {};           ///< [B] int32
  TensorView state_in = {};          ///< [B, N], float32 (float64); absent: 0
  MutableTensorView y;               ///< [B, L, H]; zero at padding
  MutableTensorView state_out = {};  ///< [B, N], float32 (float64); may be state_in
  MutableTensorView A = {};          ///< [B, L, N], float32 (float64); saved for backward
  MutableTensorView s = {};          ///< [B, L, N], float32 (float64); saved for backward
};

struct S7ScanBackward {
  TensorView dy;                     ///< [B, L, H]; ignored at padding
  TensorView x;                      ///< [B, L, H]
  TensorView weight;                 ///< [2 H N + H + 2 N, H]
  TensorView A;                      ///< [B, L, N]
  TensorView s;                      ///< [B, L, N]
  TensorView lengths = {};           ///< [B] int32
  TensorView state_in = {};          ///< [B, N]
  TensorView dstate_out = {};        ///< [B, N], float32 (float64); absent: 0
  MutableTensorView dx;              ///< [B, L, H], overwritten
  MutableTensorView dweight;         ///< as weight, float32 (float64), accumulated into
  MutableTensorView dbase;           ///< [N], float32 (float64), accumulated into
  MutableTensorView dstate_in = {};  ///< [B, N], overwritten
};

/// One token: s7_scan_forward with L = 1 and the state in place.
struct S7ScanStep {
  TensorView x;             ///< [B, 1, H]
  TensorView weight;        ///< [2 H N + H + 2 N, H]
  TensorView base;          ///< [N]
  MutableTensorView y;      ///< [B, 1, H]
  MutableTensorView state;  ///< [B, N], updated in place
};

/// @throws ShapeError, DTypeError, DeviceError
void s7_scan_forward(Context& ctx, const S7ScanForward& args);
void s7_scan_backward(Context& ctx, const S7ScanBackward& args);
void s7_scan_step(Context& ctx, const S7ScanStep& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void s7_scan_forward(Context& ctx, const S7ScanForward& args);
void s7_scan_backward(Context& ctx, const S7ScanBackward& args);
}  // namespace cpu
namespace cuda {
void s7_scan_forward(Context& ctx, const S7ScanForward& args);
void s7_scan_backward(Context& ctx, const S7ScanBackward& args);
}  // namespace cuda

}  // namespace lrnn
