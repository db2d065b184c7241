/// What forward and backward of causal_conv1d share.
///
/// The backward kernels of widths 2, 3, 4 stream: a thread owns kN neighbouring channels of one
/// chunk of time and walks it with the last K inputs in a ring of registers, kAhead rows of every
/// operand on their way from memory. A warp owns 32 kN channels of a chunk, a block kWarps chunks.
/// Chunks are as long as a grid that fills the device once allows, so little is read twice and every
/// multiprocessor has loads in flight from the first step to the last. Their number depends on the
/// sizes alone.
#pragma once

#include <algorithm>

#include "lrnn/ops/causal_conv1d.hpp"

#include "common/rows.cuh"

namespace lrnn::cuda::conv {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

/// Steps of a batch; a multiple of K, so that the place of a step in the ring is known at compile
/// time, and at least K - 1. Single channels need more loads in flight.
template <int kN, int K>
constexpr int kAhead = (kN == 1 ? 2 : 1) * (K == 3 ? 3 : 4);

/// What all kernels share.
template <class T>
struct Conv {
  const T* x;
  std::int64_t x_stride;
  const T* weight;
  const T* bias;
  const float* state_in;
  const std::int32_t* lengths;
  std::int64_t batch, seqlen, channels;
  int width;
  bool silu;

  __device__ std::int64_t length(std::int64_t b) const {
    return lengths != nullptr ? min(static_cast<std::int64_t>(lengths[b]), seqlen) : seqlen;
  }
  /// Input t of channel c; t in [-width, length).
  __device__ float input(std::int64_t b, std::int64_t t, std::int64_t c) const {
    if (t >= 0) return to_float(x[(b * seqlen + t) * x_stride + c]);
    return state_in != nullptr ? state_in[(b * channels + c) * width + width + t] : 0.0F;
  }
  __device__ float pre(std::int64_t b, std::int64_t t, std::int64_t c) const {
    float sum = bias != nullptr ? to_float(bias[c]) : 0.0F;
    for (int k = 0; k < width; ++k)
      sum = fmaf(to_float(weight[c * width + k]), input(b, t - (width - 1) + k, c), sum);
    return sum;
  }
};

/// The element that a thread of the plain kernels owns, channels fastest.
struct Element {
  std::int64_t index, token, b, t, c;

  template <class T>
  __device__ __forceinline__ explicit Element(const Conv<T>& v)
      : index(static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x),
        token(index / v.channels),
        b(token / v.seqlen),
        t(token - b * v.seqlen),
        c(index - token * v.channels) {}
};
/// The channel of a sequence that a thread owns.
struct Line {
  std::int64_t index, b, c;

  template <class T>
  __device__ __forceinline__ explicit Line(const Conv<T>& v)
      : index(static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x),
        b(index / v.channels),
        c(index - b * v.channels) {}
};

template <class T, class Args>
Conv<T> conv_of(const Args& a) {
  return {.x = a.x.template data<T>(),
          .x_stride = detail::row_stride(a.x),
          .weight = a.weight.template data<T>(),
          .bias = a.bias ? a.bias.template data<T>() : nullptr,
          .state_in = a.state_in ? a.state_in.template data<float>() : nullptr,
          .lengths = a.lengths ? a.lengths.template data<std::int32_t>() : nullptr,
          .batch = a.x.dim(0),
          .seqlen = a.x.dim(1),
          .channels = a.x.dim(2),
          .width = static_cast<int>(a.weight.dim(1)),
          .silu = a.activation == Activation::Silu};
}

/// Whether rows and parameters can be walked by n channels.
template <class T>
bool allows_vectors_of(const Conv<T>& v, int n) {
  return allows_vectors(v.x, v.channels, v.x_stride, n) && allows_vectors(v.weight, n, n, n) &&
         allows_vectors(v.bias, n, n, n);
}

/// 1 / (1 + e^-v) by the hardware's exponential and reciprocal: relative error below 5e-7 for
/// v >= -1, growing with the rounding of v log2(e) to 9e-8 |v| for negative v; 0 below -88.
__device__ __forceinline__ float gate(float v) {
  float e;
  float s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v * -1.44269504F));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0F + e));
  return s;
}

/// The window of a channel of a sequence, and what its output needs. K: the width, if windows and
/// weights lie in vectors of that size, else 0: then it is read as it moves on.
template <class T, int K>
struct Window {
  // As they come from memory: a conversion would wait for it.
  Packed<float, K> values;
  Packed<T, K> taps;
  Packed<T, 1> bias;

  __device__ __forceinline__ void load(const Conv<T>& v, std::int64_t b, std::int64_t c,
                                       const float* state) {
    values.load(state + (b * v.channels + c) * K);
    taps.load_constant(v.weight + c * K);
    bias = {};
    if (v.bias != nullptr) bias.load_constant(v.bias + c);
  }
  /// Moves it on by an input and returns the output of the channel.
  __device__ __forceinline__ float advance(const Conv<T>& v, std::int64_t b, std::int64_t c,
                                           float newest, float* state) {
    float moved[K];
#pragma unroll
    for (int k = 0; k < K; ++k) moved[k] = k + 1 < K ? values.get(k + 1) : newest;
    store_packed<float, K>(state + (b * v.channels + c) * K, moved);
    return output(v, taps, bias, moved);
  }
  /// Of a channel whose window is `moved`.
  __device__ __forceinline__ static float output(const Conv<T>& v, const Packed<T, K>& taps,
                                                 const Packed<T, 1>& bias,
                                                 const float (&moved)[K]) {
    float sum = bias.get(0);
#pragma unroll
    for (int k = 0; k < K; ++k) sum = fmaf(taps.get(k), moved[k], sum);
    return v.silu ? sum * gate(sum) : sum;
  }
};
template <class T>
struct Window<T, 0> {
  __device__ __forceinline__ void load(const Conv<T>&, std::int64_t, std::int64_t, const float*) {}
  __device__ __forceinline__ float advance(const Conv<T>& v, std::int64_t b, std::int64_t c,
                                           float newest, float* state) {
    float* const window = state + (b * v.channels + c) * v.width;
    float sum = v.bias != nullptr ? to_float(v.bias[c]) : 0.0F;
    for (int k = 0; k < v.width; ++k) {
      const float value = k + 1 < v.width ? window[k + 1] : newest;
      window[k] = value;
      sum = fmaf(to_float(v.weight[c * v.width + k]), value, sum);
    }
    return v.silu ? sum * gate(sum) : sum;
  }
};

/// Moves the window of channel c of sequence b on by an input and returns its output.
template <class T, int K>
__device__ __forceinline__ float advance_window(const Conv<T>& v, std::int64_t b, std::int64_t c,
                                                float newest, float* state) {
  Window<T, K> window;
  window.load(v, b, c, state);
  return window.advance(v, b, c, newest, state);
}

constexpr int kUsualWidth = 4;
template <class T>
bool has_usual_windows(const Conv<T>& v, const float* state) {
  return v.width == kUsualWidth && allows_vectors(state, kUsualWidth, kUsualWidth, kUsualWidth) &&
         allows_vectors(v.weight, kUsualWidth, kUsualWidth, kUsualWidth);
}

/// Calls f.operator()<K>() with the K of a window.
template <class T, class F>
void visit_window(const Conv<T>& v, const float* state, F&& f) {
  if (has_usual_windows(v, state))
    f.template operator()<kUsualWidth>();
  else
    f.template operator()<0>();
}

/// How channels and time are cut.
struct Plan {
  std::int64_t tiles;   // of 32 kN channels
  std::int64_t chunks;  // of a sequence
  std::int64_t rows;    // of kWarps chunks, over all sequences
  int chunk;            // steps

  [[nodiscard]] unsigned blocks() const { return static_cast<unsigned>(tiles * rows); }
};

/// Chunks whose length plus `halo` is a multiple of kAhead, for kResident blocks per
/// multiprocessor.
template <class T, int kN, int K, int kResident>
Plan plan_of(const Conv<T>& v, int halo) {
  constexpr std::int64_t kBlocks = 132 * kResident;  // of a full device
  constexpr std::int64_t kShortest = 16;   // steps worth the parameters and K - 1 inputs before
  constexpr std::int64_t kLongest = 1024;  // terms of a sum in one register
  constexpr std::int64_t unit = kAhead<kN, K>;
  Plan p{};
  p.tiles = (v.channels / kN + 31) / 32;
  const std::int64_t slices = std::max<std::int64_t>(1, kBlocks / p.tiles) * kWarps;
  const std::int64_t wanted = std::max<std::int64_t>(1, slices / v.batch);
  const std::int64_t steps = std::clamp((v.seqlen + wanted - 1) / wanted, kShortest, kLongest);
  p.chunk = static_cast<int>((steps + halo + unit - 1) / unit * unit - halo);
  p.chunks = (v.seqlen + p.chunk - 1) / p.chunk;
  p.rows = (v.batch * p.chunks + kWarps - 1) / kWarps;
  return p;
}

/// Which channels, sequence and chunk a thread owns.
template <int kN>
struct Place {
  std::int64_t row;  // of chunks
  int tile;          // of channels
  std::int64_t b;
  std::int64_t begin;  // first step
  std::int64_t channel;
  bool active;

  template <class T>
  __device__ __forceinline__ Place(const Conv<T>& v, const Plan& plan) {
    const auto tiles = static_cast<unsigned>(plan.tiles);
    row = blockIdx.x / tiles;
    tile = static_cast<int>(blockIdx.x % tiles);
    const std::int64_t slice = row * kWarps + threadIdx.x / 32;
    b = slice / plan.chunks;
    begin = (slice - b * plan.chunks) * plan.chunk;
    channel = (static_cast<std::int64_t>(tile) * 32 + threadIdx.x % 32) * kN;
    active = b < v.batch && channel < v.channels;
  }
};

/// The parameters of a thread.
template <class T, int kN, int K>
struct Taps {
  float weight[K][kN];
  float bias[kN];

  __device__ __forceinline__ Taps(const Conv<T>& v, std::int64_t channel) {
    Packed<T, kN> rows[K];  // kN K consecutive elements, taps fastest
#pragma unroll
    for (int k = 0; k < K; ++k) rows[k].load_constant(v.weight + channel * K + k * kN);
    Packed<T, kN> shift{};
    if (v.bias != nullptr) shift.load_constant(v.bias + channel);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      bias[i] = shift.get(i);
#pragma unroll
      for (int k = 0; k < K; ++k) weight[k][i] = rows[(i * K + k) / kN].get((i * K + k) % kN);
    }
  }
  /// The sum of channel i at the step whose input is ring[slot].
  __device__ __forceinline__ float pre(const float (&ring)[K][kN], int slot, int i) const {
    float sum = bias[i];
#pragma unroll
    for (int k = 0; k < K; ++k) sum = fmaf(weight[k][i], ring[(slot + 1 + k) % K][i], sum);
    return sum;
  }
};

/// The K - 1 inputs before step `begin`, which goes to slot 0. A chunk that is not the first begins
/// after step K - 1.
template <class T, int kN, int K>
__device__ __forceinline__ void load_window(const Conv<T>& v, const Place<kN>& p,
                                            float (&ring)[K][kN]) {
  if (p.begin == 0) {
    const float* const state = v.state_in + (p.b * v.channels + p.channel) * K;
#pragma unroll
    for (int k = 1; k < K; ++k)
#pragma unroll
      for (int i = 0; i < kN; ++i) ring[k][i] = v.state_in != nullptr ? state[i * K + k] : 0.0F;
    return;
  }
  const T* const last = v.x + (p.b * v.seqlen + p.begin - 1) * v.x_stride + p.channel;
#pragma unroll
  for (int k = 1; k < K; ++k) {
    Packed<T, kN> row;
    row.load_constant(last - (K - 1 - k) * v.x_stride);
#pragma unroll
    for (int i = 0; i < kN; ++i) ring[k][i] = row.get(i);
  }
}

/// kDepth rows on their way from memory to registers, and those up to kFar on their way to L2.
template <class T, int kN, int kDepth, int kFar = kDepth>
struct Ahead {
  const T* next;
  std::int64_t stride;
  Packed<T, kN> rows[kDepth];

  /// Asks for the first of `count` rows.
  __device__ __forceinline__ Ahead(const T* first, std::int64_t row_stride, int count)
      : next(first), stride(row_stride), rows{} {
#pragma unroll
    for (int i = kDepth; i < kFar - kDepth; ++i)
      if (i < count) prefetch(first + i * stride);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) request(i, count);
  }
  /// Takes row i of a batch and asks for the one kDepth rows later, if the `left` rows after the
  /// batch have it.
  __device__ __forceinline__ void take(int i, int left, float (&out)[kN]) {
#pragma unroll
    for (int c = 0; c < kN; ++c) out[c] = rows[i].get(c);
    request(i, left);
  }

 private:
  __device__ __forceinline__ void request(int i, int left) {
    if (i < left) rows[i].load_constant(next);
    if constexpr (kFar > kDepth)
      if (i < left - (kFar - kDepth)) prefetch(next + (kFar - kDepth) * stride);
    next += stride;
  }
  static __device__ __forceinline__ void prefetch(const T* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
  }
};

/// Calls f.operator()<kN>() or, where rows cannot be walked by kN channels, f.operator()<1>().
template <int kN, class F>
void visit_channels(bool vectors, F&& f) {
  if (vectors)
    f.template operator()<kN>();
  else
    f.template operator()<1>();
}

/// Calls f.operator()<K>() and returns whether the width has a kernel of its own.
template <class F>
bool visit_width(int width, F&& f) {
  switch (width) {
    case 2:
      f.template operator()<2>();
      return true;
    case 3:
      f.template operator()<3>();
      return true;
    case 4:
      f.template operator()<4>();
      return true;
    default:
      return false;
  }
}

inline unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace lrnn::cuda::conv
