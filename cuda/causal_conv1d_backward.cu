// Backward of the causal depthwise convolution.
//
// Widths 2, 3, 4 stream as common/causal_conv1d.cuh tells; bound by HBM: dy, x in, dx out, at 66 %
// of the rate of a copy for B8 L2048 C1536 and 86 % for B1 L65536 C1536 (bfloat16, width 4). A
// thread recomputes the sum before the activation and keeps dpre of the last K steps in a second
// ring. It walks K - 1 steps past the end of its chunk, where it recomputes dpre of its neighbour.
// Its sums of dweight and dbias stay in registers; the chunks of a block are added in shared
// memory, one row of partial sums per block, folded in order afterwards. Other widths take the
// plain kernels, one thread per element.
#include "common/causal_conv1d.cuh"
#include "common/reduce.cuh"

namespace lrnn::cuda {
namespace conv {
namespace {

constexpr int kChannels =
    4;  // of a thread, in both types: two rings and two sums fill the registers
/// Blocks per multiprocessor that registers must allow.
template <int kN>
constexpr int kResident = kN == 1 ? 5 : 3;
/// Rows on their way to L2. Registers leave few blocks to hide the latency of memory.
constexpr int kFar = 8;
constexpr int kPlainChunk = 64;

template <class T>
struct Gradients {
  const T* dy;
  std::int64_t dy_stride;
  const float* dstate_out;
  T* dx;
  std::int64_t dx_stride;
  float* dweight;  // partial sums [rows of chunks, channels, width]
  float* dbias;    // partial sums [rows of chunks, channels], may be null
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

/// A thread on its way through a chunk. Steps count from its first; step t completes the gradient
/// of input t - (K - 1).
template <class T, int kN, int K, bool kSilu>
struct Walk {
  static constexpr int kBatch = kAhead<kN, K>;
  const Conv<T>& v;
  const Gradients<T>& g;
  const Place<kN>& p;
  const std::int64_t length;
  const int steps;  // of the chunk
  const int stop;   // where the last gradient of the chunk is complete
  const int valid;  // steps below stop that have an input
  const Taps<T, kN, K> taps;
  Ahead<T, kN, kBatch, kFar> x_ahead;
  Ahead<T, kN, kBatch, kFar> dy_ahead;
  T* dx;
  float x[K][kN] = {};
  float dpre[K][kN] = {};
  float dweight[K][kN] = {};
  float dbias[kN] = {};

  __device__ __forceinline__ Walk(const Conv<T>& conv, const Gradients<T>& gradients,
                                  const Place<kN>& place, int chunk)
      : v(conv),
        g(gradients),
        p(place),
        length(v.length(p.b)),
        steps(static_cast<int>(min(v.seqlen - p.begin, std::int64_t{chunk}))),
        stop(steps + K - 1),
        valid(static_cast<int>(
            max(min(length - p.begin, static_cast<std::int64_t>(stop)), std::int64_t{0}))),
        taps(v, p.channel),
        x_ahead(v.x + (p.b * v.seqlen + p.begin) * v.x_stride + p.channel, v.x_stride, valid),
        dy_ahead(g.dy + (p.b * v.seqlen + p.begin) * g.dy_stride + p.channel, g.dy_stride, valid),
        dx(g.dx + (p.b * v.seqlen + p.begin) * g.dx_stride + p.channel) {
    if (valid > 0) load_window<T, kN, K>(v, p, x);
  }

  /// dpre[slot] of a step that has an input.
  __device__ __forceinline__ void differentiate(int slot, const float (&dy)[kN]) {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      dpre[slot][c] = dy[c];
      if constexpr (kSilu) {
        const float pre = taps.pre(x, slot, c);
        const float s = gate(pre);
        dpre[slot][c] *= fmaf(pre * s, 1.0F - s, s);
      }
    }
  }
  __device__ __forceinline__ void add_parameters(int slot) {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      dbias[c] += dpre[slot][c];
#pragma unroll
      for (int k = 0; k < K; ++k)
        dweight[k][c] = fmaf(dpre[slot][c], x[(slot + 1 + k) % K][c], dweight[k][c]);
    }
  }
  /// The gradient of input t - (K - 1) after dpre[slot] of step t.
  __device__ __forceinline__ void gradient(int slot, float (&out)[kN]) const {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      out[c] = taps.weight[0][c] * dpre[slot][c];
#pragma unroll
      for (int k = 1; k < K; ++k)
        out[c] = fmaf(taps.weight[k][c], dpre[(slot + K - k) % K][c], out[c]);
    }
  }
  __device__ __forceinline__ void store(const float (&out)[kN]) {
    store_packed<T, kN>(dx, out);
    dx += g.dx_stride;
  }

  /// kBatch steps from t, all of them inside the chunk and K steps off anything that is special.
  __device__ __forceinline__ void batch(int t) {
    const int left = valid - kBatch - t;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float dy[kN];
      x_ahead.take(i, left, x[i % K]);
      dy_ahead.take(i, left, dy);
      differentiate(i % K, dy);
      add_parameters(i % K);
      float out[kN];
      gradient(i % K, out);
      store(out);
    }
  }
  /// The same where the chunk, the sequence or its valid part begins or ends.
  __device__ __forceinline__ void batch_at_edge(int t) {
    const int left = valid - kBatch - t;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (t + i >= stop) return;
      float dy[kN];
      x_ahead.take(i, left, x[i % K]);
      dy_ahead.take(i, left, dy);
      if (t + i < valid) {
        differentiate(i % K, dy);
        if (t + i < steps) add_parameters(i % K);
      } else {
#pragma unroll
        for (int c = 0; c < kN; ++c) dpre[i % K][c] = 0.0F;
      }
      const int s = t + i - (K - 1);
      if (s >= 0 || (p.begin == 0 && g.dstate_in != nullptr)) finish_at_edge(i % K, p.begin + s);
    }
  }
  /// Stores the gradient of input s, which may be one of state_in or of the final window.
  __device__ __forceinline__ void finish_at_edge(int slot, std::int64_t s) {
    float out[kN];
    gradient(slot, out);
#pragma unroll
    for (int c = 0; c < kN; ++c)
      out[c] =
          s < length ? out[c] + from_window(v, g.dstate_out, p.b, s, p.channel + c, length) : 0.0F;
    if (s >= 0) {
      store(out);
    } else {
#pragma unroll
      for (int c = 0; c < kN; ++c)
        g.dstate_in[(p.b * v.channels + p.channel + c) * K + K + s] = out[c];
    }
  }

  __device__ __forceinline__ void run() {
    // Before `smooth`, inputs are valid, belong to the chunk, and miss the final window.
    const int smooth =
        static_cast<int>(min(length - 1 - p.begin, static_cast<std::int64_t>(steps)));
    batch_at_edge(0);
    int t = kBatch;
    for (; t + kBatch <= smooth; t += kBatch) batch(t);
    for (; t < stop; t += kBatch) batch_at_edge(t);
    if (p.begin != 0 || g.dstate_in == nullptr) return;
#pragma unroll
    for (int c = 0; c < kN; ++c)  // the oldest slot meets no tap
      g.dstate_in[(p.b * v.channels + p.channel + c) * K] =
          from_window(v, g.dstate_out, p.b, -K, p.channel + c, length);
  }
};

/// Adds what the warps of a block have, in order, and stores it where `out`, `count` elements, has
/// room. `sums` holds kCount elements per thread, in the order of `out`.
template <int kCount>
__device__ __forceinline__ void add_chunks(const float (*sums)[32][kCount], int offset, int count,
                                           std::int64_t room, float* out) {
  for (int i = static_cast<int>(threadIdx.x); i < 32 * count && i < room; i += kThreads) {
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][i / count][offset + i % count];
    out[i] = sum;
  }
}

template <class T, int kN, int K, bool kSilu>
__global__ __launch_bounds__(kThreads, kResident<kN>) void backward_kernel(Conv<T> v, Plan plan,
                                                                           Gradients<T> g) {
  constexpr int kWeights = kN * K;
  constexpr int kSums = kWeights + kN + 1;  // one more keeps the lanes in different banks
  __shared__ float sums[kWarps][32][kSums];
  const Place<kN> p(v, plan);
  float(&mine)[kSums] = sums[threadIdx.x / 32][threadIdx.x % 32];
  if (p.active) {
    Walk<T, kN, K, kSilu> walk(v, g, p, plan.chunk);
    walk.run();
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      mine[kWeights + c] = walk.dbias[c];
#pragma unroll
      for (int k = 0; k < K; ++k) mine[c * K + k] = walk.dweight[k][c];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWeights + kN; ++i) mine[i] = 0.0F;
  }
  __syncthreads();
  const std::int64_t channel = static_cast<std::int64_t>(p.tile) * 32 * kN;
  const std::int64_t first = p.row * v.channels + channel;
  const std::int64_t room = v.channels - channel;
  add_chunks<kSums>(sums, 0, kWeights, room * K, g.dweight + first * K);
  if (g.dbias != nullptr) add_chunks<kSums>(sums, kWeights, kN, room, g.dbias + first);
}

// The plain kernels: any width, one thread per element, channels fastest.

template <class T>
__global__ __launch_bounds__(kThreads) void dpre_plain_kernel(Conv<T> v, Gradients<T> g,
                                                              float* __restrict__ dpre) {
  const Element at(v);
  if (at.b >= v.batch) return;
  float d = 0.0F;
  if (at.t < v.length(at.b)) {
    d = to_float(g.dy[at.token * g.dy_stride + at.c]);
    if (v.silu) {
      const float pre = v.pre(at.b, at.t, at.c);
      const float s = gate(pre);
      d *= s * fmaf(pre, 1.0F - s, 1.0F);
    }
  }
  dpre[at.index] = d;
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
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t slice = i / v.channels;
  const std::int64_t c = i - slice * v.channels;
  const std::int64_t b = slice / chunks;
  if (b >= v.batch) return;
  const std::int64_t begin = (slice - b * chunks) * kPlainChunk;
  const std::int64_t valid = min(min(begin + kPlainChunk, v.seqlen), v.length(b));
  const float* const d = dpre + b * v.seqlen * v.channels + c;
  for (int k = 0; k < v.width; ++k) {
    float sum = 0.0F;
    for (std::int64_t t = begin; t < valid; ++t)
      sum = fmaf(d[t * v.channels], v.input(b, t - (v.width - 1) + k, c), sum);
    g.dweight[i * v.width + k] = sum;
  }
  if (g.dbias == nullptr) return;
  float sum = 0.0F;
  for (std::int64_t t = begin; t < valid; ++t) sum += d[t * v.channels];
  g.dbias[i] = sum;
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

/// Runs `launch`, which leaves `rows` rows of partial sums where the gradients that it is given
/// point to, and adds them to dweight and dbias.
template <class T, class F>
void fold_rows(Context& ctx, const CausalConv1dBackward& a, Gradients<T> g, std::int64_t rows,
               F&& launch) {
  const std::int64_t channels = a.x.dim(2);
  const std::int64_t weights = a.dweight.numel();
  Tensor dweight = ctx.empty(Shape{rows, weights}, DType::float32);
  Tensor dbias = a.dbias ? ctx.empty(Shape{rows, channels}, DType::float32) : Tensor();
  g.dweight = dweight.view().data<float>();
  g.dbias = a.dbias ? dbias.view().data<float>() : nullptr;
  launch(g);
  const Partials bias = {g.dbias, channels, a.dbias ? a.dbias.data<float>() : nullptr};
  fold_partials(ctx.stream().handle, static_cast<int>(rows),
                {g.dweight, weights, a.dweight.data<float>()}, a.dbias ? bias : Partials{});
}

/// Whether the width has a kernel of its own, which then ran.
template <class T>
bool stream_backward(Context& ctx, const CausalConv1dBackward& a, const Conv<T>& v,
                     const Gradients<T>& gradients) {
  const bool vectors = allows_vectors_of(v, kChannels) &&
                       allows_vectors(gradients.dy, v.channels, gradients.dy_stride, kChannels) &&
                       allows_vectors(gradients.dx, v.channels, gradients.dx_stride, kChannels);
  return visit_width(v.width, [&]<int K>() {
    visit_channels<kChannels>(vectors, [&]<int kN>() {
      const Plan plan = plan_of<T, kN, K, kResident<kN>>(v, K - 1);
      const auto kernel =
          v.silu ? backward_kernel<T, kN, K, true> : backward_kernel<T, kN, K, false>;
      fold_rows(ctx, a, gradients, plan.rows, [&](const Gradients<T>& g) {
        kernel<<<plan.blocks(), kThreads, 0, ctx.stream().handle>>>(v, plan, g);
        LRNN_CUDA_CHECK_LAUNCH();
      });
    });
  });
}

template <class T>
void backward(Context& ctx, const CausalConv1dBackward& a) {
  const Conv<T> v = conv_of<T>(a);
  const Gradients<T> gradients{.dy = a.dy.data<T>(),
                               .dy_stride = detail::row_stride(a.dy),
                               .dstate_out = a.dstate_out ? a.dstate_out.data<float>() : nullptr,
                               .dx = a.dx.data<T>(),
                               .dx_stride = detail::row_stride(a.dx),
                               .dweight = nullptr,
                               .dbias = nullptr,
                               .dstate_in = a.dstate_in ? a.dstate_in.data<float>() : nullptr};
  if (stream_backward(ctx, a, v, gradients)) return;
  const std::int64_t chunks = (v.seqlen + kPlainChunk - 1) / kPlainChunk;
  fold_rows(ctx, a, gradients, v.batch * chunks,
            [&](const Gradients<T>& g) { backward_plain(ctx, v, chunks, g); });
}

}  // namespace
}  // namespace conv

void causal_conv1d_backward(Context& ctx, const CausalConv1dBackward& a) {
  visit_float("causal_conv1d_backward", a.x.dtype(), [&]<class T>() { conv::backward<T>(ctx, a); });
}

}  // namespace lrnn::cuda
