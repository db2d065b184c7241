// Causal depthwise convolution over time: forward and step.
//
// Widths 2, 3, 4: a thread owns kSteps steps of kN neighbouring channels and asks for all inputs of
// its window at once; a warp owns 32 kN channels, a block kTimeWarps kSteps steps of them. Threads
// are short, so that the loads of some blocks overlap the stores of others; what windows share
// comes from L1 and L2. Bound by HBM: x in, y out, at 83 % of the rate of a copy for B8 L2048 C1536
// and 96 % for B1 L65536 C1536 (bfloat16, width 4). The thread that meets the last valid step leaves
// the final state, unless that would overwrite a state_in which another block may not have read
// yet. Other widths take one thread per element.
#include <climits>

#include "common/causal_conv1d.cuh"

namespace lrnn::cuda {
namespace conv {
namespace {

/// Steps of a thread, warps of a block, each with the steps after those of the one before, and
/// blocks per multiprocessor that registers must allow.
constexpr int kSteps = 4;
constexpr int kTimeWarps = 4;
constexpr int kResident = 8;

/// Division of numbers below 2^31 by a multiplication: a block is too short for more.
struct Divisor {
  unsigned by, factor;
  int shift;

  explicit Divisor(std::int64_t d) : by(static_cast<unsigned>(d)), factor(0), shift(31) {
    while ((std::int64_t{1} << (shift - 31)) < d) ++shift;
    factor = static_cast<unsigned>(((std::uint64_t{1} << shift) + by - 1) / by);
  }
  __device__ __forceinline__ unsigned quotient(unsigned n) const {
    return static_cast<unsigned>((std::uint64_t{n} * factor) >> shift);
  }
};

/// How the grid cuts the problem: channels fastest.
struct Cut {
  Divisor tiles;  // of 32 kN channels
  Divisor rows;   // of a block's steps, in a sequence
};

/// What a thread of the forward kernel owns: kSteps steps from `begin` on of kN channels.
template <int kN>
struct Piece {
  std::int64_t b, begin, channel;

  __device__ __forceinline__ explicit Piece(const Cut& cut) {
    const unsigned row = cut.tiles.quotient(blockIdx.x);
    const unsigned tile = blockIdx.x - row * cut.tiles.by;
    const unsigned sequence = cut.rows.quotient(row);
    b = sequence;
    begin = (std::int64_t{row - sequence * cut.rows.by} * kTimeWarps + threadIdx.x / 32) * kSteps;
    channel = (std::int64_t{tile} * 32 + threadIdx.x % 32) * kN;
  }
};

/// The last K inputs of a thread's channels before `length`. state_out may be state_in: slot k
/// comes from a slot of at least k, so ascending order reads before it writes.
template <class T, int kN, int K>
__device__ __forceinline__ void store_state(const Conv<T>& v, const Piece<kN>& p,
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

/// The parameters of a thread as they lie in memory.
template <class T, int kN, int K>
struct PackedTaps {
  Packed<T, kN> rows[K];  // kN K consecutive elements, taps fastest
  Packed<T, kN> shift;

  __device__ __forceinline__ PackedTaps(const Conv<T>& v, std::int64_t channel) : shift{} {
#pragma unroll
    for (int k = 0; k < K; ++k) rows[k].load_constant(v.weight + channel * K + k * kN);
    if (v.bias != nullptr) shift.load_constant(v.bias + channel);
  }
  __device__ __forceinline__ float weight(int i, int k) const {
    return rows[(i * K + k) / kN].get((i * K + k) % kN);
  }
  __device__ __forceinline__ float bias(int i) const { return shift.get(i); }
};

/// Inputs of a thread's steps and of the K - 1 before, which become its results.
template <class T, int kN, int K>
struct Rows {
  static constexpr int kCount = kSteps + K - 1;
  static constexpr int kPair = sizeof(T) == 2 && kN > 1 ? 2 : 1;  // channels of a word
  Packed<T, kN> rows[kCount];

  /// From `from` on, those of [first, end); the others are 0.
  __device__ __forceinline__ Rows(const T* from, std::int64_t stride, int first, int end) : rows{} {
#pragma unroll
    for (int i = 0; i < kCount; ++i, from += stride)
      if (i >= first && i < end) rows[i].load_constant(from);
  }
  /// `state`: where the window before the first step lies, or null.
  template <bool kSilu>
  __device__ __forceinline__ void convolve(const PackedTaps<T, kN, K>& taps, const float* state) {
#pragma unroll
    for (int c = 0; c < kN; c += kPair) {
      float out[kSteps][kPair];
#pragma unroll
      for (int e = 0; e < kPair; ++e) {
        float in[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) in[i] = rows[i].get(c + e);
        if (state != nullptr)
#pragma unroll
          for (int k = 1; k < K; ++k) in[k - 1] = state[(c + e) * K + k];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          float sum = taps.bias(c + e);
#pragma unroll
          for (int k = 0; k < K; ++k) sum = fmaf(taps.weight(c + e, k), in[s + k], sum);
          out[s][e] = kSilu ? sum * gate(sum) : sum;
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        Packed<T, kPair> pair;
        pair.set(out[s]);
        rows[s].words[c / kPair] = pair.words[0];
      }
    }
  }
  /// Writes `count` results, zeros from `valid` on.
  __device__ __forceinline__ void store(T* to, std::int64_t stride, int count, int valid) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s, to += stride) {
      if (s >= count) return;
      if (s >= valid) rows[s] = {};
      rows[s].store(to);
    }
  }
};

template <class T, int kN, int K, bool kSilu>
__global__ __launch_bounds__(32 * kTimeWarps, kResident) void forward_kernel(
    Conv<T> v, Cut cut, T* y, std::int64_t y_stride, float* state_out) {
  const Piece<kN> p(cut);
  if (p.channel >= v.channels || p.begin >= v.seqlen) return;
  const int steps = static_cast<int>(min(v.seqlen - p.begin, std::int64_t{kSteps}));
  const std::int64_t token = p.b * v.seqlen + p.begin;
  // Inputs beyond the length meet no result that is kept.
  Rows<T, kN, K> rows(v.x + (token - (K - 1)) * v.x_stride + p.channel, v.x_stride,
                      p.begin == 0 ? K - 1 : 0, steps + K - 1);
  const PackedTaps<T, kN, K> taps(v, p.channel);
  if (p.begin == 0 && v.state_in != nullptr)
    rows.template convolve<kSilu>(taps, v.state_in + (p.b * v.channels + p.channel) * K);
  else
    rows.template convolve<kSilu>(taps, nullptr);
  const std::int64_t length = v.length(p.b);
  const std::int64_t valid = length - p.begin;
  rows.store(y + token * y_stride + p.channel, y_stride, steps,
             static_cast<int>(min(max(valid, std::int64_t{0}), std::int64_t{kSteps})));
  if (state_out == nullptr) return;
  if ((valid > 0 && valid <= steps) || (length == 0 && p.begin == 0))
    store_state<T, kN, K>(v, p, length, state_out);
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
      const Cut cut{Divisor((v.channels / kN + 31) / 32),
                    Divisor((v.seqlen + kTimeWarps * kSteps - 1) / (kTimeWarps * kSteps))};
      const std::int64_t blocks = std::int64_t{cut.tiles.by} * cut.rows.by * v.batch;
      LRNN_CHECK(blocks <= INT_MAX, InvalidArgument, "causal_conv1d: too many elements: ",
                 v.batch * v.seqlen, " x ", v.channels);
      const bool in_place = state_out != nullptr && state_out == v.state_in && v.seqlen > kSteps;
      const auto kernel = v.silu ? forward_kernel<T, kN, K, true> : forward_kernel<T, kN, K, false>;
      kernel<<<static_cast<unsigned>(blocks), 32 * kTimeWarps, 0, stream>>>(
          v, cut, y, y_stride, in_place ? nullptr : state_out);
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
