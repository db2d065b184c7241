/// Softmax attention with grouped key/value heads, causal or not, over a chunk or a KV cache.
///
///   S = scale Q K^T,  masked;  P = softmax(S);  O = P V;  lse = log sum exp S
///
/// Query head h uses key/value head h / (Hq / Hk). Query t of sequence b stands at position
/// p = positions[b] + t; it sees keys j < positions[b] + lengths[b] and, if causal, j <= p. Without
/// positions keys and queries are the same chunk. Output and gradients are 0 at padding.
///
/// Backward (flash form), with Delta = dO . O:
///   dV = P^T dO,  dS = P (dO V^T - Delta) scale,  dQ = dS K,  dK = dS^T Q
/// dK and dV are sums over the query heads of a group, in a fixed order.
/// Papers: arXiv:2205.14135 (FlashAttention), arXiv:2305.13245 (grouped queries).
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

/// What both passes read. d is the head dimension, S the number of key slots.
struct AttentionInputs {
  TensorView q;               ///< [B, L, Hq d], rows may be column slices
  TensorView k;               ///< [B, S, Hk d], rows may be column slices
  TensorView v;               ///< [B, S, Hk d], rows may be column slices
  std::int64_t num_heads;     ///< Hq
  std::int64_t num_heads_kv;  ///< Hk, divides Hq
  double softmax_scale;       ///< usually 1 / sqrt(d)
  bool causal = true;
  TensorView lengths = {};    ///< [B] int32, valid queries
  TensorView positions = {};  ///< [B] int32, position of the first query; absent: 0 and S = L
};

struct AttentionForward {
  AttentionInputs in;
  MutableTensorView o;         ///< [B, L, Hq d], rows may be column slices
  MutableTensorView lse = {};  ///< [B, Hq, L], float32 (float64); saved for backward
};

struct AttentionBackward {
  AttentionInputs in;
  TensorView o;          ///< [B, L, Hq d]
  TensorView lse;        ///< [B, Hq, L]
  TensorView d_o;        ///< [B, L, Hq d]
  MutableTensorView dq;  ///< [B, L, Hq d], overwritten
  MutableTensorView dk;  ///< [B, S, Hk d], overwritten; 0 for keys nobody sees
  MutableTensorView dv;  ///< [B, S, Hk d], overwritten
};

/// @throws ShapeError, DTypeError, DeviceError
void attention_forward(Context& ctx, const AttentionForward& args);
void attention_backward(Context& ctx, const AttentionBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void attention_forward(Context& ctx, const AttentionForward& args);
void attention_backward(Context& ctx, const AttentionBackward& args);
}  // namespace cpu
namespace cuda {
void attention_forward(Context& ctx, const AttentionForward& args);
void attention_backward(Context& ctx, const AttentionBackward& args);
}  // namespace cuda

}  // namespace lrnn
