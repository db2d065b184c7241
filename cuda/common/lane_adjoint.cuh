/// The adjoint of one sub-state of lane_scan through a chunk, for its backward kernels. Formulas:
/// lane_scan_backward.cu.
#pragma once

#include "common/lane_scan.cuh"

namespace lrnn::cuda::lane {

constexpr int kMinAdjointParts = 4;  // at most 32 lanes in a block

template <class T>
struct BackwardArgs {
  Sizes sizes;
  const float* a;
  const float* a_low;
  const float* W;
  const float* skip;
  const T* v;
  const std::int32_t* lengths;
  const T* dy;
  const float* chunk_states;
  const float* dstate_out;
  T* dv;
  float* dv_sums;        // dv over several groups, float32 [B, L, I]: dv itself if it is float32
  float* dstate_in;      // may be null
  float* partial;        // [B S, 1 + C, 2, N, M]: da, then dW of every channel
  float* partial_skip;   // [B S, C, N]; may be null
  float* ends;           // step 1
  const float* carries;  // step 3; null with one segment
  float2* columns;       // null: in shared memory
  std::int64_t values;   // column_values
};

// conj(a) p
__device__ __forceinline__ float2 retreat(float2 a, float2 p) {
  return multiply_conj_add(p, a, {0.0F, 0.0F});
}
// sum += c v with real v
__device__ __forceinline__ void add_scaled(float2& sum, float2 c, float v) {
  sum.x = fmaf(c.x, v, sum.x);
  sum.y = fmaf(c.y, v, sum.y);
}

// What the outputs of a group add to the adjoint of the state before it.
__device__ __forceinline__ float2 pull_back(const float2 (&U)[kGroup], float4 g) {
  float2 out{U[0].x * g.x, -U[0].y * g.x};
  add_scaled(out, {U[1].x, -U[1].y}, g.y);
  add_scaled(out, {U[2].x, -U[2].y}, g.z);
  add_scaled(out, {U[3].x, -U[3].y}, g.w);
  return out;
}

// The adjoint of one sub-state and the gradients of a chunk.
struct Adjoint {
  float2 carry;
  float2 dpowers[kGroup]{};
  float2 dU[kGroup]{};

  __device__ __forceinline__ void read_out(float2 x, float4 g) {
    const float2 conjugate{x.x, -x.y};
    add_scaled(dU[0], conjugate, g.x);
    add_scaled(dU[1], conjugate, g.y);
    add_scaled(dU[2], conjugate, g.z);
    add_scaled(dU[3], conjugate, g.w);
  }
  // A whole group with state x before it, whose outputs pull back `pulled`.
  __device__ __forceinline__ void group(const Powers& a, float2 x, float4 v, float2 pulled,
                                        float* dv) {
    dv[3] += carry.x;
    dv[2] = fmaf(a.of[0].x, carry.x, fmaf(a.of[0].y, carry.y, dv[2]));
    dv[1] = fmaf(a.of[1].x, carry.x, fmaf(a.of[1].y, carry.y, dv[1]));
    dv[0] = fmaf(a.of[2].x, carry.x, fmaf(a.of[2].y, carry.y, dv[0]));
    dpowers[3] = multiply_conj_add(carry, x, dpowers[3]);
    add_scaled(dpowers[2], carry, v.x);
    add_scaled(dpowers[1], carry, v.y);
    add_scaled(dpowers[0], carry, v.z);
    carry = multiply_conj_add(carry, a.of[3], pulled);
  }
  // The last `count` < 4 tokens of a sequence.
  __device__ __forceinline__ void tokens(float2 a, float2 x, float4 v, int count, float2 pulled,
                                         float* dv) {
    const float2 second = advance(a, x, v.x);
    const float2 third = advance(a, second, v.y);
    if (count > 2) token(a, third, dv[2]);
    if (count > 1) token(a, second, dv[1]);
    token(a, x, dv[0]);
    carry = carry + pulled;
  }
  __device__ __forceinline__ void token(float2 a, float2 x, float& dv) {
    dv += carry.x;
    dpowers[0] = multiply_conj_add(carry, x, dpowers[0]);
    carry = retreat(a, carry);
  }
};

// One sub-state through a chunk and back. Tokens from `steps` on do not exist: v and g are 0 there.
template <bool kFull>
__device__ __forceinline__ void walk_back(Adjoint& adjoint, const Powers& a,
                                          const float2 (&U)[kGroup], float2 x, const float* tokens,
                                          const float* gradients, int steps, float (&dv)[kChunk]) {
  float2 before[kChunk / kGroup];
#pragma unroll
  for (int q = 0; q < kChunk / kGroup; ++q) {
    before[q] = x;
    if (kFull || kGroup * (q + 1) <= steps)
      x = advance_group(a, x, *reinterpret_cast<const float4*>(tokens + kGroup * q));
  }
#pragma unroll
  for (int q = kChunk / kGroup - 1; q >= 0; --q) {
    if (!kFull && kGroup * q >= steps) continue;
    const float4 v = *reinterpret_cast<const float4*>(tokens + kGroup * q);
    const float4 g = *reinterpret_cast<const float4*>(gradients + kGroup * q);
    adjoint.read_out(before[q], g);
    const float2 pulled = pull_back(U, g);
    if (kFull || kGroup * (q + 1) <= steps)
      adjoint.group(a, before[q], v, pulled, dv + kGroup * q);
    else
      adjoint.tokens(a.of[0], before[q], v, steps - kGroup * q, pulled, dv + kGroup * q);
  }
}

[[nodiscard]] __device__ inline float2 scaled(int factor, float2 value) {
  return {static_cast<float>(factor) * value.x, static_cast<float>(factor) * value.y};
}
// da from the gradients of a to a^4: that of a^k contributes k conj(a^{k-1}).
__device__ inline float2 fold_powers(const Powers& a, const float2 (&dpowers)[kGroup]) {
  float2 da = dpowers[0];
#pragma unroll
  for (int k = 1; k < kGroup; ++k)
    da = multiply_conj_add(dpowers[k], scaled(k + 1, a.of[k - 1]), da);
  return da;
}
// dW from the gradients of U_j = W a^{j+1} and K_d = Re(W a^d); adds what they are to da.
__device__ inline float2 fold_weight(const Powers& a, float2 W, const float2 (&dU)[kGroup],
                                     const float (&dK)[kGroup], float2& da) {
  float2 dW{dK[0], 0.0F};
  float2 inner{dU[0].x + dK[1], dU[0].y};  // da / conj(W)
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    float2 gradient = dU[k];  // by W a^{k+1}
    if (k + 1 < kGroup) gradient.x += dK[k + 1];
    dW = multiply_conj_add(gradient, a.of[k], dW);
    if (k > 0) inner = multiply_conj_add(gradient, scaled(k + 1, a.of[k - 1]), inner);
  }
  da = multiply_conj_add(inner, W, da);
  return dW;
}

}  // namespace lrnn::cuda::lane
