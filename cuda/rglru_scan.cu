// Forward and step of rglru_scan. Ownership and segments: common/rglru_scan.cuh.
//
// A thread turns its slice of a tile into multipliers and drives, scans it from a zero state,
// learns what enters it and adds that, multiplied by the running products. The next tile is loaded
// before the work on this one. Bound by HBM, 3 elements in and 1 out, closely followed by the 5
// special functions and some 45 other instructions per element.
#include <cmath>

#include "common/launch.cuh"
#include "common/rglru_scan.cuh"

namespace lrnn::cuda {
namespace rglru {
namespace {

// One thread owns one channel of one sequence.
__global__ __launch_bounds__(kCarryThreads) void chain_segments_kernel(
    const float2* __restrict__ ends, const float* __restrict__ start, float* __restrict__ entering,
    std::int64_t count, int segments, int channels, bool reverse) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kCarryThreads + threadIdx.x;
  if (i >= count) return;
  const std::int64_t b = i / channels;
  const std::int64_t e = i % channels;
  float state = start != nullptr ? start[i] : 0.0F;
  for (int k = 0; k < segments; ++k) {
    const int s = reverse ? segments - 1 - k : k;
    const std::int64_t at = (b * segments + s) * channels + e;
    entering[at] = state;
    if (k + 1 < segments) state = fmaf(ends[at].x, state, ends[at].y);
  }
}

}  // namespace

void chain_segments(Context& ctx, const float2* ends, const float* start, float* entering,
                    std::int64_t batch, int segments, int channels, bool reverse) {
  const std::int64_t count = batch * channels;
  chain_segments_kernel<<<static_cast<unsigned>((count + kCarryThreads - 1) / kCarryThreads),
                          kCarryThreads, 0, ctx.stream().handle>>>(ends, start, entering, count,
                                                                   segments, channels, reverse);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace rglru

namespace {

using namespace rglru;  // NOLINT(google-build-using-namespace)

using Wide = Layout<16, 4>;    // rows of 32 channels; splits time into segments
using Narrow = Layout<10, 8>;  // rows of 20 channels, for one wave of blocks over long sequences
using Thin = Layout<8, 8>;     // rows of 16 channels

enum class Pass { Whole, Ends };

template <class T>
struct Outputs {
  DeviceRows<T> h;
  float* state_out;       // [B, E] or null
  float* chunk_states;    // [B, chunks, E] or null
  const float* entering;  // [B, segments, E] or null: 0
  float2* ends;           // [B, segments, E], pass Ends
};

template <class T>
struct RawTile {
  Pair<T> v[kSteps], pre_r[kSteps], pre_i[kSteps];

  template <bool kVector, class L>
  __device__ __forceinline__ void load(const Inputs<T>& p, const Place<L>& at, int t0, int length) {
    const int valid = at.steps(t0, min(length, at.end));
    load_slice<kVector>(v, p.v, at, t0, valid, 0.0F);
    load_slice<kVector>(pre_r, p.pre_r, at, t0, valid, kClosed);
    load_slice<kVector>(pre_i, p.pre_i, at, t0, valid, 0.0F);
  }
};

template <class T, class L, bool kVector, Pass pass>
__global__ __launch_bounds__(L::kThreads) void rglru_scan_forward_kernel(Inputs<T> p,
                                                                         Outputs<T> out,
                                                                         Segments segments) {
  __shared__ Slots<L> slots[2];
  const Place<L> at(p, segments);
  if (pass == Pass::Ends && at.segment == segments.count - 1) return;  // nothing follows it
  const int length = p.length(at.b);
  const float2 rate = rates(p, at);
  float2 carry{0.0F, 0.0F};
  float2 product{1.0F, 1.0F};
  if (pass == Pass::Whole && out.entering != nullptr)
    carry = at.template load<kVector>(out.entering, at.row(segments), p.channels);

  RawTile<T> next;
  next.template load<kVector>(p, at, at.begin, length);
  int parity = 0;
  for (int t0 = at.begin; t0 < at.end; t0 += L::kTile, parity ^= 1) {
    const RawTile<T> raw = next;
    if (t0 + L::kTile < at.end) next.template load<kVector>(p, at, t0 + L::kTile, length);
    Affine slice;
    Affine up_to[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float2 v = unpack(raw.v[j]);
      const float2 pre_r = unpack(raw.pre_r[j]);
      const float2 pre_i = unpack(raw.pre_i[j]);
      Affine one;
      token<T>(rate.x, v.x, pre_r.x, pre_i.x, one.a.x, one.b.x);
      token<T>(rate.y, v.y, pre_r.y, pre_i.y, one.a.y, one.b.y);
      slice = one.after(slice);
      up_to[j] = slice;
    }
    if (pass == Pass::Ends) {
      chain<L, false>(slice, carry, slots[parity], at, &product);
      continue;
    }
    const float2 enters = chain<L, false>(slice, carry, slots[parity], at);
    const int t = t0 + at.offset;
    if (out.chunk_states != nullptr && t % kChunk == 0 && at.exists && t < at.end)
      at.template store<kVector>(out.chunk_states,
                                 static_cast<std::int64_t>(at.b) * p.chunks + t / kChunk,
                                 p.channels, enters);
    Column<T> h(out.h, at, t0);
    const int valid = at.steps(t0, min(length, at.end));
    if (valid == kSteps) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) store_pair<kVector>(h.next(), up_to[j](enters), at.second);
      continue;
    }
    const int stored = at.steps(t0, at.end);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      T* const to = h.next();
      const float2 state = j < valid ? up_to[j](enters) : float2{0.0F, 0.0F};
      if (j < stored) store_pair<kVector>(to, state, at.second);
    }
  }
  if (!at.writes()) return;
  if (pass == Pass::Ends)
    store_end(out.ends, at, segments, p.channels, product, carry);
  else if (out.state_out != nullptr && at.segment == segments.count - 1)
    at.template store<kVector>(out.state_out, at.b, p.channels, carry);
}

template <class T, class L, bool kVector, Pass pass>
void launch(Context& ctx, const Inputs<T>& p, const Outputs<T>& out, const Segments& segments) {
  const std::int64_t blocks = channel_tiles<L>(p.channels) * p.batch * segments.count;
  rglru_scan_forward_kernel<T, L, kVector, pass>
      <<<static_cast<unsigned>(blocks), L::kThreads, 0, ctx.stream().handle>>>(p, out, segments);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, bool kVector>
void forward_wide(Context& ctx, const Inputs<T>& p, Outputs<T> out, const Segments& segments) {
  Tensor ends, entering;
  if (segments.count > 1) {
    const Shape shape = {p.batch, segments.count, p.channels};
    ends = ctx.empty(Shape{p.batch, segments.count, p.channels, 2}, DType::float32);
    entering = ctx.empty(shape, DType::float32);
    out.ends = reinterpret_cast<float2*>(ends.view().data<float>());
    launch<T, Wide, kVector, Pass::Ends>(ctx, p, out, segments);
    chain_segments(ctx, out.ends, out.entering, entering.view().data<float>(), p.batch,
                   segments.count, p.channels, false);
    out.entering = entering.view().data<float>();
  }
  launch<T, Wide, kVector, Pass::Whole>(ctx, p, out, segments);
}

template <class T, bool kVector>
void forward(Context& ctx, const Inputs<T>& p, const Outputs<T>& out) {
  // A second reading of the inputs costs more than multiprocessors that are less than full, unless
  // many of them have nothing to do. Counts of blocks, for 132 multiprocessors that hold five wide
  // blocks each or two others.
  constexpr std::int64_t kEnoughWide = 400;
  constexpr std::int64_t kFullWide = 600;
  constexpr std::int64_t kOneWave = 132;
  constexpr std::int64_t kMostlyBusy = 96;
  const Segments whole = {1, p.seqlen};
  const std::int64_t wide = channel_tiles<Wide>(p.channels) * p.batch;
  const std::int64_t narrow = channel_tiles<Narrow>(p.channels) * p.batch;
  const std::int64_t thin = channel_tiles<Thin>(p.channels) * p.batch;
  if (wide >= kEnoughWide) return forward_wide<T, kVector>(ctx, p, out, whole);
  if (p.seqlen >= 2 * Narrow::kTile) {
    if (narrow >= kMostlyBusy && narrow <= kOneWave)
      return launch<T, Narrow, kVector, Pass::Whole>(ctx, p, out, whole);
    if (thin >= kMostlyBusy) return launch<T, Thin, kVector, Pass::Whole>(ctx, p, out, whole);
  }
  forward_wide<T, kVector>(ctx, p, out, make_segments(wide, kFullWide, p.seqlen, Wide::kTile));
}

constexpr int kTokenThreads = 128;

// One token: a thread owns one channel of one sequence. Bound by the launch.
template <class T>
__global__ __launch_bounds__(kTokenThreads) void rglru_scan_token_kernel(Inputs<T> p,
                                                                         Outputs<T> out) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x;
  if (i >= p.batch * p.channels) return;
  const std::int64_t b = i / p.channels;
  const int e = static_cast<int>(i % p.channels);
  const float before = out.entering != nullptr ? out.entering[i] : 0.0F;
  float h = before;
  if (p.length(b) > 0) {
    float a;
    float drive;
    token<T>(p.rate(e), to_float(p.v.row(b)[e]), to_float(p.pre_r.row(b)[e]),
             to_float(p.pre_i.row(b)[e]), a, drive);
    h = fmaf(a, before, drive);
  }
  out.h.row(b)[e] = from_float<T>(p.length(b) > 0 ? h : 0.0F);
  if (out.chunk_states != nullptr) out.chunk_states[i] = before;
  if (out.state_out != nullptr) out.state_out[i] = h;
}

}  // namespace

void rglru_scan_forward(Context& ctx, const RglruScanForward& a) {
  visit_float("rglru_scan_forward", a.in.v.dtype(), [&]<class T>() {
    const Inputs<T> p = make_inputs<T>(a.in);
    const Outputs<T> out{{a.h.data<T>(), detail::row_stride(a.h)},
                         a.state_out ? a.state_out.data<float>() : nullptr,
                         a.chunk_states ? a.chunk_states.data<float>() : nullptr,
                         a.in.state_in ? a.in.state_in.data<float>() : nullptr,
                         nullptr};
    if (p.seqlen == 1) {
      const std::int64_t count = p.batch * p.channels;
      launch_overlapped(rglru_scan_token_kernel<T>,
                        static_cast<unsigned>((count + kTokenThreads - 1) / kTokenThreads),
                        kTokenThreads, 0, ctx.stream().handle, p, out);
      return;
    }
    const bool pairs = allows_pairs(p.v, p.channels) && allows_pairs(p.pre_r, p.channels) &&
                       allows_pairs(p.pre_i, p.channels) && allows_pairs(out.h, p.channels) &&
                       allows_pairs(out.state_out, p.channels) &&
                       allows_pairs(out.chunk_states, p.channels) &&
                       allows_pairs(out.entering, p.channels);
    if (pairs)
      forward<T, true>(ctx, p, out);
    else
      forward<T, false>(ctx, p, out);
  });
}

}  // namespace lrnn::cuda
