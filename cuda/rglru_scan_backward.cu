// Backward of rglru_scan. Ownership and segments: common/rglru_scan.cuh.
//
// Tiles run from the last to the first. A thread recomputes the gates of its slice, learns from the
// saved state and the slices before it what enters, and replays the states; then the adjoint
//   g_t = dh_t + a_{t+1} g_{t+1}
// is chained through the slices from the right. With w = 1 - a^2 the gradient of log a times log a
// is g (a h log a - b a^2 log a / w), bounded as a -> 1; its sum over time stays in a register and
// ends as one row of partial sums per segment. Bound by HBM, 4 elements in and 3 out, and by some
// 85 instructions per element.
#include <cmath>

#include "common/reduce.cuh"
#include "common/rglru_scan.cuh"

namespace lrnn::cuda {
namespace {

using namespace rglru;  // NOLINT(google-build-using-namespace)

using Wide = Layout<16, 4>;
static_assert(Wide::kTile == kChunk, "a tile begins with a saved state");

enum class Pass { Whole, Ends };

template <class T>
struct Gradients {
  DeviceRows<const T> dh;
  const float* chunk_states;
  const float* entering;  // [B, segments, E], from the right; null: 0
  DeviceRows<T> dv, dpre_r, dpre_i;
  float* dstate_in;  // [B, E] or null
  float* partial;    // [B, segments, E]
  float2* ends;      // [B, segments, E], pass Ends
};

template <class T>
struct RawTile {
  Pair<T> v[kSteps], pre_r[kSteps], pre_i[kSteps], dh[kSteps];
  float2 state;  // that enters the tile

  template <bool kVector, Pass pass>
  __device__ __forceinline__ void load(const Inputs<T>& p, const Gradients<T>& d,
                                       const Place<Wide>& at, int t0, int length) {
    const int valid = at.steps(t0, min(length, at.end));
    load_slice<kVector>(pre_r, p.pre_r, at, t0, valid, kClosed);
    load_slice<kVector>(dh, d.dh, at, t0, valid, 0.0F);
    if (pass == Pass::Ends) return;
    load_slice<kVector>(v, p.v, at, t0, valid, 0.0F);
    load_slice<kVector>(pre_i, p.pre_i, at, t0, valid, 0.0F);
    state = at.template load<kVector>(
        d.chunk_states, static_cast<std::int64_t>(at.b) * p.chunks + t0 / kChunk, p.channels);
  }
};

/// One token of one channel.
struct Token {
  float a;  // multiplier
  float log_a;
  float drive;  // by which v enters the state
  float ratio;  // a^2 / (1 - a^2); after the replay the bracket of dlog_a
  float not_r;
  float di;  // dpre_i per unit of g

  template <class T>
  __device__ __forceinline__ void set(float rate, float v, float pre_r, float pre_i) {
    const float r = sigmoid<T>(pre_r, not_r);
    float not_i;
    const float i = sigmoid<T>(pre_i, not_i);
    float u;
    decay(rate * r, a, u);
    log_a = kLn2 * (rate * r);
    const float w = u * (2.0F - u);
    const float inverse = inverse_root(fmaxf(w, 1.2e-38F));  // a NaN comes back by the factor w
    drive = w * inverse * i;
    di = drive * v * not_i;
    const float root = a * inverse;
    ratio = root * root;
  }
  /// Moves the state over the token.
  __device__ __forceinline__ void replay(float v, float& state) {
    const float kept = a * state;
    const float b = drive * v;
    state = kept + b;
    ratio = log_a * fmaf(-b, ratio, kept);
  }
};

// Sums over the slices of the block and leaves those of a channel in its partial row.
__device__ void store_partial(float2 sum, const Place<Wide>& at, float* row, const float* a_log) {
  __shared__ float2 sums[Wide::kSlices][Wide::kLanes];
  sums[at.warp * Wide::kParts + at.part][at.lane] = sum;
  __syncthreads();
  if (!at.writes()) return;
  sum = {0.0F, 0.0F};
  for (int s = 0; s < Wide::kSlices; ++s) {
    sum.x += sums[s][at.lane].x;
    sum.y += sums[s][at.lane].y;
  }
  // sig(-x) / log sig(x). Both vanish for large x, where the ratio tends to -1.
  const auto ratio = [](float x) {
    const float y = expf(-fabsf(x));
    if (x < 0.0F) return -1.0F / ((1.0F + y) * (log1pf(y) - x));
    return y > 0.0F ? -y / ((1.0F + y) * log1pf(y)) : -1.0F;
  };
  row[at.channel] = sum.x * ratio(a_log[at.channel]);
  if (at.second) row[at.channel + 1] = sum.y * ratio(a_log[at.channel + 1]);
}

// dh and the multipliers alone: the map of a segment, from right to left.
template <class T, bool kVector>
__global__ __launch_bounds__(Wide::kThreads) void rglru_scan_adjoint_ends_kernel(
    Inputs<T> p, Gradients<T> d, Segments segments) {
  __shared__ Slots<Wide> slots[2];
  const Place<Wide> at(p, segments);
  if (at.segment == 0) return;  // nothing follows it
  const int length = p.length(at.b);
  const float2 rate = rates(p, at);
  float2 carry{0.0F, 0.0F};
  float2 product{1.0F, 1.0F};
  int parity = 0;
  int t0 = at.begin + (at.end - at.begin - 1) / Wide::kTile * Wide::kTile;
  RawTile<T> next;
  next.template load<kVector, Pass::Ends>(p, d, at, t0, length);
  for (; t0 >= at.begin; t0 -= Wide::kTile, parity ^= 1) {
    const RawTile<T> raw = next;
    if (t0 > at.begin) next.template load<kVector, Pass::Ends>(p, d, at, t0 - Wide::kTile, length);
    Affine slice;
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j) {
      const float2 pre_r = unpack(raw.pre_r[j]);
      const float2 dh = unpack(raw.dh[j]);
      float2 a;
      float2 u;
      decay(rate.x * sigmoid<T>(pre_r.x), a.x, u.x);
      decay(rate.y * sigmoid<T>(pre_r.y), a.y, u.y);
      slice = {{a.x * slice.a.x, a.y * slice.a.y},
               {a.x * (dh.x + slice.b.x), a.y * (dh.y + slice.b.y)}};
    }
    chain<Wide, true>(slice, carry, slots[parity], at, &product);
  }
  if (at.writes()) store_end(d.ends, at, segments, p.channels, product, carry);
}

template <class T, bool kVector>
__global__ __launch_bounds__(Wide::kThreads,
                             sizeof(T) == 2
                                 ? 3
                                 : 2) void rglru_scan_backward_kernel(Inputs<T> p, Gradients<T> d,
                                                                      Segments segments) {
  __shared__ Slots<Wide> forward_slots;
  __shared__ Slots<Wide> reverse_slots;
  const Place<Wide> at(p, segments);
  const int length = p.length(at.b);
  const float2 rate = rates(p, at);
  float2 carry{0.0F, 0.0F};
  if (d.entering != nullptr)
    carry = at.template load<kVector>(d.entering, at.row(segments), p.channels);
  float2 sum{0.0F, 0.0F};
  int t0 = at.begin + (at.end - at.begin - 1) / Wide::kTile * Wide::kTile;
  RawTile<T> raw;
  raw.template load<kVector, Pass::Whole>(p, d, at, t0, length);
  for (; t0 >= at.begin; t0 -= Wide::kTile) {
    Token x[kSteps];
    Token y[kSteps];
    Affine slice;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float2 v = unpack(raw.v[j]);
      const float2 pre_r = unpack(raw.pre_r[j]);
      const float2 pre_i = unpack(raw.pre_i[j]);
      x[j].template set<T>(rate.x, v.x, pre_r.x, pre_i.x);
      y[j].template set<T>(rate.y, v.y, pre_r.y, pre_i.y);
      slice = Affine{{x[j].a, y[j].a}, {x[j].drive * v.x, y[j].drive * v.y}}.after(slice);
    }
    float2 leaves = raw.state;
    float2 state = chain<Wide, false>(slice, leaves, forward_slots, at);
    Pair<T> dh_pairs[kSteps];  // the rest of raw makes room for the tile before
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float2 v = unpack(raw.v[j]);
      x[j].replay(v.x, state.x);
      y[j].replay(v.y, state.y);
      dh_pairs[j] = raw.dh[j];
    }
    if (t0 > at.begin) raw.template load<kVector, Pass::Whole>(p, d, at, t0 - Wide::kTile, length);
    slice = Affine();
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j) {
      const float2 dh = unpack(dh_pairs[j]);
      slice = {{x[j].a * slice.a.x, y[j].a * slice.a.y},
               {x[j].a * (dh.x + slice.b.x), y[j].a * (dh.y + slice.b.y)}};
    }
    float2 right = chain<Wide, true>(slice, carry, reverse_slots, at);
    Column<T> dv(d.dv, at, t0, true);
    Column<T> dpre_r(d.dpre_r, at, t0, true);
    Column<T> dpre_i(d.dpre_i, at, t0, true);
    const int valid = at.steps(t0, min(length, at.end));
    const int stored = at.steps(t0, at.end);
    float2 tile_sum{0.0F, 0.0F};
    const auto write = [&]<bool kFull>() {
#pragma unroll
      for (int j = kSteps - 1; j >= 0; --j) {
        const float2 dh = unpack(dh_pairs[j]);
        float2 g{dh.x + right.x, dh.y + right.y};
        right = {x[j].a * g.x, y[j].a * g.y};
        if (!kFull && j >= valid) g = {0.0F, 0.0F};
        const float2 t{g.x * x[j].ratio, g.y * y[j].ratio};
        tile_sum = {tile_sum.x + t.x, tile_sum.y + t.y};
        T* const dv_at = dv.next();
        T* const dpre_r_at = dpre_r.next();
        T* const dpre_i_at = dpre_i.next();
        if (!kFull && j >= stored) continue;
        store_pair<kVector>(dv_at, {g.x * x[j].drive, g.y * y[j].drive}, at.second);
        store_pair<kVector>(dpre_r_at, {t.x * x[j].not_r, t.y * y[j].not_r}, at.second);
        store_pair<kVector>(dpre_i_at, {g.x * x[j].di, g.y * y[j].di}, at.second);
      }
    };
    if (valid == kSteps)
      write.template operator()<true>();
    else
      write.template operator()<false>();
    sum = {sum.x + tile_sum.x, sum.y + tile_sum.y};
  }
  if (d.dstate_in != nullptr && at.segment == 0 && at.writes())
    at.template store<kVector>(d.dstate_in, at.b, p.channels, carry);
  store_partial(sum, at, d.partial + at.row(segments) * p.channels, p.a_log);
}

template <class T, bool kVector>
void backward(Context& ctx, const Inputs<T>& p, Gradients<T> d, float* da_log) {
  constexpr std::int64_t kWantedBlocks = 400;  // of which three fit on a multiprocessor
  const cudaStream_t stream = ctx.stream().handle;
  const std::int64_t blocks = channel_tiles<Wide>(p.channels) * p.batch;
  const Segments segments = make_segments(blocks, kWantedBlocks, p.seqlen, Wide::kTile);
  const Shape shape = {p.batch, segments.count, p.channels};
  const auto grid = static_cast<unsigned>(blocks * segments.count);
  Tensor ends, entering;
  if (segments.count > 1) {
    ends = ctx.empty(Shape{p.batch, segments.count, p.channels, 2}, DType::float32);
    entering = ctx.empty(shape, DType::float32);
    d.ends = reinterpret_cast<float2*>(ends.view().data<float>());
    rglru_scan_adjoint_ends_kernel<T, kVector><<<grid, Wide::kThreads, 0, stream>>>(p, d, segments);
    LRNN_CUDA_CHECK_LAUNCH();
    chain_segments(ctx, d.ends, d.entering, entering.view().data<float>(), p.batch, segments.count,
                   p.channels, true);
    d.entering = entering.view().data<float>();
  }
  Tensor partial = ctx.empty(shape, DType::float32);
  d.partial = partial.view().data<float>();
  rglru_scan_backward_kernel<T, kVector><<<grid, Wide::kThreads, 0, stream>>>(p, d, segments);
  LRNN_CUDA_CHECK_LAUNCH();
  fold_partials(stream, d.partial, static_cast<int>(p.batch * segments.count), p.channels, da_log);
}

}  // namespace

void rglru_scan_backward(Context& ctx, const RglruScanBackward& a) {
  visit_float("rglru_scan_backward", a.in.v.dtype(), [&]<class T>() {
    const Inputs<T> p = make_inputs<T>(a.in);
    const Gradients<T> d{{a.dh.data<T>(), detail::row_stride(a.dh)},
                         a.chunk_states.data<float>(),
                         a.dstate_out ? a.dstate_out.data<float>() : nullptr,
                         {a.dv.data<T>(), detail::row_stride(a.dv)},
                         {a.dpre_r.data<T>(), detail::row_stride(a.dpre_r)},
                         {a.dpre_i.data<T>(), detail::row_stride(a.dpre_i)},
                         a.dstate_in ? a.dstate_in.data<float>() : nullptr,
                         nullptr,
                         nullptr};
    const bool pairs =
        allows_pairs(p.v, p.channels) && allows_pairs(p.pre_r, p.channels) &&
        allows_pairs(p.pre_i, p.channels) && allows_pairs(d.dh, p.channels) &&
        allows_pairs(d.dv, p.channels) && allows_pairs(d.dpre_r, p.channels) &&
        allows_pairs(d.dpre_i, p.channels) && allows_pairs(d.chunk_states, p.channels) &&
        allows_pairs(d.entering, p.channels) && allows_pairs(d.dstate_in, p.channels);
    if (pairs)
      backward<T, true>(ctx, p, d, a.da_log.data<float>());
    else
      backward<T, false>(ctx, p, d, a.da_log.data<float>());
  });
}

}  // namespace lrnn::cuda
