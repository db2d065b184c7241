/// Contractions of S7's projections, formed for a tile of tokens at a time by a GEMM.
///
/// A tile is P [tokens, H N], columns (h, n), sized to stay in L2 between the GEMM that writes it
/// and the contraction that reads it, so that HBM sees neither. What bounds these kernels is L2
/// bandwidth; the GEMM beside each takes about H / 40 times as long at bfloat16.
#pragma once

#include <algorithm>

#include "common/check.cuh"
#include "common/dtype.cuh"

namespace lrnn::cuda::s7 {

constexpr int kThreads = 256;

/// Tokens per tile: 24 MiB of projections, a constant so that sums do not depend on the device.
inline std::int64_t tile_tokens(std::int64_t columns, std::size_t element) {
  constexpr std::int64_t kTileBytes = std::int64_t{24} << 20;
  const std::int64_t n = kTileBytes / (columns * static_cast<std::int64_t>(element));
  return std::clamp<std::int64_t>(n / 64 * 64, 64, 1 << 15);
}

/// Elements per 16-byte access if `dstate` allows it, else 1.
template <class T>
int vector_width(std::int64_t dstate) {
  constexpr int wide = 16 / static_cast<int>(sizeof(T));
  return dstate % wide == 0 ? wide : 1;
}

template <class T, int kVec>
__device__ void load_vector(const T* __restrict__ p, float (&out)[kVec]) {
  if constexpr (kVec == 1) {
    out[0] = to_float(p[0]);
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const T* const values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = to_float(values[i]);
  }
}

/// out[t, n] = sum_h w[t, h] P[t, h, n] (+ bias[t, n]).
///
/// One block per token. Threads form groups; a group walks every groups-th channel, a thread owns
/// kVec neighbouring states; the partial sums of the groups are added in order.
template <class T, int kVec>
__global__ __launch_bounds__(kThreads) void contract_channels_kernel(
    const T* __restrict__ P, const T* __restrict__ w, const T* __restrict__ bias,
    std::int64_t bias_stride, float* __restrict__ out, int dim, int dstate) {
  __shared__ float partial[kThreads * kVec];
  const auto token = static_cast<std::int64_t>(blockIdx.x);
  const int vectors = dstate / kVec;
  const int lanes = min(vectors, kThreads);
  const int groups = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const T* const row = P + token * dim * dstate;
  const T* const weights = w + token * dim;
  for (int first = 0; first < vectors; first += lanes) {
    const int column = (first + lane) * kVec;
    const bool active = group < groups && first + lane < vectors;
    if (active) {
      float sum[kVec] = {};
      for (int h = group; h < dim; h += groups) {
        float p[kVec];
        load_vector<T, kVec>(row + static_cast<std::int64_t>(h) * dstate + column, p);
        const float weight = to_float(weights[h]);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] = fmaf(weight, p[i], sum[i]);
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) partial[(group * lanes + lane) * kVec + i] = sum[i];
    }
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < lanes * kVec; c += kThreads) {
      const int n = first * kVec + c;
      if (n >= dstate) continue;
      float total = bias != nullptr ? to_float(bias[token * bias_stride + n]) : 0.0F;
      for (int g = 0; g < groups; ++g) total += partial[g * lanes * kVec + c];
      out[token * dstate + n] = total;
    }
    __syncthreads();
  }
}

/// out[t, h] = add[t, h] + skip[t, h] x[t, h] + sum_n P[t, h, n] w[t, n], and 0 at padding.
///
/// One block per token. A power of two of neighbouring lanes serves one channel; they add by
/// butterfly.
template <class T, int kVec>
__global__ __launch_bounds__(kThreads) void contract_states_kernel(
    const T* __restrict__ P, const float* __restrict__ w, const T* __restrict__ skip,
    std::int64_t skip_stride, const T* __restrict__ x, const T* add,
    const std::int32_t* __restrict__ lengths, std::int64_t first_token, std::int64_t seqlen, T* out,
    int dim, int dstate, int lanes) {
  extern __shared__ float weights[];  // [dstate]
  const auto token = static_cast<std::int64_t>(blockIdx.x);
  for (int n = static_cast<int>(threadIdx.x); n < dstate; n += kThreads)
    weights[n] = w[token * dstate + n];
  __syncthreads();
  const std::int64_t position = first_token + token;
  const bool valid = lengths == nullptr || position % seqlen < lengths[position / seqlen];
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int per_pass = kThreads / lanes;
  const int passes = (dim + per_pass - 1) / per_pass;  // uniform, for the shuffles
  for (int pass = 0; pass < passes; ++pass) {
    const int h = pass * per_pass + static_cast<int>(threadIdx.x) / lanes;
    float sum = 0.0F;
    if (h < dim) {
      const T* const row = P + (token * dim + h) * dstate;
      for (int column = lane * kVec; column < dstate; column += lanes * kVec) {
        float p[kVec];
        load_vector<T, kVec>(row + column, p);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum = fmaf(p[i], weights[column + i], sum);
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(0xFFFFFFFFU, sum, offset);
    if (h < dim && lane == 0) {
      const std::int64_t i = token * dim + h;
      float total = fmaf(to_float(skip[token * skip_stride + h]), to_float(x[i]), sum);
      if (add != nullptr) total += to_float(add[i]);
      out[i] = from_float<T>(valid ? total : 0.0F);
    }
  }
}

/// out[t, h, n] = u[t, h] v[t, n]. One block per token.
template <class T>
__global__ __launch_bounds__(kThreads) void outer_kernel(const T* __restrict__ u,
                                                         const float* __restrict__ v,
                                                         T* __restrict__ out, int dim, int dstate) {
  extern __shared__ float states[];  // [dstate]
  const auto token = static_cast<std::int64_t>(blockIdx.x);
  for (int n = static_cast<int>(threadIdx.x); n < dstate; n += kThreads)
    states[n] = v[token * dstate + n];
  __syncthreads();
  T* const row = out + token * dim * dstate;
  const T* const channels = u + token * dim;
  const int count = dim * dstate;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
    row[i] = from_float<T>(to_float(channels[i / dstate]) * states[i % dstate]);
}

template <class T>
void contract_channels(cudaStream_t stream, std::int64_t tokens, const T* P, const T* w,
                       const T* bias, std::int64_t bias_stride, float* out, int dim, int dstate) {
  const auto blocks = static_cast<unsigned>(tokens);
  constexpr int wide = 16 / static_cast<int>(sizeof(T));
  if (vector_width<T>(dstate) == wide)
    contract_channels_kernel<T, wide>
        <<<blocks, kThreads, 0, stream>>>(P, w, bias, bias_stride, out, dim, dstate);
  else
    contract_channels_kernel<T, 1>
        <<<blocks, kThreads, 0, stream>>>(P, w, bias, bias_stride, out, dim, dstate);
  LRNN_CUDA_CHECK_LAUNCH();
}

/// Operands of contract_states that do not depend on the tile.
struct Padding {
  const std::int32_t* lengths;
  std::int64_t seqlen;
};

template <class T>
void contract_states(cudaStream_t stream, std::int64_t first_token, std::int64_t tokens, const T* P,
                     const float* w, const T* skip, std::int64_t skip_stride, const T* x,
                     const T* add, Padding padding, T* out, int dim, int dstate) {
  const auto blocks = static_cast<unsigned>(tokens);
  constexpr int wide = 16 / static_cast<int>(sizeof(T));
  const int vec = vector_width<T>(dstate);
  int lanes = 1;
  while (lanes < 32 && lanes * 2 * vec <= dstate) lanes *= 2;
  const std::size_t shared = static_cast<std::size_t>(dstate) * sizeof(float);
  const auto launch = [&](auto kernel) {
    if (shared > 48 * 1024)
      LRNN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared)));
    kernel<<<blocks, kThreads, shared, stream>>>(P, w, skip, skip_stride, x, add, padding.lengths,
                                                 first_token, padding.seqlen, out, dim, dstate,
                                                 lanes);
    LRNN_CUDA_CHECK_LAUNCH();
  };
  if (vec == wide)
    launch(contract_states_kernel<T, wide>);
  else
    launch(contract_states_kernel<T, 1>);
}

template <class T>
void outer(cudaStream_t stream, std::int64_t tokens, const T* u, const float* v, T* out, int dim,
           int dstate) {
  const std::size_t shared = static_cast<std::size_t>(dstate) * sizeof(float);
  if (shared > 48 * 1024)
    LRNN_CUDA_CHECK(cudaFuncSetAttribute(
        outer_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  outer_kernel<T>
      <<<static_cast<unsigned>(tokens), kThreads, shared, stream>>>(u, v, out, dim, dstate);
  LRNN_CUDA_CHECK_LAUNCH();
}

/// a_t = 1 - 1 / (A_t^2 + 0.5).
__device__ inline float multiplier(float A) {
  return 1.0F - 1.0F / fmaf(A, A, 0.5F);
}

/// Time steps of one chunk of the scans, which run one thread per (batch, chunk, state): short,
/// since a thread waits for its loads, and there are few threads.
constexpr int kChunk = 64;
/// Steps whose operands a thread asks for at once.
constexpr int kAhead = 8;

struct Chunks {
  int batch, chunks, dstate;
  std::int64_t seqlen;
  const std::int32_t* lengths;

  __host__ __device__ std::int64_t count() const {
    return static_cast<std::int64_t>(batch) * chunks * dstate;
  }
  __device__ std::int64_t length(int b) const { return lengths != nullptr ? lengths[b] : seqlen; }
};

}  // namespace lrnn::cuda::s7
