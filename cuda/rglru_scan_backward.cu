// Backward of rglru_scan. Ownership and clusters: common/first_order.cuh.
//
// Tiles run from the last to the first. A thread recomputes the gates and the states of its slice
// from the saved state that enters it; then the adjoint
//   g_t = dh_t + a_{t+1} g_{t+1}
// is chained through the slices from the right. With w = 1 - a^2 the gradient of log a times log a
// is g (a h log a - b a^2 log a / w), bounded as a -> 1; its sum over time stays in a register and
// ends as one row of partial sums per block. Bound by issue slots, 84 instructions per element, and
// by HBM, 4 elements in and 3 out. bfloat16 E2560: B8 L2048 issues in 74 % of the cycles and
// reaches 67 % of the rate of a copy, B1 L65536 65 %.
#include <cmath>

#include "common/reduce.cuh"
#include "common/rglru_scan.cuh"

namespace lrnn::cuda {
namespace {

using namespace rglru;  // NOLINT(google-build-using-namespace)

template <class T>
struct Gradients {
  DeviceRows<const T> dh;
  const float* chunk_states;
  const float* dstate_out;  // [B, E] or null: 0
  DeviceRows<T> dv, dpre_r, dpre_i;
  float* dstate_in;  // [B, E] or null
  float* partial;    // [B, kRanks, E]
};

/// One token of one channel.
struct Token {
  float a;        // multiplier
  float drive;    // by which v enters the state
  float bracket;  // dlog_a per unit of g, times log a
  float not_r;    // 1 - r
  float di;       // dpre_i per unit of g
};
template <class T>
struct Stage {
  TileOf<T> v, pre_r, pre_i;
};
template <class T, int kRanks>
struct Shared {
  Stage<T> stages[2];
  TileOf<T> dh[3];  // one more, because it is read to the end of the round
  ChainSlots<kRanks> slots[2];
};

/// The token, and the state moved over it.
template <class T>
__device__ __forceinline__ Token open_gates(float rate, float v, float pre_r, float pre_i,
                                            float& state) {
  Token token;
  const float r = sigmoid<T>(pre_r, token.not_r);
  float not_i;
  const float i = sigmoid<T>(pre_i, not_i);
  float u;
  decay(rate * r, token.a, u);
  const float w = fmaf(u, 2.0F - u, 1.2e-38F);  // where u = 0, log a = 0 clears what follows
  const float inverse = inverse_root(w);
  token.drive = w * inverse * i;
  const float b = token.drive * v;
  token.di = b * not_i;
  const float log_a = kLn2 * (rate * r);
  // a^2 / (1 - a^2); the difference is exact to 5e-7, of 1 where a vanishes
  const float ratio =
      sizeof(T) == 2 ? fmaf(inverse, inverse, -1.0F) : (token.a * inverse) * (token.a * inverse);
  const float kept = token.a * state;
  state = kept + b;
  token.bracket = log_a * fmaf(-b, ratio, kept);
  return token;
}

// Sums over the slices of the block and leaves those of a channel in its partial row.
template <class T>
__device__ void store_partial(const Inputs<T>& p, float2 sum, const Place& at, float* row) {
  __shared__ float sums[kSlices][kChannels];
  const int slice = 2 * at.warp + at.part;
  *reinterpret_cast<float2*>(&sums[slice][2 * (at.lane % kLanes)]) = sum;
  __syncthreads();
  const int channel = at.first_channel + at.lane;
  if (at.warp != 0 || channel >= p.channels) return;
  float total = 0.0F;
  for (int s = 0; s < kSlices; ++s) total += sums[s][at.lane];
  // sig(-x) / log sig(x). Both vanish for large x, where the ratio tends to -1.
  const auto ratio = [](float x) {
    const float y = expf(-fabsf(x));
    if (x < 0.0F) return -1.0F / ((1.0F + y) * (log1pf(y) - x));
    return y > 0.0F ? -y / ((1.0F + y) * log1pf(y)) : -1.0F;
  };
  row[channel] = total * ratio(p.a_log[channel]);
}

/// The gates of a slice and its adjoint from the right: x -> a_0 (dh_0 + a_1 (dh_1 + ... x)).
template <class T>
__device__ __forceinline__ Affine open_slice(Stage<T>& stage, TileOf<T>& dh_tile, const Place& at,
                                             float2 rate, float2 state, Token (&x)[kSteps],
                                             Token (&y)[kSteps]) {
  Affine slice;
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const float2 v = unpack(stage.v.pair(at, j));
    const float2 pre_r = unpack(stage.pre_r.pair(at, j));
    const float2 pre_i = unpack(stage.pre_i.pair(at, j));
    const float2 dh = unpack(dh_tile.pair(at, j));
    x[j] = open_gates<T>(rate.x, v.x, pre_r.x, pre_i.x, state.x);
    y[j] = open_gates<T>(rate.y, v.y, pre_r.y, pre_i.y, state.y);
    slice.a = {slice.a.x * x[j].a, slice.a.y * y[j].a};
    slice.b = {fmaf(slice.a.x, dh.x, slice.b.x), fmaf(slice.a.y, dh.y, slice.b.y)};
  }
  return slice;
}

/// Where the gradients of a slice go, from its last token to its first.
template <class T>
struct Columns {
  Column<T> dv, dpre_r, dpre_i;
};

/// Stores the gradients of a slice that `right` enters from the right, and adds to `sum`. Those of
/// tokens from `valid` on are 0; those from `stored` on do not exist.
template <bool kFull, bool kVector, class T>
__device__ __forceinline__ void store_slice(TileOf<T>& dh_tile, const Place& at, Columns<T> to,
                                            float2 right, const Token (&x)[kSteps],
                                            const Token (&y)[kSteps], int valid, int stored,
                                            float2& sum) {
  float2 tile_sum{0.0F, 0.0F};
#pragma unroll
  for (int j = kSteps - 1; j >= 0; --j) {
    const float2 dh = unpack(dh_tile.pair(at, j));
    float2 g{dh.x + right.x, dh.y + right.y};
    right = {x[j].a * g.x, y[j].a * g.y};
    if (!kFull && j >= valid) g = {0.0F, 0.0F};
    const float2 t{g.x * x[j].bracket, g.y * y[j].bracket};
    tile_sum = {tile_sum.x + t.x, tile_sum.y + t.y};
    T* const dv = to.dv.next();
    T* const dpre_r = to.dpre_r.next();
    T* const dpre_i = to.dpre_i.next();
    if (!kFull && j >= stored) continue;
    store_pair<kVector>(dv, {g.x * x[j].drive, g.y * y[j].drive}, at.second);
    store_pair<kVector>(dpre_r, {t.x * x[j].not_r, t.y * y[j].not_r}, at.second);
    store_pair<kVector>(dpre_i, {g.x * x[j].di, g.y * y[j].di}, at.second);
  }
  sum = {sum.x + tile_sum.x, sum.y + tile_sum.y};
}

/// Blocks on a multiprocessor that registers and shared memory allow.
template <class T>
constexpr int kResident = sizeof(T) == 2 ? 4 : 2;

/// Brings the operands of tiles, from the last to the first.
template <class T, bool kVector>
struct Feed {
  Stream<T, kVector> v, pre_r, pre_i, dh;
  const float* chunk_states;

  __device__ __forceinline__ Feed(const Inputs<T>& p, const Gradients<T>& d, const Place& at)
      : v(p.v, at),
        pre_r(p.pre_r, at),
        pre_i(p.pre_i, at),
        dh(d.dh, at),
        chunk_states(d.chunk_states) {}
  __device__ __forceinline__ void move(int tokens) {
    v.move(tokens);
    pre_r.move(tokens);
    pre_i.move(tokens);
    dh.move(tokens);
  }
  /// The tile at t0, where the feed must be. Returns the state that enters the slice.
  __device__ __forceinline__ float2 fetch(Stage<T>& stage, TileOf<T>& dh_tile, const Inputs<T>& p,
                                          const Place& at, int t0, int length) const {
    v.fetch(stage.v, at, p.channels, t0, length, 0.0F);
    pre_r.fetch(stage.pre_r, at, p.channels, t0, length, kClosed);
    pre_i.fetch(stage.pre_i, at, p.channels, t0, length, 0.0F);
    dh.fetch(dh_tile, at, p.channels, t0, length, 0.0F);
    copy_async_commit();
    if (at.steps(t0, length) == 0) return {0.0F, 0.0F};
    return unpack(load_pair<kVector>(saved_state(p, chunk_states, at, t0), at.second));
  }
};

template <class T, bool kVector, int kRanks>
__global__ __launch_bounds__(kThreads,
                             kResident<T>) void rglru_scan_backward_kernel(Inputs<T> p,
                                                                           Gradients<T> d) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, kRanks>*>(memory);
  const Place at(p, kRanks);
  const int length = p.length(at.b);
  const float2 rate = rates(p, at);
  constexpr int kStride = kRanks * kTile;
  float carry = 0.0F;
  if (d.dstate_out != nullptr && at.first_channel + at.lane < p.channels)
    carry = d.dstate_out[at.at_sequence(p.channels)];
  float2 sum{0.0F, 0.0F};
  const int last = (p.seqlen - 1) / kStride * kStride;
  int t0 = last + at.rank * kTile;
  Feed<T, kVector> feed(p, d, at);
  const auto fetch = [&](int round, int t) {
    return feed.fetch(shared.stages[round % 2], shared.dh[round % 3], p, at, t, length);
  };
  feed.move(t0);
  float2 saved = fetch(0, t0);    // what enters the slice
  float2 next_saved{0.0F, 0.0F};  // in the next tile
  copy_async_wait<0>();
  open_slots(shared.slots);
  __syncthreads();
  if (last > 0) {
    feed.move(-kStride);
    next_saved = fetch(1, t0 - kStride);
  }
  int n = 0;
  for (int first = last; first >= 0; first -= kStride, t0 -= kStride, ++n) {
    Token x[kSteps];
    Token y[kSteps];
    TileOf<T>& dh = shared.dh[n % 3];
    const Affine slice = open_slice(shared.stages[n % 2], dh, at, rate, saved, x, y);
    saved = next_saved;
    copy_async_wait<0>();  // the next tile; the barrier of the chain tells the block
    const auto refill = [&] {
      if (first < 2 * kStride) return;
      feed.move(-kStride);
      next_saved = fetch(n + 2, t0 - 2 * kStride);
    };
    const float2 right = chain<kRanks, true>(slice, carry, shared.slots, n, at, refill);
    const Columns<T> to{{d.dv, at, t0, true}, {d.dpre_r, at, t0, true}, {d.dpre_i, at, t0, true}};
    const int valid = at.steps(t0, length);
    if (valid == kSteps)
      store_slice<true, kVector>(dh, at, to, right, x, y, valid, kSteps, sum);
    else
      store_slice<false, kVector>(dh, at, to, right, x, y, valid, at.steps(t0, p.seqlen), sum);
  }
  if (d.dstate_in != nullptr && at.writes(p.channels))
    d.dstate_in[at.at_sequence(p.channels)] = carry;
  const std::int64_t row = static_cast<std::int64_t>(at.b) * kRanks + at.rank;
  store_partial(p, sum, at, d.partial + row * p.channels);
}

template <class T, bool kVector>
void backward(Context& ctx, const Inputs<T>& p, Gradients<T> d, float* da_log) {
  visit_ranks(p, ranks_for(blocks_of(p), kResident<T>), rglru_scan_backward_kernel<T, kVector, 2>,
              [&]<int kRanks>() {
                Tensor partial = ctx.empty(Shape{p.batch, kRanks, p.channels}, DType::float32);
                d.partial = partial.view().data<float>();
                launch<kRanks>(ctx, rglru_scan_backward_kernel<T, kVector, kRanks>,
                               sizeof(Shared<T, kRanks>), p, d);
                fold_partials(ctx.stream().handle, d.partial, static_cast<int>(p.batch * kRanks),
                              p.channels, da_log);
              });
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
                         nullptr};
    const bool vectors = allows_pieces(p.v, p.channels) && allows_pieces(p.pre_r, p.channels) &&
                         allows_pieces(p.pre_i, p.channels) && allows_pieces(d.dh, p.channels) &&
                         allows_pieces(d.dv, p.channels) && allows_pieces(d.dpre_r, p.channels) &&
                         allows_pieces(d.dpre_i, p.channels) &&
                         allows_pairs(d.chunk_states, p.channels);
    if (vectors)
      backward<T, true>(ctx, p, d, a.da_log.data<float>());
    else
      backward<T, false>(ctx, p, d, a.da_log.data<float>());
  });
}

}  // namespace lrnn::cuda
