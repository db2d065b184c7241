// Causal depthwise convolution over time: forward and step.
//
// Widths 2, 3, 4 stream as common/causal_conv1d.cuh tells; bound by HBM: x in, y out, at 69 % of
// the rate of a copy for B8 L2048 C1536 and 84 % for B1 L65536 C1536 (bfloat16, width 4). The
// thread that meets the last valid step leaves the final state, unless that would overwrite a
// state_in which another block may not have read yet. Other widths take one thread per element.
#include "common/causal_conv1d.cuh"

namespace lrnn::cuda {
namespace conv {
namespace {

/// Blocks per multiprocessor that registers must allow.
template <int kN>
constexpr int kResident = kN == 1 ? 8 : 4;

/// The last K inputs of a thread's channels before `length`. state_out may be state_in: slot k
/// comes from a slot of at least k, so ascending order reads before it writes.
template <class T, int kN, int K>
__device__ __forceinline__ void store_state(const Conv<T>& v, const Place<kN>& p,
                                            std::int64_t length, float* state_out) {
  float* const out = state_out + (p.b * v.channels + p.channel) * K;
  if (length < K) {
#pragma unroll 1
    for (int i = 0; i < kN * K; ++i) out[i] = v.input(p.b, length - K + i % K, p.channel + i / K);
    return;
  }
  const T* const first = v.x + (p.b * v.seqlen + length - K) * v.x_stride + p.channel;
  Packed<T, kN> rows[K];
#pragma unroll
  for (int k = 0; k < K; ++k) rows[k].load_constant(first + k * v.x_stride);
#pragma unroll
  for (int i = 0; i < kN; ++i)
#pragma unroll
    for (int k = 0; k < K; ++k) out[i * K + k] = rows[k].get(i);
}

template <class T, int kN, int K, bool kSilu>
__global__ __launch_bounds__(kThreads, kResident<kN>) void forward_kernel(Conv<T> v, Plan plan,
                                                                          T* y,
                                                                          std::int64_t y_stride,
                                                                          float* state_out) {
  constexpr int kBatch = kAhead<kN, K>;
  const Place<kN> p(v, plan);
  if (!p.active) return;
  const std::int64_t length = v.length(p.b);
  const int steps = static_cast<int>(min(v.seqlen - p.begin, std::int64_t{plan.chunk}));
  const int valid = static_cast<int>(
      max(min(length - p.begin, static_cast<std::int64_t>(steps)), std::int64_t{0}));
  const std::int64_t token = p.b * v.seqlen + p.begin;
  T* out = y + token * y_stride + p.channel;
  Ahead<T, kN, kBatch> ahead(v.x + token * v.x_stride + p.channel, v.x_stride, valid);
  const Taps<T, kN, K> taps(v, p.channel);
  float ring[K][kN];
  if (valid > 0) load_window<T, kN, K>(v, p, ring);

  const auto step = [&](int i, int left) {
    float(&newest)[kN] = ring[i % K];
    ahead.take(i, left, newest);
    float result[kN];
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      result[c] = taps.pre(ring, i % K, c);
      if constexpr (kSilu) result[c] *= gate(result[c]);
    }
    store_packed<T, kN>(out, result);
    out += y_stride;
  };
  int t = 0;
  for (; t + kBatch <= valid; t += kBatch) {
    const int left = valid - kBatch - t;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) step(i, left);
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i)
    if (t + i < valid) step(i, 0);
  constexpr float kZero[kN] = {};
  for (t = valid; t < steps; ++t, out += y_stride) store_packed<T, kN>(out, kZero);
  if (state_out == nullptr) return;
  const bool holds_last = p.begin < length && length <= p.begin + steps;
  if (holds_last || (length == 0 && p.begin == 0)) store_state<T, kN, K>(v, p, length, state_out);
}

/// Runs after forward, one thread per (sequence, channel). state_out may be state_in: slot k comes
/// from a slot of at least k, so ascending order reads before it writes.
template <class T>
__global__ __launch_bounds__(kThreads) void final_state_kernel(Conv<T> v, float* state_out) {
  const Line at(v);
  if (at.b >= v.batch) return;
  const std::int64_t first = v.length(at.b) - v.width;
  for (int k = 0; k < v.width; ++k)
    state_out[at.index * v.width + k] = v.input(at.b, first + k, at.c);
}

/// Any width, one thread per element, channels fastest.
template <class T>
__global__ __launch_bounds__(kThreads) void forward_plain_kernel(Conv<T> v, T* y,
                                                                 std::int64_t y_stride) {
  const Element at(v);
  if (at.b >= v.batch) return;
  float result = 0.0F;
  if (at.t < v.length(at.b)) {
    result = v.pre(at.b, at.t, at.c);
    if (v.silu) result *= gate(result);
  }
  y[at.token * y_stride + at.c] = from_float<T>(result);
}

/// One token: a thread owns a channel and walks the windows of the sequences, in the usual case
/// one. Bound by the launch, or for many sequences by HBM: the window in and out.
template <class T, int K>
__global__ __launch_bounds__(kThreads) void step_kernel(Conv<T> v, T* y, std::int64_t y_stride,
                                                        float* state) {
  let_next_kernel_start();
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool exists = c < v.channels;
  std::int64_t b = blockIdx.y;
  if (exists) {
    prefetch_to_l2(state + (b * v.channels + c) * v.width);
    prefetch_to_l2(v.weight + c * v.width);
  }
  wait_for_previous_kernel();
  if (!exists) return;
  for (; b < v.batch; b += gridDim.y) {
    const float newest = to_float(v.x[b * v.x_stride + c]);
    y[b * y_stride + c] = from_float<T>(advance_window<T, K>(v, b, c, newest, state));
  }
}

template <class T>
void store_final_state(cudaStream_t stream, const Conv<T>& v, float* state_out) {
  final_state_kernel<T><<<blocks_for(v.batch * v.channels), kThreads, 0, stream>>>(v, state_out);
  LRNN_CUDA_CHECK_LAUNCH();
}

/// Whether the width has a kernel of its own, which then ran and left state_out, if given.
template <class T>
bool stream_forward(cudaStream_t stream, const Conv<T>& v, T* y, std::int64_t y_stride,
                    float* state_out) {
  constexpr int wide = kWide<T>;
  const bool vectors = allows_vectors_of(v, wide) && allows_vectors(y, v.channels, y_stride, wide);
  return visit_width(v.width, [&]<int K>() {
    visit_channels<wide>(vectors, [&]<int kN>() {
      const Plan plan = plan_of<T, kN, K, kResident<kN>>(v, 0);
      const bool in_place = state_out != nullptr && state_out == v.state_in && plan.chunks > 1;
      const auto kernel = v.silu ? forward_kernel<T, kN, K, true> : forward_kernel<T, kN, K, false>;
      kernel<<<plan.blocks(), kThreads, 0, stream>>>(v, plan, y, y_stride,
                                                     in_place ? nullptr : state_out);
      LRNN_CUDA_CHECK_LAUNCH();
      if (in_place) store_final_state(stream, v, state_out);
    });
  });
}

template <class T>
void forward(Context& ctx, const CausalConv1dForward& a) {
  const Conv<T> v = conv_of<T>(a);
  T* const y = a.y.data<T>();
  const std::int64_t y_stride = detail::row_stride(a.y);
  float* const state_out = a.state_out ? a.state_out.data<float>() : nullptr;
  const cudaStream_t stream = ctx.stream().handle;
  if (stream_forward(stream, v, y, y_stride, state_out)) return;
  forward_plain_kernel<T>
      <<<blocks_for(v.batch * v.seqlen * v.channels), kThreads, 0, stream>>>(v, y, y_stride);
  LRNN_CUDA_CHECK_LAUNCH();
  if (state_out != nullptr) store_final_state(stream, v, state_out);
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
  float* const state = a.state.data<float>();
  visit_window(v, state, [&]<int K>() {
    constexpr std::int64_t kMostBlocks = 65535;  // of the second dimension of a grid
    const dim3 blocks(static_cast<unsigned>(blocks_for(v.channels)),
                      static_cast<unsigned>(std::min(v.batch, kMostBlocks)));
    launch_overlapped(step_kernel<T, K>, blocks, kThreads, 0, ctx.stream().handle, v, a.y.data<T>(),
                      detail::row_stride(a.y), state);
  });
}

}  // namespace
}  // namespace conv

void causal_conv1d_forward(Context& ctx, const CausalConv1dForward& a) {
  visit_float("causal_conv1d_forward", a.x.dtype(), [&]<class T>() { conv::forward<T>(ctx, a); });
}
void causal_conv1d_step(Context& ctx, const CausalConv1dStep& a) {
  visit_float("causal_conv1d_step", a.x.dtype(), [&]<class T>() { conv::step<T>(ctx, a); });
}

}  // namespace lrnn::cuda
