/// What the forward and backward kernels of the selective scan share.
///
/// A CTA owns kChannels channels of one sequence; a channel's N states are spread over kLanes
/// threads of four states each (the padding of N to 4 kLanes holds zeros). Adjacent threads of a
/// warp hold adjacent channels, so that a read of B or C is a broadcast.
#pragma once

#include "lrnn/ops/selective_scan.hpp"

#include "common/check.cuh"
#include "common/vec.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda::scan {

using Disc = SelectiveDiscretization;

constexpr int kStates = 4;  // per thread
constexpr int kChunk = static_cast<int>(kSelectiveScanChunk);
constexpr float kLog2e = 1.4426950408889634F;

template <int kLanes>
constexpr int kChannels = kLanes == 32 ? 8 : 32;  // per CTA
template <int kLanes>
constexpr int kThreads = kChannels<kLanes>* kLanes;

__device__ __forceinline__ float ex2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float softplus(float v) {
  return fmaxf(v, 0.0F) + log1pf(expf(-fabsf(v)));
}
__device__ __forceinline__ float sigmoid(float v) {
  return __fdividef(1.0F, 1.0F + __expf(-v));
}

/// Operands of a kernel; rows are tokens.
template <class T>
struct Inputs {
  DeviceRows<const T> u, dt, B, C, z;
  const float* dt_bias;
  const float* A_log;
  const float* D;
  const float* tau;
  const float* dtA_bias;
  const float* state_in;
  const std::int32_t* lengths;
  int batch, channels, dstate;
  std::int64_t seqlen;
  Disc disc;
  bool vectors;  // 16-byte loads of channel rows are possible

  __device__ std::int64_t length(int b) const { return lengths != nullptr ? lengths[b] : seqlen; }
};

template <class T>
Inputs<T> make_inputs(const SelectiveScanInputs& in) {
  const auto rows = [](TensorView t) {
    return t ? DeviceRows<const T>{t.data<T>(), detail::row_stride(t)}
             : DeviceRows<const T>{nullptr, 0};
  };
  const auto floats = [](TensorView t) { return t ? t.data<float>() : nullptr; };
  Inputs<T> p{rows(in.u),
              rows(in.dt),
              rows(in.B),
              rows(in.C),
              rows(in.z),
              in.dt_bias.data<float>(),
              in.A_log.data<float>(),
              floats(in.D),
              floats(in.integration_timesteps),
              floats(in.dtA_bias),
              floats(in.state_in),
              in.lengths ? in.lengths.data<std::int32_t>() : nullptr,
              static_cast<int>(in.u.dim(0)),
              static_cast<int>(in.u.dim(2)),
              static_cast<int>(in.A_log.dim(1)),
              in.u.dim(1),
              in.discretization,
              false};
  p.vectors = allows_vectors(p.u.data, p.channels, p.u.stride, kWide<T>) &&
              allows_vectors(p.dt.data, p.channels, p.dt.stride, kWide<T>) &&
              (p.z.data == nullptr || allows_vectors(p.z.data, p.channels, p.z.stride, kWide<T>));
  return p;
}

/// Whether the kernels for the plain exponential form apply.
template <class T>
bool is_plain(const Inputs<T>& p) {
  return p.disc == Disc::Mamba && p.tau == nullptr;
}

/// How a thread is placed in its CTA.
template <int kLanes>
struct Place {
  static constexpr int kPerWarp = 32 / kLanes;  // channels of a warp
  int lane, channel_in_warp, part, channel;     // part: which four states

  __device__ Place()
      : lane(static_cast<int>(threadIdx.x) % 32),
        channel_in_warp(lane % kPerWarp),
        part(lane / kPerWarp),
        channel(static_cast<int>(threadIdx.x) / 32 * kPerWarp + channel_in_warp) {}
};

/// A segment of the time axis: chunks [first, last) of one sequence.
struct Segments {
  int count;   // per sequence
  int chunks;  // per segment

  __device__ std::int64_t begin(int s) const {
    return static_cast<std::int64_t>(s) * chunks * kChunk;
  }
  __device__ std::int64_t end(int s, std::int64_t seqlen) const {
    return min(seqlen, static_cast<std::int64_t>(s + 1) * chunks * kChunk);
  }
};

/// Cuts time when sequences and channel tiles alone give too few CTAs. Depends on sizes only.
inline Segments make_segments(std::int64_t tiles, std::int64_t seqlen) {
  constexpr std::int64_t kEnoughCtas = 384;
  const std::int64_t chunks = selective_scan_chunks(seqlen);
  const std::int64_t wanted = std::max<std::int64_t>(1, (kEnoughCtas + tiles - 1) / tiles);
  // A segment of fewer than four chunks is not worth its second pass.
  const std::int64_t segments = std::clamp<std::int64_t>(chunks / 4, 1, wanted);
  const std::int64_t per_segment = (chunks + segments - 1) / segments;
  return {static_cast<int>((chunks + per_segment - 1) / per_segment),
          static_cast<int>(per_segment)};
}

/// Copies [rows, columns] of a row-strided operand into shared memory [rows, kColumns]; columns
/// beyond `columns` are left alone.
template <class T, int kColumns, int kThreadCount>
__device__ __forceinline__ void copy_tile(T* shared, DeviceRows<const T> src, std::int64_t row,
                                          int rows, int first, int columns, bool vectors) {
  constexpr int N = kWide<T>;
  if (vectors && kColumns % N == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * (kColumns / N); i += kThreadCount) {
      const int r = i / (kColumns / N);
      const int c = i % (kColumns / N) * N;
      if (c >= columns) continue;  // columns is a multiple of N here
      const T* const from = src.row(row + r) + first + c;
      T* const to = shared + r * kColumns + c;
#if __CUDA_ARCH__ >= 800
      const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from)
                   : "memory");
#else
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#endif
    }
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < rows * kColumns; i += kThreadCount) {
    const int r = i / kColumns;
    const int c = i % kColumns;
    if (c < columns) shared[i] = src.row(row + r)[first + c];
  }
}
__device__ __forceinline__ void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
__device__ __forceinline__ void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

/// Rows of B or C as float, [rows, kPadded]; zeros beyond `valid` rows and beyond N.
template <class T, int kPadded, int kThreadCount>
__device__ __forceinline__ void load_shared_states(float* shared, DeviceRows<const T> src,
                                                   std::int64_t row, int rows, int valid,
                                                   int dstate) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * kPadded; i += kThreadCount) {
    const int r = i / kPadded;
    const int n = i % kPadded;
    shared[i] = r < valid && n < dstate ? to_float(src.row(row + r)[n]) : 0.0F;
  }
}

/// a and k of the general forms.
__device__ __forceinline__ float multiplier(Disc disc, float alpha, float A) {
  if (disc == Disc::Bilinear) {
    const float v = 0.5F * alpha * A;
    return (1.0F + v) / (1.0F - v);
  }
  return expf(alpha * A);
}
__device__ __forceinline__ float zoh_factor(float delta, float A) {
  const float x = delta * A;
  if (fabsf(x) < 1e-3F) return delta * (1.0F + 0.5F * x * (1.0F + x / 3.0F));
  return expm1f(x) / A;
}
__device__ __forceinline__ float input_factor(Disc disc, float delta, float A) {
  switch (disc) {
    case Disc::Mamba:
      return delta;
    case Disc::Zoh:
      return zoh_factor(delta, A);
    case Disc::Bilinear:
      return delta / (1.0F - 0.5F * delta * A);
    case Disc::Dirac:
      return 1.0F;
  }
  return 0.0F;
}
/// d/dA of expm1(delta A) / A = delta^2 psi(delta A), psi(x) = ((x - 1) e^x + 1) / x^2.
__device__ __forceinline__ float zoh_factor_dA(float delta, float A) {
  const float x = delta * A;
  float psi = 0.0F;
  if (fabsf(x) < 0.5F) {  // sum over k of x^k / (k! (k + 2))
    float term = 1.0F;
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      psi = fmaf(term, 1.0F / static_cast<float>(k + 2), psi);
      term *= x / static_cast<float>(k + 1);
    }
  } else {
    psi = fmaf(x - 1.0F, expf(x), 1.0F) / (x * x);
  }
  return delta * delta * psi;
}

/// Sums v[i] over the lanes of a channel so that the lane with part p holds the sum of v[index],
/// index = p * kValues / kLanes (kValues <= kLanes), in v[0]. kValues is a power of two.
template <int kLanes, int kValues>
__device__ __forceinline__ void reduce_parts(float (&v)[kValues], int part) {
  constexpr int kPerWarp = 32 / kLanes;
  int count = kValues;
#pragma unroll
  for (int offset = kLanes / 2; offset >= 1; offset /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = (part & offset) != 0;
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        if (i >= count) break;
        const float keep = upper ? v[i + count] : v[i];
        const float send = upper ? v[i] : v[i + count];
        v[i] = keep + __shfl_xor_sync(0xFFFFFFFFU, send, offset * kPerWarp);
      }
    } else {
      v[0] += __shfl_xor_sync(0xFFFFFFFFU, v[0], offset * kPerWarp);
    }
  }
}
/// Time steps that are reduced together.
template <int kLanes>
constexpr int kGroup = kLanes < 4 ? kLanes : 4;

/// The step of a group that this lane holds after reduce_parts, and whether it is the one to write.
template <int kLanes>
__device__ __forceinline__ int group_step(int part) {
  return part * kGroup<kLanes> / kLanes;
}
template <int kLanes>
__device__ __forceinline__ bool writes_group(int part) {
  return part % (kLanes / kGroup<kLanes>) == 0;
}

/// Four states of a thread to or from [.., E, N].
struct StateSlot {
  std::int64_t offset;  // of state 4 part of the channel
  int count;            // states of this thread that exist, 0 if the channel does not

  __device__ StateSlot(int dstate, int channels, int channel, int part)
      : offset(static_cast<std::int64_t>(channel) * dstate + kStates * part),
        count(channel < channels ? max(0, min(kStates, dstate - kStates * part)) : 0) {}
  __device__ void load(const float* base, float (&h)[kStates]) const {
#pragma unroll
    for (int n = 0; n < kStates; ++n) h[n] = base != nullptr && n < count ? base[offset + n] : 0.0F;
  }
  __device__ void store(float* base, const float (&h)[kStates]) const {
    if (count == kStates && reinterpret_cast<std::uintptr_t>(base + offset) % 16 == 0) {
      *reinterpret_cast<float4*>(base + offset) = make_float4(h[0], h[1], h[2], h[3]);
      return;
    }
#pragma unroll
    for (int n = 0; n < kStates; ++n)
      if (n < count) base[offset + n] = h[n];
  }
};

/// A of a thread's states; 0 where there is none.
__device__ __forceinline__ void load_A(const float* A_log, const StateSlot& slot,
                                       float (&A)[kStates]) {
#pragma unroll
  for (int n = 0; n < kStates; ++n) A[n] = n < slot.count ? -expf(A_log[slot.offset + n]) : 0.0F;
}

/// Calls `f.operator()<lanes>()` for the smallest number of lanes that holds N states.
template <class F>
void visit_lanes(const char* op, int dstate, F&& f) {
  LRNN_CHECK(dstate <= 128, InvalidArgument, op, ": A_log: the CUDA backend holds up to 128 ",
             "states per channel, got ", dstate);
  if (dstate <= 4) return f.template operator()<1>();
  if (dstate <= 8) return f.template operator()<2>();
  if (dstate <= 16) return f.template operator()<4>();
  if (dstate <= 32) return f.template operator()<8>();
  if (dstate <= 64) return f.template operator()<16>();
  f.template operator()<32>();
}

/// state before segment s = what the segments before it leave; one thread per (b, e, n).
/// ends holds (product of a, state from 0) of every segment; `reverse` walks from the last.
__global__ void carry_kernel(const float2* __restrict__ ends, const float* __restrict__ start,
                             float* __restrict__ before, std::int64_t states, int batch,
                             int segments, bool reverse);

}  // namespace lrnn::cuda::scan
