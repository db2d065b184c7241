/// Contractions of S7's projections, formed for a tile of tokens at a time by a GEMM.
///
/// A tile is P [tokens, H N], columns (h, n). Where weights are few it stays in L2 between the GEMM
/// that writes it and the contraction that reads it; where they are many it is larger, because
/// every tile reads all of them. The contractions are bound by the bandwidth of that memory; the
/// GEMM beside each takes about H / 40 times as long at bfloat16.
#pragma once

#include <algorithm>

#include "common/check.cuh"
#include "common/dtype.cuh"

namespace lrnn::cuda::s7 {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

/// Tokens per tile, from the sizes alone so that sums do not depend on the device: 24 MiB of
/// projections if these outnumber the weights by two to one, else up to 192 MiB.
inline std::int64_t tile_tokens(std::int64_t dim, std::int64_t dstate, std::size_t element) {
  constexpr std::int64_t kResidentBytes = std::int64_t{24} << 20;
  constexpr std::int64_t kMostBytes = std::int64_t{192} << 20;
  const std::int64_t token_bytes = dim * dstate * static_cast<std::int64_t>(element);
  const std::int64_t resident = kResidentBytes / token_bytes;
  const std::int64_t n = resident >= 2 * dim ? resident : kMostBytes / token_bytes;
  return std::clamp<std::int64_t>(n / 64 * 64, 64, 1 << 15);
}

/// Elements per 16-byte access if `dstate` allows it, else 1.
template <class T>
int vector_width(std::int64_t dstate) {
  constexpr int wide = 16 / static_cast<int>(sizeof(T));
  return dstate % wide == 0 ? wide : 1;
}

/// kVec elements as they lie in memory: 1, or 16 bytes. Loads of several stay together in front of
/// the arithmetic only if nothing is converted between them.
template <class T, int kVec>
struct Raw {
  uint4 bits = {};
  __device__ __forceinline__ void load(const T* p) { bits = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ float operator[](int i) const {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    const int at = i / kPerWord;
    const unsigned word = at == 0 ? bits.x : at == 1 ? bits.y : at == 2 ? bits.z : bits.w;
    if constexpr (kPerWord == 1)
      return __uint_as_float(word);
    else
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xFFFF0000U);
  }
};
template <class T>
struct Raw<T, 1> {
  float value = 0.0F;
  __device__ __forceinline__ void load(const T* p) { value = to_float(*p); }
  __device__ __forceinline__ float operator[](int) const { return value; }
};

/// Channels that a group of lanes loads at once.
constexpr int kRows = 4;

/// Lanes of a warp that serve the states of one channel, a power of two, and warps that serve one
/// token: enough for every lane to have several accesses in flight.
struct Teams {
  int lanes;
  int warps;

  Teams(int dim, int dstate, int vec) : lanes(1), warps(1) {
    while (lanes < 32 && lanes * 2 * vec <= dstate) lanes *= 2;
    constexpr std::int64_t kAccesses = 8;
    const std::int64_t accesses = static_cast<std::int64_t>(dim) * dstate / (32 * vec);
    while (warps < kWarps && warps * 2 * kAccesses <= accesses) warps *= 2;
  }
  [[nodiscard]] unsigned blocks(std::int64_t tokens) const {
    const std::int64_t per_block = kWarps / warps;
    return static_cast<unsigned>((tokens + per_block - 1) / per_block);
  }
};

/// Where a thread stands: `member` is its warp in the team that serves `token`.
struct Seat {
  int lane, member;
  std::int64_t token;

  __device__ explicit Seat(int team_warps)
      : lane(static_cast<int>(threadIdx.x) % 32),
        member(static_cast<int>(threadIdx.x) / 32 % team_warps),
        token(static_cast<std::int64_t>(blockIdx.x) * (kWarps / team_warps) +
              static_cast<int>(threadIdx.x) / 32 / team_warps) {}
};

/// out[t, n] = sum_h w[t, h] P[t, h, n] (+ bias[t, n]).
///
/// The groups of lanes of a team walk the channels in turn, a lane owns kVec neighbouring states.
/// Groups of a warp add by butterfly, the warps of a team in order.
template <class T, int kVec>
__global__ __launch_bounds__(kThreads) void contract_channels_kernel(
    const T* __restrict__ P, const T* __restrict__ w, const T* __restrict__ bias,
    std::int64_t bias_stride, float* __restrict__ out, std::int64_t tokens, int dim, int dstate,
    Teams team) {
  __shared__ float partial[kWarps][32 * kVec];
  const Seat at(team.warps);
  const int step = team.warps * (32 / team.lanes);
  const bool exists = at.token < tokens;
  const T* const row = P + at.token * dim * dstate;
  const T* const weights = w + at.token * dim;
  const int groups = 32 / team.lanes;
  const int lane = at.lane % team.lanes;
  for (int first = 0; first < dstate; first += team.lanes * kVec) {
    const int column = first + lane * kVec;
    float sum[kVec] = {};
    if (exists && column < dstate) {
      for (int begin = at.member * groups + at.lane / team.lanes; begin < dim;
           begin += kRows * step) {
        Raw<T, kVec> p[kRows];
        Raw<T, 1> weight[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int h = begin + r * step;
          if (h >= dim) continue;
          p[r].load(row + static_cast<std::int64_t>(h) * dstate + column);
          weight[r].load(weights + h);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum[i] = fmaf(weight[r][0], p[r][i], sum[i]);
      }
    }
    for (int offset = team.lanes; offset < 32; offset *= 2)
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += __shfl_xor_sync(0xFFFFFFFFU, sum[i], offset);
    if (at.lane < team.lanes)
#pragma unroll
      for (int i = 0; i < kVec; ++i) partial[threadIdx.x / 32][i * 32 + lane] = sum[i];
    __syncthreads();
    if (at.member == 0 && exists && at.lane < team.lanes && column < dstate)
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const int n = column + i;
        float total = bias != nullptr ? to_float(bias[at.token * bias_stride + n]) : 0.0F;
        for (int m = 0; m < team.warps; ++m) total += partial[threadIdx.x / 32 + m][i * 32 + lane];
        out[at.token * dstate + n] = total;
      }
    __syncthreads();
  }
}

/// out[t, h] = skip[t, h] x[t, h] + sum_n P[t, h, n] w[t, n], and 0 at padding.
///
/// The groups of lanes of a team serve one channel each; their lanes add by butterfly.
template <class T, int kVec>
__global__ __launch_bounds__(kThreads) void contract_states_kernel(
    const T* __restrict__ P, const float* __restrict__ w, const T* __restrict__ skip,
    std::int64_t skip_stride, const T* __restrict__ x, const std::int32_t* __restrict__ lengths,
    std::int64_t first_token, std::int64_t seqlen, T* __restrict__ out, std::int64_t tokens,
    int dim, int dstate, Teams team) {
  const Seat at(team.warps);
  if (at.token >= tokens) return;
  const std::int64_t position = first_token + at.token;
  const bool valid = lengths == nullptr || position % seqlen < lengths[position / seqlen];
  const float* const weights = w + at.token * dstate;
  const int groups = 32 / team.lanes;
  const int lane = at.lane % team.lanes;
  const int step = team.warps * groups;
  // The bound is that of the first group, so that all lanes reach the shuffles.
  for (int begin = at.member * groups; begin < dim; begin += kRows * step) {
    const int channel = begin + at.lane / team.lanes;
    float sum[kRows] = {};
    for (int column = lane * kVec; column < dstate; column += team.lanes * kVec) {
      float weight[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) weight[i] = weights[column + i];
      Raw<T, kVec> p[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (channel + r * step < dim)
          p[r].load(P + (at.token * dim + channel + r * step) * dstate + column);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[r] = fmaf(p[r][i], weight[i], sum[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (int offset = team.lanes / 2; offset > 0; offset /= 2)
        sum[r] += __shfl_xor_sync(0xFFFFFFFFU, sum[r], offset);
      const int h = channel + r * step;
      if (h >= dim || lane != r % team.lanes) continue;
      const std::int64_t i = at.token * dim + h;
      const float total = fmaf(to_float(skip[at.token * skip_stride + h]), to_float(x[i]), sum[r]);
      out[i] = from_float<T>(valid ? total : 0.0F);
    }
  }
}

template <class T>
void contract_channels(cudaStream_t stream, std::int64_t tokens, const T* P, const T* w,
                       const T* bias, std::int64_t bias_stride, float* out, int dim, int dstate) {
  constexpr int wide = 16 / static_cast<int>(sizeof(T));
  const int vec = vector_width<T>(dstate);
  const Teams team(dim, dstate, vec);
  const auto launch = [&](auto kernel) {
    kernel<<<team.blocks(tokens), kThreads, 0, stream>>>(P, w, bias, bias_stride, out, tokens, dim,
                                                         dstate, team);
    LRNN_CUDA_CHECK_LAUNCH();
  };
  if (vec == wide)
    launch(contract_channels_kernel<T, wide>);
  else
    launch(contract_channels_kernel<T, 1>);
}

/// Operands of contract_states that do not depend on the tile.
struct Padding {
  const std::int32_t* lengths;
  std::int64_t seqlen;
};

template <class T>
void contract_states(cudaStream_t stream, std::int64_t first_token, std::int64_t tokens, const T* P,
                     const float* w, const T* skip, std::int64_t skip_stride, const T* x,
                     Padding padding, T* out, int dim, int dstate) {
  constexpr int wide = 16 / static_cast<int>(sizeof(T));
  const int vec = vector_width<T>(dstate);
  const Teams team(dim, dstate, vec);
  const auto launch = [&](auto kernel) {
    kernel<<<team.blocks(tokens), kThreads, 0, stream>>>(
        P, w, skip, skip_stride, x, padding.lengths, first_token, padding.seqlen, out, tokens, dim,
        dstate, team);
    LRNN_CUDA_CHECK_LAUNCH();
  };
  if (vec == wide)
    launch(contract_states_kernel<T, wide>);
  else
    launch(contract_states_kernel<T, 1>);
}

/// 1 / (A_t^2 + 0.5) to 2 units in the last place. The exact division is a call, across which the
/// operands of other steps would leave the registers; its argument is at least 0.5.
__device__ __forceinline__ float damping(float A) {
  return __fdividef(1.0F, fmaf(A, A, 0.5F));
}
/// a_t = 1 - 1 / (A_t^2 + 0.5).
__device__ __forceinline__ float multiplier(float A) {
  return 1.0F - damping(A);
}

/// Scans run one block per segment of a sequence and kScanStates states, a thread owning one state
/// of one chunk, whose operands it holds in registers. A first kernel finds what each segment does
/// to the state, a second begins with those of all segments before.
constexpr int kScanStates = 16;
constexpr int kScanChunks = 16;
constexpr int kScanSteps = 16;  // of a chunk
constexpr int kScanThreads = kScanStates * kScanChunks;

struct ScanSeat;
struct Sequences {
  int batch, dstate;
  std::int64_t seqlen;
  const std::int32_t* lengths;

  __host__ __device__ int groups() const { return (dstate + kScanStates - 1) / kScanStates; }
  __host__ __device__ std::int64_t segments() const {
    constexpr int kSegment = kScanChunks * kScanSteps;
    return (seqlen + kSegment - 1) / kSegment;
  }
  /// Of all, for states filled up to groups.
  [[nodiscard]] std::int64_t segment_count() const {
    return batch * segments() * groups() * kScanStates;
  }
  [[nodiscard]] unsigned blocks() const {
    return static_cast<unsigned>(batch * segments() * groups());
  }
  __device__ std::int64_t segment_at(const ScanSeat& at, std::int64_t segment) const;
};

/// What a thread of a scan owns.
struct ScanSeat {
  int state, chunk, n;
  std::int64_t b, segment;
  bool exists;
  std::int64_t valid;   // steps of the sequence
  std::int64_t origin;  // of (b, step 0, n) in [B, L, N]
  std::int64_t row;     // of (b, n) in [B, N]

  __device__ explicit ScanSeat(const Sequences& z)
      : state(static_cast<int>(threadIdx.x) % kScanStates),
        chunk(static_cast<int>(threadIdx.x) / kScanStates),
        n(static_cast<int>(blockIdx.x) % z.groups() * kScanStates + state),
        b(blockIdx.x / static_cast<unsigned>(z.groups()) / z.segments()),
        segment(blockIdx.x / static_cast<unsigned>(z.groups()) % z.segments()),
        exists(n < z.dstate),
        valid(z.lengths != nullptr ? z.lengths[b] : z.seqlen),
        origin(b * z.seqlen * z.dstate + n),
        row(b * z.dstate + n) {}
  __device__ std::int64_t first() const { return (segment * kScanChunks + chunk) * kScanSteps; }
};

__device__ inline std::int64_t Sequences::segment_at(const ScanSeat& at,
                                                     std::int64_t segment) const {
  return (at.b * segments() + segment) * groups() * kScanStates + at.n;
}

/// The valid steps of a thread's chunk. Others read the first one, or that of the sequence: with
/// loads under conditions the compiler would wait for one before it starts the next.
struct Window {
  std::int64_t place;  // of the first step, in [B, L, N]
  int valid;
  int dstate;

  __device__ Window(const ScanSeat& at, const Sequences& z, std::int64_t first)
      : valid(static_cast<int>(
            max(std::int64_t{0}, min(at.valid - first, std::int64_t{kScanSteps})))),
        dstate(z.dstate) {
    const std::int64_t spare = at.exists ? 0 : z.dstate - 1 - at.n;
    place = at.origin + spare + (valid > 0 ? first * z.dstate : 0);
  }
  __device__ __forceinline__ void load(const float* p, float (&out)[kScanSteps]) const {
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) out[k] = p[place + (k < valid ? k : 0) * dstate];
  }
};

/// out = product * in + sum, of one chunk.
struct Affine {
  float product, sum;

  __device__ __forceinline__ float apply(float in) const { return fmaf(product, in, sum); }
  /// This one after `before`.
  __device__ __forceinline__ Affine after(const Affine& before) const {
    return {product * before.product, fmaf(product, before.sum, sum)};
  }
};

}  // namespace lrnn::cuda::s7
