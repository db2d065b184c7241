/// The real-gated linear recurrent unit of Griffin, one state per channel.
///
///   r_t = sig(pre_r_t),   i_t = sig(pre_i_t)
///   log a_t = -c r_t softplus(-a_log)
///   h_t = a_t h_{t-1} + sqrt(-expm1(2 log a_t)) i_t v_t
///
/// The gradient of the square root is unbounded as a_t -> 1, but reaches a parameter only as a
/// product with log a_t, which is bounded. Backward computes that product without a clamp:
///   m = sqrt(-expm1(2 log a)),  q = log a / m (0 where m = 0),  g_t = dh_t + a_{t+1} g_{t+1}
///   t = g (log a a h_{t-1} - i v a^2 q),  dpre_r = (1 - r) t,
///   da_log = sig(-a_log) / log sig(a_log) sum t
///
/// The state that enters every chunk of kRglruScanChunk tokens is saved; backward recomputes the
/// states inside a chunk.
/// Paper: De et al., "Griffin", arXiv:2402.19427. Matches: lrnnx/models/ltv/rglru.py.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

inline constexpr std::int64_t kRglruScanChunk = 8;

/// Number of chunks that a sequence is cut into.
[[nodiscard]] constexpr std::int64_t rglru_scan_chunks(std::int64_t seqlen) {
  return (seqlen + kRglruScanChunk - 1) / kRglruScanChunk;
}

/// What all passes read. Rows may be column slices of wider tensors.
struct RglruScanInputs {
  TensorView v;              ///< [B, L, E]
  TensorView pre_r;          ///< [B, L, E], recurrence gate before the sigmoid
  TensorView pre_i;          ///< [B, L, E], input gate before the sigmoid
  TensorView a_log;          ///< [E], float32 (float64): logit of the multiplier at c r = 1
  double c = 8.0;            ///< > 0
  TensorView lengths = {};   ///< [B] int32
  TensorView state_in = {};  ///< [B, E], float32 (float64); absent: 0
};

struct RglruScanForward {
  RglruScanInputs in;
  MutableTensorView h;                  ///< [B, L, E]; zero at padding
  MutableTensorView state_out = {};     ///< [B, E], float32 (float64); may be in.state_in
  MutableTensorView chunk_states = {};  ///< [B, chunks, E], float32 (float64); saved
};

struct RglruScanBackward {
  RglruScanInputs in;                ///< state_in is not read
  TensorView dh;                     ///< [B, L, E]; ignored at padding
  TensorView chunk_states;           ///< [B, chunks, E]
  TensorView dstate_out = {};        ///< [B, E], float32 (float64); absent: 0
  MutableTensorView dv;              ///< [B, L, E], overwritten
  MutableTensorView dpre_r;          ///< [B, L, E], overwritten
  MutableTensorView dpre_i;          ///< [B, L, E], overwritten
  MutableTensorView da_log;          ///< [E], float32 (float64), accumulated into
  MutableTensorView dstate_in = {};  ///< [B, E], float32 (float64), overwritten
};

/// One token: rglru_scan_forward with L = 1 and the state in place.
struct RglruScanStep {
  RglruScanInputs in;       ///< state_in and lengths absent
  MutableTensorView h;      ///< [B, 1, E]
  MutableTensorView state;  ///< [B, E], updated in place
};

/// @throws ShapeError, DTypeError, DeviceError, InvalidArgument
void rglru_scan_forward(Context& ctx, const RglruScanForward& args);
void rglru_scan_backward(Context& ctx, const RglruScanBackward& args);
void rglru_scan_step(Context& ctx, const RglruScanStep& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void rglru_scan_forward(Context& ctx, const RglruScanForward& args);
void rglru_scan_backward(Context& ctx, const RglruScanBackward& args);
}  // namespace cpu
namespace cuda {
void rglru_scan_forward(Context& ctx, const RglruScanForward& args);
void rglru_scan_backward(Context& ctx, const RglruScanBackward& args);
}  // namespace cuda

}  // namespace lrnn
