// Backward. Ownership: common/selective_scan.cuh.
//
// A block walks the chunks of its segment from the right. A chunk is replayed from its saved state,
// which leaves a state every kSubTile steps in shared memory; from there the states and multipliers
// of kSubTile steps are recomputed into registers and the adjoint g runs through them:
//   g_t = C_t dy_t + a_{t+1} g_{t+1},   dy already multiplied by the gate.
// dB and dC are sums over channels: shuffles add the channels of a warp, shared memory the warps of
// a block, and a second kernel the tiles of channels, all in fixed order.
// Bound by issue slots: about 17 instructions for the recurrence and 7 for dB, dC per state.
#include "common/selective_scan.cuh"

namespace lrnn::cuda {
namespace selective {
namespace {

constexpr int kSubTile = 8;  // steps whose states are in registers
constexpr int kGroup = 4;    // steps whose sums over states are added at once

/// How the backward pass splits a chunk: kSteps per staged window, kAdded steps per addition of the
/// parts of dB and dC, kBlocks blocks per multiprocessor to leave registers for.
template <class L, int kSteps_, int kAdded_, int kBlocks_>
struct Plan : L {
  using Base = L;
  static constexpr int kSteps = kSteps_;
  static constexpr int kAdded = kAdded_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kSums = 2 * L::kN;  // dB and dC of one step
};

template <class T, class P, bool kGeneral>
struct BackwardShared {
  alignas(16) T u[P::kSteps][P::kChannels];   // replaced by du
  alignas(16) T dt[P::kSteps][P::kChannels];  // replaced by ddt
  alignas(16) T z[P::kSteps][P::kChannels];   // replaced by dz
  alignas(16) T dy[P::kSteps][P::kChannels];
  alignas(16) T raw_B[P::kSteps][P::kN];
  alignas(16) T raw_C[P::kSteps][P::kN];
  alignas(16) float2 drive[P::kSteps][P::kChannels];  // delta and delta u; general: delta and u
  alignas(16) float gated_dy[P::kSteps][P::kChannels];
  alignas(16) float B[P::kSteps][P::kN];
  alignas(16) float C[P::kSteps][P::kN];
  alignas(16) float states[kChunk / kSubTile][P::kThreads][P::kStates];
  alignas(16) float sums[P::kWarps][P::kAdded][P::kSums];
  alignas(16) float alpha[kGeneral ? P::kSteps : 1][P::kChannels];
  alignas(16) float dtau[kGeneral ? P::kSteps : 1][P::kChannels];
};

template <class T>
struct BackwardArgs {
  Operands<T> in;
  DeviceRows<const T> dy;
  const float* chunk_states;
  const float* starts;  // gradients that enter the segments from the right [B, S, E, N], or null
  DeviceRows<T> du, ddt, dz;
  float* dstate_in;
  float* dBC = nullptr;       // [tiles, B, L, 2, N]
  float* dtau = nullptr;      // [tiles, B, L]; event mode
  float* dA_log = nullptr;    // [B, S, E, N]
  float* dvectors = nullptr;  // [B, S, 3, E]: dt_bias, D, dtA_bias
  float* ends = nullptr;      // step 1
  float* products = nullptr;  // step 1

  BackwardArgs(const SelectiveScanBackward& a, const Sizes& sizes)
      : in(a.in, sizes),
        dy(device_rows<T>(a.dy)),
        chunk_states(a.chunk_states.data<float>()),
        starts(data_or_null<float>(a.dstate_out)),
        du(device_rows<T>(a.du)),
        ddt(device_rows<T>(a.ddt)),
        dz(a.dz ? device_rows<T>(a.dz) : DeviceRows<T>{nullptr, 0}),
        dstate_in(data_or_null<float>(a.dstate_in)) {}
};

/// d/dA of expm1(delta A) / A = delta^2 psi(x), x = delta A, psi(x) = ((x - 1) e^x + 1) / x^2,
/// which is the sum over k of x^k / (k! (k + 2)).
__device__ float zoh_factor_dA(float delta, float A) {
  const float x = delta * A;
  float psi = 0.0F;
  if (fabsf(x) < 0.5F) {
    float term = 1.0F;
    for (int k = 0; k < 10; ++k) {
      psi += term / static_cast<float>(k + 2);
      term *= x / static_cast<float>(k + 1);
    }
  } else {
    psi = ((x - 1.0F) * expf(x) + 1.0F) / (x * x);
  }
  return delta * delta * psi;
}

/// Adds the gradients that da and dk mean for alpha, delta and A; returns that of A.
__device__ __forceinline__ float chain_rule(Disc disc, float da, float dk, float a, float alpha,
                                            float delta, float A, float& dalpha, float& ddelta) {
  if (disc == Disc::Bilinear) {
    const float ra = 1.0F / (1.0F - 0.5F * alpha * A);
    const float rk = 1.0F / (1.0F - 0.5F * delta * A);
    dalpha = fmaf(da * A, ra * ra, dalpha);
    ddelta = fmaf(dk * rk, rk, ddelta);
    return da * alpha * ra * ra + 0.5F * dk * delta * delta * rk * rk;
  }
  dalpha = fmaf(da * a, A, dalpha);
  float dA = da * a * alpha;
  if (disc == Disc::Mamba) ddelta += dk;
  if (disc == Disc::Zoh) {
    ddelta = fmaf(dk, expf(delta * A), ddelta);
    dA = fmaf(dk, zoh_factor_dA(delta, A), dA);
  }
  return dA;
}

/// The work of one block. kEnds: step 1, which only runs g to the left end of the segment.
template <class T, class P, bool kGeneral, bool kEnds>
struct Backward {
  using L = typename P::Base;
  using Shared = BackwardShared<T, P, kGeneral>;
  static constexpr int kThreads = P::kThreads;
  static constexpr int kSteps = P::kSteps;
  static constexpr int kStates = P::kStates;
  static constexpr int kWindows = kChunk / kSteps;
  static_assert(kSteps % P::kAdded == 0 && P::kAdded % kGroup == 0 && P::kLanes >= kGroup);

  const BackwardArgs<T>& p;
  const Place<L>& at;
  Shared& s;
  float A[kStates];  // times log2(e) unless general
  float g[kStates];  // a_{t+1} g_{t+1}
  float dA[kStates] = {};
  float product[kGeneral && kEnds ? kStates : 1];
  float delta_sum = 0.0F;
  float dD = 0.0F;
  float dbias = 0.0F;
  float drate = 0.0F;
  float D;
  float bias;
  float rate = 0.0F;
  // Channel of the calling thread while a window is prepared.
  int column;
  float column_bias;
  float column_rate = 0.0F;

  __device__ Backward(const BackwardArgs<T>& args, const Place<L>& place, Shared& shared)
      : p(args), at(place), s(shared) {
    static_assert(kThreads % P::kChannels == 0);
    const Operands<T>& in = p.in;
    read_A<L>(in.A_log, at, in.sizes.dstate, kGeneral ? 1.0F : kLog2e, A);
    D = in.D != nullptr && at.active ? in.D[at.channel] : 0.0F;
    bias = at.active ? in.dt_bias[at.channel] : 0.0F;
    column = static_cast<int>(threadIdx.x) % P::kChannels;
    const int channel = at.tile * P::kChannels + column;
    const bool exists = channel < in.sizes.channels;
    column_bias = exists ? in.dt_bias[channel] : 0.0F;
    if (kGeneral && in.tau != nullptr) {
      rate = at.active ? softplus(in.dtA_bias[at.channel]) : 0.0F;
      column_rate = exists ? softplus(in.dtA_bias[channel]) : 0.0F;
    }
    for (float& v : product) v = 1.0F;
  }

  __device__ std::int64_t chunk_row(int chunk) const {
    return (std::int64_t{at.batch} * p.in.sizes.chunks + chunk) * p.in.sizes.channels + at.channel;
  }

  __device__ void load_channels(T* tile, const DeviceRows<const T>& from, int first) {
    load_tile<kSteps, P::kChannels, kThreads>(
        tile, from, at.first_row + first, min(at.length, at.stop) - first, at.tile * P::kChannels,
        p.in.sizes.channels, p.in.wide_channels);
  }
  __device__ void load_states(T* tile, const DeviceRows<const T>& from, int first) {
    load_tile<kSteps, P::kN, kThreads>(tile, from, at.first_row + first,
                                       min(at.length, at.stop) - first, 0, p.in.sizes.dstate,
                                       p.in.wide_states);
  }

  /// Stages a window. `replay`: only what the states need; otherwise all, and step 1 what g needs.
  __device__ void stage(int first, bool replay) {
    load_channels(s.dt[0], p.in.dt, first);
    if constexpr (!kEnds) {
      load_channels(s.u[0], p.in.u, first);
      load_states(s.raw_B[0], p.in.B, first);
    }
    if (!replay) {
      load_channels(s.dy[0], p.dy, first);
      load_states(s.raw_C[0], p.in.C, first);
      if (p.in.z.data != nullptr) load_channels(s.z[0], p.in.z, first);
    }
    commit_copies();
    wait_for_copies();
    __syncthreads();
    prepare(first, replay);
    __syncthreads();
  }

  __device__ void prepare(int first, bool replay) {
    constexpr int kAtOnce = kThreads / P::kChannels;
#pragma unroll 2
    for (int k = 0; k < (kSteps + kAtOnce - 1) / kAtOnce; ++k) {
      const int j = static_cast<int>(threadIdx.x) / P::kChannels + k * kAtOnce;
      if (kSteps % kAtOnce != 0 && j >= kSteps) break;
      const int t = first + j;
      const bool valid = t < at.length && t < at.stop;
      const float delta = valid ? softplus(to_float(s.dt[j][column]) + column_bias) : 0.0F;
      const float u = kEnds ? 0.0F : to_float(s.u[j][column]);
      if constexpr (kGeneral) {
        float alpha = delta;
        if (p.in.tau != nullptr) alpha = valid ? p.in.tau[at.first_row + t] * column_rate : 0.0F;
        s.alpha[j][column] = alpha;
        s.drive[j][column] = {delta, u};
      } else {
        s.drive[j][column] = {delta, delta * u};
      }
      if (replay) continue;
      float dy = to_float(s.dy[j][column]);
      if (p.in.z.data != nullptr) {
        const float z = to_float(s.z[j][column]);
        dy *= z * fast_sigmoid(z);
      }
      s.gated_dy[j][column] = dy;
    }
    if constexpr (!kEnds) widen_tile<kSteps * P::kN, kThreads>(s.raw_B[0], s.B[0]);
    if (!replay) widen_tile<kSteps * P::kN, kThreads>(s.raw_C[0], s.C[0]);
  }

  __device__ __forceinline__ float multiplier(int j, int i, float delta) const {
    if constexpr (kGeneral)
      return GeneralRule{p.in.discretization}.multiplier(s.alpha[j][at.local], A[i]);
    else
      return exp2_approx(delta * A[i]);
  }
  /// k u B, where d is what prepare() stored.
  __device__ __forceinline__ float drive(float2 d, int i, float B) const {
    if constexpr (kGeneral)
      return GeneralRule{p.in.discretization}.factor(d.x, A[i]) * d.y * B;
    else
      return d.y * B;
  }

  /// Runs the states through a window and keeps those that enter the sub-tiles, the first of which
  /// is sub-tile `index` of the chunk. Not further than into the last sub-tile of the last window.
  __device__ void replay(float (&h)[kStates], int index, bool last_window) {
    for (int k = 0; k < kSteps / kSubTile; ++k) {
      write_shared<kStates>(s.states[index + k][threadIdx.x], h);
      if (last_window && k == kSteps / kSubTile - 1) return;
#pragma unroll
      for (int i = 0; i < kSubTile; ++i) {
        const int j = k * kSubTile + i;
        const float2 d = s.drive[j][at.local];
        float B[kStates];
        read_shared<kStates>(s.B[j] + at.part * kStates, B);
#pragma unroll
        for (int n = 0; n < kStates; ++n)
          h[n] = fmaf(multiplier(j, n, d.x), h[n], drive(d, n, B[n]));
      }
    }
  }

  /// Sums over the states of a channel, for kGroup steps.
  struct StateSums {
    float y[kGroup];                      // C h
    float du[kGroup];                     // g k B; without k unless general
    float dalpha[kGroup];                 // unless general: of delta, divided by ln 2
    float ddelta[kGeneral ? kGroup : 1];  // through k
  };

  /// Step j of the window, of which h_before and h_after are the states and a the multipliers.
  __device__ __forceinline__ void retreat(int j, int slot, const float (&h_before)[kStates],
                                          const float (&h_after)[kStates],
                                          const float (&a)[kStates], StateSums& sums) {
    const float2 d = s.drive[j][at.local];
    const float dy = s.gated_dy[j][at.local];
    float B[kStates];
    float C[kStates];
    read_shared<kStates>(s.B[j] + at.part * kStates, B);
    read_shared<kStates>(s.C[j] + at.part * kStates, C);
    float shared_sums[2 * kStates];  // dB and dC of this channel
    float y = 0.0F;
    float du = 0.0F;
    float dalpha = 0.0F;
    float ddelta = 0.0F;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      const float gn = fmaf(C[n], dy, g[n]);
      y = fmaf(C[n], h_after[n], y);
      shared_sums[kStates + n] = dy * h_after[n];
      g[n] = a[n] * gn;
      if constexpr (kGeneral) {
        const float alpha = s.alpha[j][at.local];
        const float k = GeneralRule{p.in.discretization}.factor(d.x, A[n]);
        shared_sums[n] = gn * k * d.y;
        du = fmaf(gn * k, B[n], du);
        dA[n] += chain_rule(p.in.discretization, gn * h_before[n], gn * d.y * B[n], a[n], alpha,
                            d.x, A[n], dalpha, ddelta);
      } else {
        shared_sums[n] = gn * d.y;
        du = fmaf(gn, B[n], du);
        const float r = g[n] * h_before[n];
        dalpha = fmaf(r, A[n], dalpha);
        dA[n] = fmaf(r, d.x, dA[n]);
      }
    }
    sums.y[slot] = y;
    sums.du[slot] = du;
    sums.dalpha[slot] = dalpha;
    if constexpr (kGeneral) sums.ddelta[slot] = ddelta;
    add_channels(j, shared_sums);
  }

  /// Adds dB and dC over the channels of the warp.
  __device__ __forceinline__ void add_channels(int j, float (&v)[2 * kStates]) {
    constexpr int kOut = 2 * kStates / P::kPerWarp;
    const int id = static_cast<int>(threadIdx.x) % 32 % P::kPerWarp;
    transpose_add<2 * kStates, P::kPerWarp, 1>(v, id);
    float* const out = s.sums[threadIdx.x / 32][j % P::kAdded];
#pragma unroll
    for (int i = 0; i < kOut; ++i) {
      const int index = id * kOut + i;  // 0 .. kStates: dB, then dC
      out[index / kStates * P::kN + at.part * kStates + index % kStates] = v[i];
    }
  }

  /// Adds dB and dC over the warps and writes steps [j, j + kAdded) of the window.
  __device__ void add_warps(int first, int j) {
    const Sizes& z = p.in.sizes;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < P::kAdded * P::kSums; i += kThreads) {
      const int step = i / P::kSums;
      const int index = i % P::kSums;
      float sum = 0.0F;
#pragma unroll
      for (int warp = 0; warp < P::kWarps; ++warp) sum += s.sums[warp][step][index];
      const int n = index % P::kN;
      const int t = first + j + step;
      if (t < at.stop && n < z.dstate) {
        const std::int64_t row = (std::int64_t{at.tile} * z.batch + at.batch) * z.seqlen + t;
        p.dBC[(row * 2 + index / P::kN) * z.dstate + n] = sum;
      }
    }
    __syncthreads();
  }

  /// Gradients of the channel inputs of the group of steps at j.
  __device__ __forceinline__ void finish_group(int first, int j, StateSums& sums) {
    constexpr int kCopies = P::kLanes / kGroup;  // lanes with the same sums
    transpose_add<kGroup, P::kLanes, P::kPerWarp>(sums.y, at.part);
    transpose_add<kGroup, P::kLanes, P::kPerWarp>(sums.du, at.part);
    transpose_add<kGroup, P::kLanes, P::kPerWarp>(sums.dalpha, at.part);
    if constexpr (kGeneral) transpose_add<kGroup, P::kLanes, P::kPerWarp>(sums.ddelta, at.part);
    if (at.part % kCopies != 0) return;
    const int i = j + at.part / kCopies;
    const int t = first + i;
    const bool valid = t < at.length && t < at.stop;
    const float u = to_float(s.u[i][at.local]);
    const float delta = s.drive[i][at.local].x;
    const float dy = s.gated_dy[i][at.local];
    float du;
    float ddelta;
    if constexpr (kGeneral) {
      du = fmaf(D, dy, sums.du[0]);
      ddelta = sums.ddelta[0];
      float dtau = 0.0F;
      if (p.in.tau == nullptr) {
        ddelta += sums.dalpha[0];
      } else if (valid) {
        dtau = sums.dalpha[0] * rate;
        drate = fmaf(sums.dalpha[0], p.in.tau[at.first_row + t], drate);
      }
      s.dtau[i][at.local] = dtau;
    } else {
      du = fmaf(delta, sums.du[0], D * dy);
      ddelta = fmaf(u, sums.du[0], kLn2 * sums.dalpha[0]);
    }
    const float ddt = valid ? ddelta * fast_sigmoid(to_float(s.dt[i][at.local]) + bias) : 0.0F;
    if (p.in.z.data != nullptr) {
      const float z = to_float(s.z[i][at.local]);
      const float gate = fast_sigmoid(z);
      const float y = fmaf(D, u, sums.y[0]);
      const float dz = to_float(s.dy[i][at.local]) * y * gate * fmaf(z, 1.0F - gate, 1.0F);
      s.z[i][at.local] = from_float<T>(dz);
    }
    s.u[i][at.local] = from_float<T>(du);
    s.dt[i][at.local] = from_float<T>(ddt);
    dD = fmaf(dy, u, dD);
    dbias += ddt;
  }

  /// Sub-tile k of the window that begins at `first`; `index` counts in the chunk.
  __device__ __forceinline__ void sub_tile(int first, int k, int index) {
    float h[kSubTile + 1][kStates];
    float a[kSubTile][kStates];
    read_shared<kStates>(s.states[index][threadIdx.x], h[0]);
    const int j0 = k * kSubTile;
#pragma unroll
    for (int i = 0; i < kSubTile; ++i) {
      const float2 d = s.drive[j0 + i][at.local];
      float B[kStates];
      read_shared<kStates>(s.B[j0 + i] + at.part * kStates, B);
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        a[i][n] = multiplier(j0 + i, n, d.x);
        h[i + 1][n] = fmaf(a[i][n], h[i][n], drive(d, n, B[n]));
      }
    }
#pragma unroll
    for (int group = kSubTile - kGroup; group >= 0; group -= kGroup) {
      StateSums sums;
#pragma unroll
      for (int slot = kGroup - 1; slot >= 0; --slot) {
        const int i = group + slot;
        retreat(j0 + i, slot, h[i], h[i + 1], a[i], sums);
      }
      finish_group(first, j0 + group, sums);
      if ((j0 + group) % P::kAdded == 0) add_warps(first, j0 + group);
    }
  }

  __device__ void write_window(int first) {
    __syncthreads();
    const Sizes& z = p.in.sizes;
    const std::int64_t row = at.first_row + first;
    const int rows = at.stop - first;
    const int valid = at.length - first;
    const int c = at.tile * P::kChannels;
    const bool wide = p.in.wide_channels;
    store_tile<kSteps, P::kChannels, kThreads>(s.u[0], p.du, row, rows, valid, c, z.channels, wide);
    store_tile<kSteps, P::kChannels, kThreads>(s.dt[0], p.ddt, row, rows, valid, c, z.channels,
                                               wide);
    if (p.in.z.data != nullptr)
      store_tile<kSteps, P::kChannels, kThreads>(s.z[0], p.dz, row, rows, valid, c, z.channels,
                                                 wide);
    if constexpr (kGeneral) {
      const auto j = static_cast<int>(threadIdx.x);
      if (p.dtau != nullptr && j < kSteps && j < rows) {
        float sum = 0.0F;
        for (const float v : s.dtau[j]) sum += v;
        p.dtau[(std::int64_t{at.tile} * z.batch + at.batch) * z.seqlen + first + j] = sum;
      }
    }
    __syncthreads();
  }

  /// Asks for the chunk that ends at `end`, before the one in work.
  __device__ void prefetch(int end) const {
    if (end <= at.begin) return;
    const std::int64_t row = at.first_row + end - kChunk;
    const int c = at.tile * P::kChannels;
    const int channels = p.in.sizes.channels;
    if (at.active) prefetch_to_l2(p.chunk_states + chunk_row(end / kChunk - 1) * p.in.sizes.dstate);
    prefetch_tile<kChunk, P::kChannels, kThreads>(p.in.u, row, c, channels);
    prefetch_tile<kChunk, P::kChannels, kThreads>(p.in.dt, row, c, channels);
    prefetch_tile<kChunk, P::kChannels, kThreads>(p.dy, row, c, channels);
    if (p.in.z.data != nullptr)
      prefetch_tile<kChunk, P::kChannels, kThreads>(p.in.z, row, c, channels);
  }

  __device__ void chunk(int begin) {
    const int left = at.stop - begin;
    const int windows = left >= kChunk ? kWindows : (left + kSteps - 1) / kSteps;
    prefetch(begin);
    float h[kStates];
    read_states<L>(p.chunk_states, chunk_row(begin / kChunk), at, p.in.sizes.dstate, h);
    for (int w = 0; w < windows; ++w) {
      const bool last = w == windows - 1;
      stage(begin + w * kSteps, !last);
      replay(h, w * kSteps / kSubTile, last);
    }
    for (int w = windows - 1; w >= 0; --w) {
      const int first = begin + w * kSteps;
      if (w != windows - 1) stage(first, false);
#pragma unroll 1
      for (int k = kSteps / kSubTile - 1; k >= 0; --k)
        sub_tile(first, k, w * kSteps / kSubTile + k);
      write_window(first);
    }
  }

  /// Step 1 of a chunk.
  __device__ void chunk_end(int begin) {
    prefetch(begin);
    for (int w = kWindows - 1; w >= 0; --w) {
      const int first = begin + w * kSteps;
      if (first >= at.stop) continue;
      stage(first, false);
#pragma unroll 4
      for (int j = kSteps - 1; j >= 0; --j) {
        const float delta = s.drive[j][at.local].x;
        const float dy = s.gated_dy[j][at.local];
        float C[kStates];
        read_shared<kStates>(s.C[j] + at.part * kStates, C);
        delta_sum += delta;
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          const float a = multiplier(j, n, delta);
          if constexpr (kGeneral) product[n] *= a;
          g[n] = a * fmaf(C[n], dy, g[n]);
        }
      }
      __syncthreads();
    }
  }

  __device__ void write_ends() {
    const std::int64_t row = at.state_row(p.in.sizes);
    write_states<L>(p.ends, row, at, p.in.sizes.dstate, g);
    float m[kStates];
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      m[i] = kGeneral ? product[kGeneral ? i : 0] : exp2_approx(delta_sum * A[i]);
    write_states<L>(p.products, row, at, p.in.sizes.dstate, m);
  }

  __device__ void finish() {
    const Sizes& z = p.in.sizes;
#pragma unroll
    for (int n = 0; n < kStates; ++n)  // A = -exp(A_log): dA_log = dA A
      dA[n] *= kGeneral ? A[n] : kLn2 * A[n];
    write_states<L>(p.dA_log, at.state_row(z), at, z.dstate, dA);
    if (p.dstate_in != nullptr && at.segment == 0)
      write_states<L>(p.dstate_in, std::int64_t{at.batch} * z.channels + at.channel, at, z.dstate,
                      g);
    float v[3][1] = {{dbias}, {dD}, {drate}};
    for (float(&sum)[1] : v) transpose_add<1, P::kLanes, P::kPerWarp>(sum, at.part);
    if (at.part != 0 || !at.active) return;
    if (kGeneral && p.in.tau != nullptr) v[2][0] *= fast_sigmoid(p.in.dtA_bias[at.channel]);
    float* const out = p.dvectors +
                       (std::int64_t{at.batch} * z.segments + at.segment) * 3 * z.channels +
                       at.channel;
    for (int i = 0; i < 3; ++i) out[i * z.channels] = v[i][0];
  }
};

template <class T, class P, bool kGeneral, bool kEnds>
__global__ __launch_bounds__(P::kThreads,
                             P::kBlocks) void selective_scan_backward_kernel(BackwardArgs<T> p) {
  using Block = Backward<T, P, kGeneral, kEnds>;
  extern __shared__ __align__(16) unsigned char bytes[];
  const Sizes& sizes = p.in.sizes;
  // Nothing precedes the first segment, so step 1 skips it.
  Place<typename P::Base> at(sizes, p.in.lengths, kEnds ? sizes.segments - 1 : sizes.segments);
  if constexpr (kEnds) {
    ++at.segment;
    at.begin += sizes.segment_length;
    at.stop = min(at.begin + sizes.segment_length, sizes.seqlen);
  }
  Block block(p, at, *reinterpret_cast<typename Block::Shared*>(bytes));
  read_states<typename P::Base>(kEnds ? nullptr : p.starts, at.state_row(sizes), at, sizes.dstate,
                                block.g);
  for (int begin = (at.stop - 1) / kChunk * kChunk; begin >= at.begin; begin -= kChunk) {
    if constexpr (kEnds)
      block.chunk_end(begin);
    else
      block.chunk(begin);
  }
  if constexpr (kEnds)
    block.write_ends();
  else
    block.finish();
}

constexpr int kSumThreads = 256;

/// Second stage of dB, dC and dtau: one thread per element adds the tiles in order. Bound by HBM.
template <class T>
struct TileSumArgs {
  const float* dBC;
  const float* dtau;
  std::int64_t tiles, rows, dstate;
  DeviceRows<T> dB, dC;
  float* dtau_out;
};
template <class T>
__global__ __launch_bounds__(kSumThreads) void selective_scan_add_tiles_kernel(TileSumArgs<T> p) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const std::int64_t columns = 2 * p.dstate;
  const std::int64_t count = p.rows * columns;
  if (i < count) {
    float sum = 0.0F;
#pragma unroll 8
    for (std::int64_t tile = 0; tile < p.tiles; ++tile) sum += p.dBC[tile * count + i];
    const std::int64_t row = i / columns;
    const std::int64_t column = i % columns;
    if (column < p.dstate)
      p.dB.row(row)[column] = from_float<T>(sum);
    else
      p.dC.row(row)[column - p.dstate] = from_float<T>(sum);
  }
  if (p.dtau_out == nullptr || i >= p.rows) return;
  float sum = 0.0F;
  for (std::int64_t tile = 0; tile < p.tiles; ++tile) sum += p.dtau[tile * p.rows + i];
  p.dtau_out[i] = sum;
}

/// Parameter gradients: one thread per element adds sequences and segments in order.
struct ParameterSumArgs {
  const float* dA_log;    // [parts, E, N]
  const float* dvectors;  // [parts, 3, E]
  std::int64_t parts, channels, dstate;
  float* dA_log_out;
  float* vectors_out[3];  // may be null
};
__global__ __launch_bounds__(kSumThreads) void selective_scan_add_parts_kernel(ParameterSumArgs p) {
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const std::int64_t states = p.channels * p.dstate;
  if (i < states) {
    float sum = 0.0F;
    for (std::int64_t part = 0; part < p.parts; ++part) sum += p.dA_log[part * states + i];
    p.dA_log_out[i] += sum;
    return;
  }
  i -= states;
  if (i >= 3 * p.channels) return;
  float* const out = p.vectors_out[i / p.channels];
  if (out == nullptr) return;
  float sum = 0.0F;
  for (std::int64_t part = 0; part < p.parts; ++part) sum += p.dvectors[part * 3 * p.channels + i];
  out[i % p.channels] += sum;
}

unsigned sum_blocks(std::int64_t threads) {
  return static_cast<unsigned>((threads + kSumThreads - 1) / kSumThreads);
}

template <class T>
void add_partials(Context& ctx, const SelectiveScanBackward& a, const BackwardArgs<T>& p) {
  const Sizes& z = p.in.sizes;
  const std::int64_t rows = std::int64_t{z.batch} * z.seqlen;
  const TileSumArgs<T> tiles{p.dBC,
                             p.dtau,
                             z.tiles,
                             rows,
                             z.dstate,
                             device_rows<T>(a.dB),
                             device_rows<T>(a.dC),
                             p.dtau != nullptr ? a.dintegration_timesteps.data<float>() : nullptr};
  selective_scan_add_tiles_kernel<T>
      <<<sum_blocks(rows * 2 * z.dstate), kSumThreads, 0, ctx.stream().handle>>>(tiles);
  LRNN_CUDA_CHECK_LAUNCH();
  const ParameterSumArgs parts{p.dA_log,
                               p.dvectors,
                               std::int64_t{z.batch} * z.segments,
                               z.channels,
                               z.dstate,
                               a.dA_log.data<float>(),
                               {a.ddt_bias.data<float>(), data_or_null<float>(a.dD),
                                p.in.tau != nullptr ? data_or_null<float>(a.ddtA_bias) : nullptr}};
  selective_scan_add_parts_kernel<<<sum_blocks(std::int64_t{z.channels} * (z.dstate + 3)),
                                    kSumThreads, 0, ctx.stream().handle>>>(parts);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, class P, bool kGeneral, bool kEnds>
void launch_kernel(Context& ctx, const BackwardArgs<T>& p) {
  const Sizes& z = p.in.sizes;
  const auto kernel = selective_scan_backward_kernel<T, P, kGeneral, kEnds>;
  constexpr std::size_t kBytes = sizeof(BackwardShared<T, P, kGeneral>);
  allow_shared(kernel, kBytes);
  kernel<<<z.blocks(kEnds ? z.segments - 1 : z.segments), P::kThreads, kBytes,
           ctx.stream().handle>>>(p);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, class P, bool kGeneral>
void launch_backward(Context& ctx, const SelectiveScanBackward& a) {
  const Sizes sizes(a.in, P::kChannels, P::kWarps);
  BackwardArgs<T> p(a, sizes);
  const auto wide = [&](const auto& rows) { return Operands<T>::wide(rows, sizes.channels); };
  p.in.wide_channels = p.in.wide_channels && wide(p.dy) && wide(p.du) && wide(p.ddt) && wide(p.dz);

  const Shape row_shape = {sizes.tiles, sizes.batch, sizes.seqlen};
  Tensor dBC = ctx.empty({sizes.tiles, sizes.batch, sizes.seqlen, 2, sizes.dstate}, DType::float32);
  Tensor dA_log = ctx.empty(sizes.carry_shape(), DType::float32);
  Tensor dvectors = ctx.empty({sizes.batch, sizes.segments, 3, sizes.channels}, DType::float32);
  Tensor dtau;
  if (a.in.integration_timesteps && a.dintegration_timesteps)
    dtau = ctx.empty(row_shape, DType::float32);
  p.dBC = dBC.view().template data<float>();
  p.dA_log = dA_log.view().template data<float>();
  p.dvectors = dvectors.view().template data<float>();
  p.dtau = dtau ? dtau.view().template data<float>() : nullptr;
  Tensor ends;
  Tensor products;
  if (sizes.segments > 1) {
    ends = ctx.empty(sizes.carry_shape(), DType::float32);
    products = ctx.empty(sizes.carry_shape(), DType::float32);
    p.ends = ends.view().template data<float>();
    p.products = products.view().template data<float>();
    launch_kernel<T, P, kGeneral, true>(ctx, p);
    launch_carry(ctx, {sizes, true, p.products, p.starts, p.ends});
    p.starts = p.ends;
  }
  launch_kernel<T, P, kGeneral, false>(ctx, p);
  add_partials<T>(ctx, a, p);
}

/// Calls f.operator()<P>(). The general rule has fewer layouts: more lanes hold no state.
template <bool kGeneral, class F>
void visit_plan(std::int64_t dstate, F&& f) {
  if (dstate <= 16) return f.template operator()<Plan<Layout<4, 4, 32>, 32, 16, 3>>();
  if constexpr (!kGeneral) {
    if (dstate <= 32) return f.template operator()<Plan<Layout<8, 4, 16>, 32, 8, 3>>();
  }
  if (dstate <= 64) return f.template operator()<Plan<Layout<16, 4, 16>, 16, 4, 2>>();
  if constexpr (!kGeneral) {
    if (dstate <= 128) return f.template operator()<Plan<Layout<32, 4, 8>, 16, 4, 2>>();
  }
  return f.template operator()<Plan<Layout<32, 8, 4>, 8, 4, 2>>();
}

}  // namespace
}  // namespace selective

void selective_scan_backward(Context& ctx, const SelectiveScanBackward& a) {
  constexpr const char* op = "selective_scan_backward";
  const std::int64_t dstate = a.in.A_log.dim(1);
  selective::check_limits(op, a.in);
  visit_float(op, a.in.u.dtype(), [&]<class T>() {
    selective::visit_rule(selective::is_general(a.in), [&]<bool kGeneral>() {
      selective::visit_plan<kGeneral>(
          dstate, [&]<class P>() { selective::launch_backward<T, P, kGeneral>(ctx, a); });
    });
  });
}

}  // namespace lrnn::cuda
