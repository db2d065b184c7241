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

template <class T>
struct Gradients {
  DeviceRows<const T> dh;
  const float* chunk_states;
  const float* entering;  // [B, segments, E], from the right; null: 0
  DeviceRows<T> dv, dpre_r, dpre_i;
  float* dstate_in;  // [B, E] or null
  float* partial;    // [B, segments, E]
  float2* ends;      // [B, segments, E]; step 1
};

/// What the gates of a slice are made of, and the state that enters the tile.
template <class T>
struct RawTile {
  Pair<T> v[kSteps], pre_r[kSteps], pre_i[kSteps];
  float2 state;

  template <bool kVector>
  __device__ __forceinline__ void load(const Inputs<T>& p, const float* chunk_states,
                                       const Place<Wide>& at, int t0, int length) {
    const int valid = at.steps(t0, min(length, at.end));
    load_slice<kVector>(v, p.v, at, t0, valid, 0.0F);
    load_slice<kVector>(pre_r, p.pre_r, at, t0, valid, kClosed);
    load_slice<kVector>(pre_i, p.pre_i, at, t0, valid, 0.0F);
    state = at.template load<kVector>(
        chunk_states, static_cast<std::int64_t>(at.b) * p.chunks + t0 / kChunk, p.channels);
  }
};

/// One token of one channel: what is read throughout.
struct Token {
  float a;        // multiplier
  float drive;    // by which v enters the state
  float bracket;  // dlog_a per unit of g, times log a; from the replay on
};
/// What only the replay reads.
struct Slope {
  float log_a;
  float ratio;  // a^2 / (1 - a^2)
};
/// What only the end of a tile reads.
struct Rest {
  float not_r;  // 1 - r
  float di;     // dpre_i per unit of g
};
/// Of the two channels of a thread, in one 16-byte access.
template <class S>
struct alignas(16) PairOfTokens {
  S x, y;
};

template <class T>
__device__ __forceinline__ void open_gates(float rate, float v, float pre_r, float pre_i,
                                           Token& token, Slope& slope, Rest& rest) {
  const float r = sigmoid<T>(pre_r, rest.not_r);
  float not_i;
  const float i = sigmoid<T>(pre_i, not_i);
  float u;
  decay(rate * r, token.a, u);
  const float w = u * (2.0F - u);
  const float inverse = inverse_root(fmaxf(w, 1.2e-38F));  // a NaN comes back by the factor w
  token.drive = w * inverse * i;
  rest.di = token.drive * v * not_i;
  slope.log_a = kLn2 * (rate * r);
  slope.ratio = (token.a * inverse) * (token.a * inverse);
}

/// Moves the state over the token.
__device__ __forceinline__ void replay(Token& token, const Slope& slope, float v, float& state) {
  const float kept = token.a * state;
  const float b = token.drive * v;
  state = kept + b;
  token.bracket = slope.log_a * fmaf(-b, slope.ratio, kept);
}

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
  Pair<T> next_r[kSteps];
  Pair<T> next_dh[kSteps];
  const auto load = [&](int t) {
    const int valid = at.steps(t, min(length, at.end));
    load_slice<kVector>(next_r, p.pre_r, at, t, valid, kClosed);
    load_slice<kVector>(next_dh, d.dh, at, t, valid, 0.0F);
  };
  load(t0);
  for (; t0 >= at.begin; t0 -= Wide::kTile, parity ^= 1) {
    float2 a[kSteps];
    Pair<T> dh_pairs[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float2 pre_r = unpack(next_r[j]);
      float2 u;
      decay(rate.x * sigmoid<T>(pre_r.x), a[j].x, u.x);
      decay(rate.y * sigmoid<T>(pre_r.y), a[j].y, u.y);
      dh_pairs[j] = next_dh[j];
    }
    if (t0 > at.begin) load(t0 - Wide::kTile);
    Affine slice;
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j) {
      const float2 dh = unpack(dh_pairs[j]);
      slice = {{a[j].x * slice.a.x, a[j].y * slice.a.y},
               {a[j].x * (dh.x + slice.b.x), a[j].y * (dh.y + slice.b.y)}};
    }
    chain<Wide, true>(slice, carry, slots[parity], at, &product);
  }
  if (at.writes()) store_end(d.ends, at, segments, p.channels, product, carry);
}

/// Blocks of the main pass on a multiprocessor.
template <class T>
constexpr int kResident = sizeof(T) == 2 ? 4 : 3;

template <class T, bool kVector>
__global__ __launch_bounds__(Wide::kThreads,
                             kResident<T>) void rglru_scan_backward_kernel(Inputs<T> p,
                                                                           Gradients<T> d,
                                                                           Segments segments) {
  __shared__ Slots<Wide> forward_slots;
  __shared__ Slots<Wide> reverse_slots;
  // Every thread reads what it wrote itself. In registers these would cost a quarter of the
  // resident blocks.
  __shared__ PairOfTokens<Slope> slopes[kSteps][Wide::kThreads];
  __shared__ PairOfTokens<Rest> rests[kSteps][Wide::kThreads];
  const Place<Wide> at(p, segments);
  const int length = p.length(at.b);
  const float2 rate = rates(p, at);
  float2 carry{0.0F, 0.0F};
  if (d.entering != nullptr)
    carry = at.template load<kVector>(d.entering, at.row(segments), p.channels);
  float2 sum{0.0F, 0.0F};
  int t0 = at.begin + (at.end - at.begin - 1) / Wide::kTile * Wide::kTile;
  RawTile<T> raw;
  raw.template load<kVector>(p, d.chunk_states, at, t0, length);
  for (; t0 >= at.begin; t0 -= Wide::kTile) {
    const int valid = at.steps(t0, min(length, at.end));
    Pair<T> dh_pairs[kSteps];  // read after the first barrier
    load_slice<kVector>(dh_pairs, d.dh, at, t0, valid, 0.0F);
    Token x[kSteps];
    Token y[kSteps];
    Affine slice;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float2 v = unpack(raw.v[j]);
      const float2 pre_r = unpack(raw.pre_r[j]);
      const float2 pre_i = unpack(raw.pre_i[j]);
      PairOfTokens<Slope> slope;
      PairOfTokens<Rest> rest;
      open_gates<T>(rate.x, v.x, pre_r.x, pre_i.x, x[j], slope.x, rest.x);
      open_gates<T>(rate.y, v.y, pre_r.y, pre_i.y, y[j], slope.y, rest.y);
      slopes[j][threadIdx.x] = slope;
      rests[j][threadIdx.x] = rest;
      slice = Affine{{x[j].a, y[j].a}, {x[j].drive * v.x, y[j].drive * v.y}}.after(slice);
    }
    float2 leaves = raw.state;
    float2 state = chain<Wide, false>(slice, leaves, forward_slots, at);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float2 v = unpack(raw.v[j]);
      const PairOfTokens<Slope> slope = slopes[j][threadIdx.x];
      replay(x[j], slope.x, v.x, state.x);
      replay(y[j], slope.y, v.y, state.y);
    }
    if (t0 > at.begin) raw.template load<kVector>(p, d.chunk_states, at, t0 - Wide::kTile, length);
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
    const int stored = at.steps(t0, at.end);
    float2 tile_sum{0.0F, 0.0F};
    const auto write = [&]<bool kFull>() {
#pragma unroll
      for (int j = kSteps - 1; j >= 0; --j) {
        const float2 dh = unpack(dh_pairs[j]);
        float2 g{dh.x + right.x, dh.y + right.y};
        right = {x[j].a * g.x, y[j].a * g.y};
        if (!kFull && j >= valid) g = {0.0F, 0.0F};
        const float2 t{g.x * x[j].bracket, g.y * y[j].bracket};
        tile_sum = {tile_sum.x + t.x, tile_sum.y + t.y};
        T* const dv_at = dv.next();
        T* const dpre_r_at = dpre_r.next();
        T* const dpre_i_at = dpre_i.next();
        if (!kFull && j >= stored) continue;
        const PairOfTokens<Rest> rest = rests[j][threadIdx.x];
        store_pair<kVector>(dv_at, {g.x * x[j].drive, g.y * y[j].drive}, at.second);
        store_pair<kVector>(dpre_r_at, {t.x * rest.x.not_r, t.y * rest.y.not_r}, at.second);
        store_pair<kVector>(dpre_i_at, {g.x * rest.x.di, g.y * rest.y.di}, at.second);
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
  // Counts of blocks, for 132 multiprocessors. Segments cost a second reading of dh and pre_r.
  constexpr std::int64_t kEnoughBlocks = 264;
  constexpr std::int64_t kFullBlocks = 132 * kResident<T>;
  const cudaStream_t stream = ctx.stream().handle;
  const std::int64_t blocks = channel_tiles<Wide>(p.channels) * p.batch;
  const Segments segments =
      make_segments(blocks, blocks >= kEnoughBlocks ? 1 : kFullBlocks, p.seqlen, Wide::kTile);
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
