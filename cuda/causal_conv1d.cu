// Causal depthwise convolution over time.
//
// A thread owns kN neighbouring channels of one chunk of time and walks it with the last K - 1
// inputs in registers; loads are issued kBatch steps ahead of their use. Chunks of forward are
// short, which gives enough threads, and the K - 1 inputs shared by two chunks come from L2.
// Backward walks K - 1 steps past the end of its chunk, where it recomputes dpre of its neighbour,
// and leaves one row of partial sums of dweight and dbias per chunk, folded in order afterwards.
// Both are bound by HBM: x in, y out; dy, x in, dx out. Widths other than 2, 3, 4 take the plain
// kernels at the end of the file, one thread per element.
#include <algorithm>

#include "lrnn/ops/causal_conv1d.hpp"

#include "common/activation.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kForwardChunk = 32;
constexpr int kBackwardChunk = 64;
constexpr int kBatch = 4;
constexpr int kBackwardChannels = 4;

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

/// At bfloat16 the hardware exponential, 2^-20 relative at the arguments that count, keeps the
/// kernels bound by memory.
template <class T>
__device__ __forceinline__ float gate(float v) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0F, 1.0F + __expf(-v));
  return sigmoid(v);
}

/// Weights, bias and the window of a thread with kN channels and K taps.
template <class T, int kN, int K>
struct Taps {
  float weight[K][kN];
  float bias[kN];
  float window[K - 1][kN];  // oldest first

  __device__ __forceinline__ Taps(const Conv<T>& v, std::int64_t b, std::int64_t t,
                                  std::int64_t channel, bool any) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      bias[i] = v.bias != nullptr ? to_float(v.bias[channel + i]) : 0.0F;
#pragma unroll
      for (int k = 0; k < K; ++k) weight[k][i] = to_float(v.weight[(channel + i) * K + k]);
#pragma unroll
      for (int k = 0; k < K - 1; ++k)
        window[k][i] = any ? v.input(b, t - (K - 1) + k, channel + i) : 0.0F;
    }
  }
  __device__ __forceinline__ float pre(int i, float newest) const {
    float sum = bias[i];
#pragma unroll
    for (int k = 0; k < K - 1; ++k) sum = fmaf(weight[k][i], window[k][i], sum);
    return fmaf(weight[K - 1][i], newest, sum);
  }
  __device__ __forceinline__ void push(const float (&newest)[kN]) {
    shift(window, newest);
  }

  static __device__ __forceinline__ void shift(float (&values)[K - 1][kN],
                                               const float (&newest)[kN]) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
#pragma unroll
      for (int k = 0; k + 1 < K - 1; ++k) values[k][i] = values[k + 1][i];
      values[K - 2][i] = newest[i];
    }
  }
};

/// Which channels, sequence and chunk a thread owns.
template <int kN>
struct Place {
  std::int64_t b, chunk, channel;
  bool active;

  template <class T>
  __device__ __forceinline__ Place(const Conv<T>& v, std::int64_t chunks) {
    const std::int64_t groups = v.channels / kN;
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const std::int64_t slice = i / groups;
    channel = (i - slice * groups) * kN;
    b = slice / chunks;
    chunk = slice - b * chunks;
    active = b < v.batch;
  }
};

template <class T, int kN, int K>
__global__ __launch_bounds__(kThreads) void forward_kernel(Conv<T> v, std::int64_t chunks, T* y,
                                                           std::int64_t y_stride) {
  const Place<kN> p(v, chunks);
  if (!p.active) return;
  const std::int64_t begin = p.chunk * kForwardChunk;
  const std::int64_t end = min(begin + kForwardChunk, v.seqlen);
  const std::int64_t valid = min(end, v.length(p.b));
  Taps<T, kN, K> taps(v, p.b, begin, p.channel, begin < valid);
  const T* const x = v.x + p.b * v.seqlen * v.x_stride + p.channel;
  T* const out = y + p.b * v.seqlen * y_stride + p.channel;
  for (std::int64_t first = begin; first < end; first += kBatch) {
    Vec<T, kN> raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i < valid)
        raw[i] = *reinterpret_cast<const Vec<T, kN>*>(x + (first + i) * v.x_stride);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const std::int64_t t = first + i;
      float result[kN] = {};
      if (t < valid) {
        float newest[kN];
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          newest[c] = to_float(raw[i].v[c]);
          result[c] = taps.pre(c, newest[c]);
          if (v.silu) result[c] *= gate<T>(result[c]);
        }
        taps.push(newest);
      }
      if (t < end) store_vec<T, kN>(out + t * y_stride, result);
    }
  }
}

/// Runs after forward, one thread per (sequence, channel). state_out may be state_in: slot k comes
/// from a slot of at least k, so ascending order reads before it writes.
template <class T>
__global__ __launch_bounds__(kThreads) void final_state_kernel(Conv<T> v, float* state_out) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= v.batch * v.channels) return;
  const std::int64_t b = i / v.channels;
  const std::int64_t c = i - b * v.channels;
  const std::int64_t first = v.length(b) - v.width;
  for (int k = 0; k < v.width; ++k) state_out[i * v.width + k] = v.input(b, first + k, c);
}

template <class T>
struct Gradients {
  const T* dy;
  std::int64_t dy_stride;
  const float* dstate_out;
  T* dx;
  std::int64_t dx_stride;
  float* dweight;  // partial sums [chunks of all sequences, channels, width]
  float* dbias;    // partial sums [chunks of all sequences, channels], may be null
  float* dstate_in;
};

/// The gradient that the final window passes to input t, t < length.
template <class T>
__device__ __forceinline__ float from_window(const Conv<T>& v, const float* dstate_out,
                                             std::int64_t b, std::int64_t t, std::int64_t c,
                                             std::int64_t length) {
  const std::int64_t slot = t - (length - v.width);
  if (dstate_out == nullptr || slot < 0) return 0.0F;
  return dstate_out[(b * v.channels + c) * v.width + slot];
}

template <class T, int kN, int K>
__global__ __launch_bounds__(kThreads) void backward_kernel(Conv<T> v, std::int64_t chunks,
                                                            Gradients<T> g) {
  const Place<kN> p(v, chunks);
  if (!p.active) return;
  const std::int64_t begin = p.chunk * kBackwardChunk;
  const std::int64_t end = min(begin + kBackwardChunk, v.seqlen);
  const std::int64_t length = v.length(p.b);
  const std::int64_t valid = min(end + K - 1, length);
  Taps<T, kN, K> taps(v, p.b, begin, p.channel, begin < valid);
  const T* const x = v.x + p.b * v.seqlen * v.x_stride + p.channel;
  const T* const dy = g.dy + p.b * v.seqlen * g.dy_stride + p.channel;
  T* const dx = g.dx + p.b * v.seqlen * g.dx_stride + p.channel;
  float recent[K - 1][kN] = {};  // dpre of the last K - 1 steps, oldest first
  float dweight[K][kN] = {};
  float dbias[kN] = {};
  for (std::int64_t first = begin; first < end + K - 1; first += kBatch) {
    Vec<T, kN> raw_x[kBatch];
    Vec<T, kN> raw_dy[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= valid) continue;
      raw_x[i] = *reinterpret_cast<const Vec<T, kN>*>(x + (first + i) * v.x_stride);
      raw_dy[i] = *reinterpret_cast<const Vec<T, kN>*>(dy + (first + i) * g.dy_stride);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const std::int64_t t = first + i;
      if (t >= end + K - 1) break;
      float newest[kN] = {};
      float dpre[kN] = {};
      if (t < valid) {
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          newest[c] = to_float(raw_x[i].v[c]);
          dpre[c] = to_float(raw_dy[i].v[c]);
          if (v.silu) {
            const float pre = taps.pre(c, newest[c]);
            const float s = gate<T>(pre);
            dpre[c] *= s * fmaf(pre, 1.0F - s, 1.0F);
          }
          if (t < end) {
            dbias[c] += dpre[c];
#pragma unroll
            for (int k = 0; k < K - 1; ++k)
              dweight[k][c] = fmaf(dpre[c], taps.window[k][c], dweight[k][c]);
            dweight[K - 1][c] = fmaf(dpre[c], newest[c], dweight[K - 1][c]);
          }
        }
      }
      const std::int64_t s = t - (K - 1);  // the input whose gradient is complete
      if (s >= begin || (p.chunk == 0 && g.dstate_in != nullptr)) {
        float gradient[kN];
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          gradient[c] = taps.weight[0][c] * dpre[c];
#pragma unroll
          for (int k = 0; k < K - 1; ++k)
            gradient[c] = fmaf(taps.weight[K - 1 - k][c], recent[k][c], gradient[c]);
        }
        if (g.dstate_out != nullptr && s >= length - K) {
#pragma unroll
          for (int c = 0; c < kN; ++c)
            gradient[c] = s < length ? gradient[c] + from_window(v, g.dstate_out, p.b, s,
                                                                 p.channel + c, length)
                                     : 0.0F;
        }
        if (s >= 0) {
          store_vec<T, kN>(dx + s * g.dx_stride, gradient);
        } else {
#pragma unroll
          for (int c = 0; c < kN; ++c)
            g.dstate_in[(p.b * v.channels + p.channel + c) * K + K + s] = gradient[c];
        }
      }
      taps.push(newest);
      Taps<T, kN, K>::shift(recent, dpre);
    }
  }
  const std::int64_t row = (p.b * chunks + p.chunk) * v.channels + p.channel;
#pragma unroll
  for (int c = 0; c < kN; ++c) {
    if (p.chunk == 0 && g.dstate_in != nullptr)  // the oldest slot meets no tap
      g.dstate_in[(p.b * v.channels + p.channel + c) * K] =
          from_window(v, g.dstate_out, p.b, -K, p.channel + c, length);
    if (g.dbias != nullptr) g.dbias[row + c] = dbias[c];
#pragma unroll
    for (int k = 0; k < K; ++k) g.dweight[(row + c) * K + k] = dweight[k][c];
  }
}

// The plain kernels: any width, one thread per element, channels fastest.

template <class T>
__global__ __launch_bounds__(kThreads) void forward_plain_kernel(Conv<T> v, T* y,
                                                                 std::int64_t y_stride) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t token = i / v.channels;
  if (token >= v.batch * v.seqlen) return;
  const std::int64_t c = i - token * v.channels;
  const std::int64_t b = token / v.seqlen;
  const std::int64_t t = token - b * v.seqlen;
  float result = 0.0F;
  if (t < v.length(b)) {
    result = v.pre(b, t, c);
    if (v.silu) result *= gate<T>(result);
  }
  y[token * y_stride + c] = from_float<T>(result);
}

template <class T>
__global__ __launch_bounds__(kThreads) void dpre_plain_kernel(Conv<T> v, Gradients<T> g,
                                                              float* __restrict__ dpre) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t token = i / v.channels;
  if (token >= v.batch * v.seqlen) return;
  const std::int64_t c = i - token * v.channels;
  const std::int64_t b = token / v.seqlen;
  const std::int64_t t = token - b * v.seqlen;
  float d = 0.0F;
  if (t < v.length(b)) {
    d = to_float(g.dy[token * g.dy_stride + c]);
    if (v.silu) {
      const float pre = v.pre(b, t, c);
      const float s = gate<T>(pre);
      d *= s * fmaf(pre, 1.0F - s, 1.0F);
    }
  }
  dpre[i] = d;
}

/// Gradients of the inputs -width ... seqlen - 1.
template <class T>
__global__ __launch_bounds__(kThreads) void dx_plain_kernel(Conv<T> v, Gradients<T> g,
                                                            const float* __restrict__ dpre) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t row = i / v.channels;
  const std::int64_t c = i - row * v.channels;
  const std::int64_t b = row / (v.seqlen + v.width);
  if (b >= v.batch) return;
  const std::int64_t t = row - b * (v.seqlen + v.width) - v.width;
  const std::int64_t length = v.length(b);
  float sum = 0.0F;
  if (t < length) {
    for (std::int64_t j = max(std::int64_t{0}, -t); j < v.width && t + j < length; ++j)
      sum = fmaf(to_float(v.weight[c * v.width + v.width - 1 - j]),
                 dpre[(b * v.seqlen + t + j) * v.channels + c], sum);
    sum += from_window(v, g.dstate_out, b, t, c, length);
  }
  if (t >= 0)
    g.dx[(b * v.seqlen + t) * g.dx_stride + c] = from_float<T>(sum);
  else if (g.dstate_in != nullptr)
    g.dstate_in[(b * v.channels + c) * v.width + v.width + t] = sum;
}

template <class T>
__global__ __launch_bounds__(kThreads) void dweight_plain_kernel(Conv<T> v, std::int64_t chunks,
                                                                 Gradients<T> g,
                                                                 const float* __restrict__ dpre) {
  const Place<1> p(v, chunks);
  if (!p.active) return;
  const std::int64_t begin = p.chunk * kBackwardChunk;
  const std::int64_t valid = min(min(begin + kBackwardChunk, v.seqlen), v.length(p.b));
  const std::int64_t row = (p.b * chunks + p.chunk) * v.channels + p.channel;
  const float* const d = dpre + p.b * v.seqlen * v.channels + p.channel;
  for (int k = 0; k < v.width; ++k) {
    float sum = 0.0F;
    for (std::int64_t t = begin; t < valid; ++t)
      sum = fmaf(d[t * v.channels], v.input(p.b, t - (v.width - 1) + k, p.channel), sum);
    g.dweight[row * v.width + k] = sum;
  }
  if (g.dbias == nullptr) return;
  float sum = 0.0F;
  for (std::int64_t t = begin; t < valid; ++t) sum += d[t * v.channels];
  g.dbias[row] = sum;
}

/// One token: a thread owns a channel of a sequence and its window.
template <class T>
__global__ __launch_bounds__(kThreads) void step_kernel(Conv<T> v, T* y, std::int64_t y_stride,
                                                        float* state) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= v.batch * v.channels) return;
  const std::int64_t b = i / v.channels;
  const std::int64_t c = i - b * v.channels;
  float* const window = state + i * v.width;
  const T* const weight = v.weight + c * v.width;
  float sum = v.bias != nullptr ? to_float(v.bias[c]) : 0.0F;
#pragma unroll 4
  for (int k = 0; k + 1 < v.width; ++k) {
    const float value = window[k + 1];
    window[k] = value;
    sum = fmaf(to_float(weight[k]), value, sum);
  }
  const float newest = to_float(v.x[b * v.x_stride + c]);
  window[v.width - 1] = newest;
  sum = fmaf(to_float(weight[v.width - 1]), newest, sum);
  if (v.silu) sum *= gate<T>(sum);
  y[b * y_stride + c] = from_float<T>(sum);
}

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

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

template <class T>
void forward(Context& ctx, const CausalConv1dForward& a) {
  const Conv<T> v = conv_of<T>(a);
  T* const y = a.y.data<T>();
  const std::int64_t y_stride = detail::row_stride(a.y);
  const cudaStream_t stream = ctx.stream().handle;
  const std::int64_t chunks = (v.seqlen + kForwardChunk - 1) / kForwardChunk;
  const std::int64_t threads = v.batch * chunks * v.channels;
  constexpr int wide = kWide<T>;
  const bool vectors = allows_vectors(v.x, v.channels, v.x_stride, wide) &&
                       allows_vectors(y, v.channels, y_stride, wide);
  const bool done = visit_width(v.width, [&]<int K>() {
    if (vectors)
      forward_kernel<T, wide, K>
          <<<blocks_for(threads / wide), kThreads, 0, stream>>>(v, chunks, y, y_stride);
    else
      forward_kernel<T, 1, K><<<blocks_for(threads), kThreads, 0, stream>>>(v, chunks, y, y_stride);
  });
  if (!done)
    forward_plain_kernel<T>
        <<<blocks_for(v.batch * v.seqlen * v.channels), kThreads, 0, stream>>>(v, y, y_stride);
  LRNN_CUDA_CHECK_LAUNCH();
  if (!a.state_out) return;
  final_state_kernel<T>
      <<<blocks_for(v.batch * v.channels), kThreads, 0, stream>>>(v, a.state_out.data<float>());
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
void backward_plain(Context& ctx, const Conv<T>& v, std::int64_t chunks, const Gradients<T>& g) {
  const cudaStream_t stream = ctx.stream().handle;
  Tensor scratch = ctx.empty(Shape{v.batch, v.seqlen, v.channels}, DType::float32);
  float* const dpre = scratch.view().data<float>();
  dpre_plain_kernel<T>
      <<<blocks_for(v.batch * v.seqlen * v.channels), kThreads, 0, stream>>>(v, g, dpre);
  LRNN_CUDA_CHECK_LAUNCH();
  dx_plain_kernel<T>
      <<<blocks_for(v.batch * (v.seqlen + v.width) * v.channels), kThreads, 0, stream>>>(v, g,
                                                                                         dpre);
  LRNN_CUDA_CHECK_LAUNCH();
  dweight_plain_kernel<T>
      <<<blocks_for(v.batch * chunks * v.channels), kThreads, 0, stream>>>(v, chunks, g, dpre);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
void backward(Context& ctx, const CausalConv1dBackward& a) {
  const Conv<T> v = conv_of<T>(a);
  const cudaStream_t stream = ctx.stream().handle;
  const std::int64_t chunks = (v.seqlen + kBackwardChunk - 1) / kBackwardChunk;
  const std::int64_t rows = v.batch * chunks;
  Tensor dweight = ctx.empty(Shape{rows, v.channels, v.width}, DType::float32);
  Tensor dbias;
  if (a.dbias) dbias = ctx.empty(Shape{rows, v.channels}, DType::float32);
  const Gradients<T> g{.dy = a.dy.data<T>(),
                       .dy_stride = detail::row_stride(a.dy),
                       .dstate_out = a.dstate_out ? a.dstate_out.data<float>() : nullptr,
                       .dx = a.dx.data<T>(),
                       .dx_stride = detail::row_stride(a.dx),
                       .dweight = dweight.view().data<float>(),
                       .dbias = a.dbias ? dbias.view().data<float>() : nullptr,
                       .dstate_in = a.dstate_in ? a.dstate_in.data<float>() : nullptr};
  constexpr int n = kBackwardChannels;
  const bool vectors = allows_vectors(v.x, v.channels, v.x_stride, n) &&
                       allows_vectors(g.dy, v.channels, g.dy_stride, n) &&
                       allows_vectors(g.dx, v.channels, g.dx_stride, n);
  const bool done = visit_width(v.width, [&]<int K>() {
    if (vectors)
      backward_kernel<T, n, K>
          <<<blocks_for(rows * v.channels / n), kThreads, 0, stream>>>(v, chunks, g);
    else
      backward_kernel<T, 1, K>
          <<<blocks_for(rows * v.channels), kThreads, 0, stream>>>(v, chunks, g);
  });
  LRNN_CUDA_CHECK_LAUNCH();
  if (!done) backward_plain(ctx, v, chunks, g);
  fold_partials(stream, g.dweight, static_cast<int>(rows), v.channels * v.width,
                a.dweight.data<float>());
  if (a.dbias)
    fold_partials(stream, g.dbias, static_cast<int>(rows), v.channels, a.dbias.data<float>());
}

template <class T>
void step(Context& ctx, const CausalConv1dStep& a) {
  const Conv<T> v{.x = a.x.data<T>(),
                  .x_stride = detail::row_stride(a.x),
                  .weight = a.weight.data<T>(),
                  .bias = a.bias ? a.bias.data<T>() : nullptr,
                  .state_in = nullptr,
                  .lengths = nullptr,
                  .batch = a.x.dim(0),
                  .seqlen = 1,
                  .channels = a.x.dim(1),
                  .width = static_cast<int>(a.weight.dim(1)),
                  .silu = a.activation == Activation::Silu};
  step_kernel<T><<<blocks_for(v.batch * v.channels), kThreads, 0, ctx.stream().handle>>>(
      v, a.y.data<T>(), detail::row_stride(a.y), a.state.data<float>());
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace

void causal_conv1d_forward(Context& ctx, const CausalConv1dForward& a) {
  visit_float("causal_conv1d_forward", a.x.dtype(), [&]<class T>() { forward<T>(ctx, a); });
}
void causal_conv1d_backward(Context& ctx, const CausalConv1dBackward& a) {
  visit_float("causal_conv1d_backward", a.x.dtype(), [&]<class T>() { backward<T>(ctx, a); });
}
void causal_conv1d_step(Context& ctx, const CausalConv1dStep& a) {
  visit_float("causal_conv1d_step", a.x.dtype(), [&]<class T>() { step<T>(ctx, a); });
}

}  // namespace lrnn::cuda
