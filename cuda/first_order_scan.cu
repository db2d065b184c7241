// Passes of first_order_scan. Ownership and clusters: common/first_order.cuh.
//
// Forward: a thread scans its slice of a tile from a zero state, learns what enters it and adds
// that, multiplied by the running products. Backward, from the last tile to the first: the adjoint
//   g_t = dh_t + a_{t+1} g_{t+1}
// is chained through the slices from the right; h_{t-1} is what forward stored. The next tiles
// travel meanwhile. Bound by HBM, 2 operands in and 1 out, 3 in and 2 out, of whose rate in a copy
// B8 L2048 D1536 on an H200 reaches forward and backward: float32 84 % and 88 %, bfloat16 64 % and
// 77 %, logarithms beside bfloat16 77 % and 85 %; these at B1 L65536 80 % and 82 %.
#include "lrnn/ops/first_order_scan.hpp"

#include "common/first_order.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda {
namespace {

using namespace first_order;  // NOLINT(google-build-using-namespace)

/// Type and meaning of the operand that decides what is kept.
template <class T, bool kLogarithm>
struct Gate {
  using Storage = T;
  static constexpr bool kLog = kLogarithm;
  static constexpr float kOpen = kLog ? 0.0F : 1.0F;  // keeps the state as it is

  static __device__ __forceinline__ float2 multiplier(float2 v) {
    if constexpr (kLog) return {expf(v.x), expf(v.y)};
    return v;
  }
};

template <class G>
struct Problem {
  DeviceRows<const typename G::Storage> gate;
  const std::int32_t* lengths;
  const float* state_in;  // [B, D] or null: 0
  int channels;
  int seqlen;
  std::int64_t batch;

  __device__ int length(std::int64_t b) const {
    return lengths != nullptr ? min(lengths[b], seqlen) : seqlen;
  }
};

template <class G>
Problem<G> make_problem(const FirstOrderScanInputs& in) {
  const TensorView gate = G::kLog ? in.log_a : in.a;
  return {{gate.data<typename G::Storage>(), detail::row_stride(gate)},
          in.lengths ? in.lengths.data<std::int32_t>() : nullptr,
          in.state_in ? in.state_in.data<float>() : nullptr,
          static_cast<int>(in.b.dim(2)),
          static_cast<int>(in.b.dim(1)),
          in.b.dim(0)};
}

/// What chain() carries of a state [B, D], for the channel `lane` of the block.
template <class G>
__device__ __forceinline__ float entering(const Problem<G>& p, const float* state,
                                          const Place& at) {
  if (state == nullptr || at.first_channel + at.lane >= p.channels) return 0.0F;
  return state[at.at_sequence(p.channels)];
}

// ---- forward ----

template <class T>
struct Outputs {
  DeviceRows<const T> b;
  DeviceRows<T> h;
  float* state_out;  // [B, D] or null
};

template <class G, class T, int kRanks>
struct ForwardShared {
  TileOf<typename G::Storage> gate[2];
  TileOf<T> b[2];
  ChainSlots<kRanks> slots[2];
};

constexpr int kForwardBlocks = 6;  // of a multiprocessor

/// The first `valid` states of a slice, then zeros up to `stored`.
template <bool kVector, class T>
__device__ __forceinline__ void store_states(Column<T> h, const Place& at,
                                             const Affine (&up_to)[kSteps], float2 enters,
                                             int valid, int stored) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    T* const to = h.next();
    const float2 state = j < valid ? up_to[j](enters) : float2{0.0F, 0.0F};
    if (j < stored) store_pair<kVector>(to, state, at.second);
  }
}

template <class G, class T, bool kVector, int kRanks>
__global__ __launch_bounds__(kThreads,
                             kForwardBlocks) void first_order_scan_forward_kernel(Problem<G> p,
                                                                                  Outputs<T> out) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<G, T, kRanks>*>(memory);
  const Place at(p, kRanks);
  const int length = p.length(at.b);
  constexpr int kStride = kRanks * kTile;
  float carry = entering(p, p.state_in, at);
  Stream<typename G::Storage, kVector> gate(p.gate, at);
  Stream<T, kVector> drive(out.b, at);
  int t0 = at.rank * kTile;
  const auto fetch = [&](int stage, int tokens, int t) {
    gate.move(tokens);
    drive.move(tokens);
    gate.fetch(shared.gate[stage], at, p.channels, t, length, G::kOpen);
    drive.fetch(shared.b[stage], at, p.channels, t, length, 0.0F);
    copy_async_commit();
  };
  fetch(0, t0, t0);
  copy_async_wait<0>();
  open_slots(shared.slots);
  __syncthreads();
  if (kStride < p.seqlen) fetch(1, kStride, t0 + kStride);
  int n = 0;
  for (int first = 0; first < p.seqlen; first += kStride, t0 += kStride, ++n) {
    Affine up_to[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const Affine one{G::multiplier(unpack(shared.gate[n % 2].pair(at, j))),
                       unpack(shared.b[n % 2].pair(at, j))};
      up_to[j] = j == 0 ? one : one.after(up_to[j - 1]);
    }
    copy_async_wait<0>();  // the next tile; the barrier of the chain tells the block
    const auto refill = [&] {
      if (first + 2 * kStride < p.seqlen) fetch(n % 2, kStride, t0 + 2 * kStride);
    };
    const float2 enters =
        chain<kRanks, false>(up_to[kSteps - 1], carry, shared.slots, n, at, refill);
    store_states<kVector>(Column<T>(out.h, at, t0), at, up_to, enters, at.steps(t0, length),
                          at.steps(t0, p.seqlen));
  }
  if (out.state_out != nullptr && at.writes(p.channels))
    out.state_out[at.at_sequence(p.channels)] = carry;
}

// ---- backward ----

template <class G, class T>
struct Gradients {
  DeviceRows<const T> h, dh;
  const float* dstate_out;  // [B, D] or null: 0
  DeviceRows<typename G::Storage> dgate;
  DeviceRows<T> db;
  float* dstate_in;  // [B, D] or null
};

template <class G, class T, int kRanks>
struct BackwardShared {
  TileOf<typename G::Storage> gate[2];
  TileOf<T> h[2];
  TileOf<T> dh[3];  // one more, because it is read to the end of the round
  ChainSlots<kRanks> slots[2];
};

constexpr int kBackwardBlocks = 4;

/// What a slice keeps until its adjoint is known.
struct Kept {
  float2 a[kSteps];
  float2 before[kSteps];  // the states
};

/// Multipliers and states of a slice whose tile `saved` enters, and its adjoint from the right:
/// x -> a_0 (dh_0 + a_1 (dh_1 + ... x)).
template <class G, class T>
__device__ __forceinline__ Affine open_slice(TileOf<typename G::Storage>& gate, TileOf<T>& h,
                                             TileOf<T>& dh, const Place& at, float2 saved,
                                             Kept& kept) {
  Affine slice;
  kept.before[0] = saved;
  if (at.offset > 0) {
    const T* const last = h.row(at.offset - 1) + 2 * (at.lane % kLanes);
    kept.before[0] = unpack(*reinterpret_cast<const Pair<T>*>(last));
  }
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    if (j > 0) kept.before[j] = unpack(h.pair(at, j - 1));
    const float2 a = G::multiplier(unpack(gate.pair(at, j)));
    const float2 d = unpack(dh.pair(at, j));
    kept.a[j] = a;
    slice.a = {slice.a.x * a.x, slice.a.y * a.y};
    slice.b = {fmaf(slice.a.x, d.x, slice.b.x), fmaf(slice.a.y, d.y, slice.b.y)};
  }
  return slice;
}

/// Stores the gradients of a slice that `right` enters from the right. Those of tokens from `valid`
/// on are 0; those from `stored` on do not exist.
template <class G, bool kVector, class T>
__device__ __forceinline__ void store_gradients(TileOf<T>& dh, const Place& at,
                                                Column<typename G::Storage> dgate, Column<T> db,
                                                float2 right, const Kept& kept, int valid,
                                                int stored) {
#pragma unroll
  for (int j = kSteps - 1; j >= 0; --j) {
    const float2 d = unpack(dh.pair(at, j));
    float2 g{d.x + right.x, d.y + right.y};
    right = {kept.a[j].x * g.x, kept.a[j].y * g.y};
    float2 of_gate = G::kLog ? right : g;
    of_gate = {of_gate.x * kept.before[j].x, of_gate.y * kept.before[j].y};
    if (j >= valid) g = of_gate = {0.0F, 0.0F};
    auto* const to_gate = dgate.next();
    T* const to_b = db.next();
    if (j >= stored) continue;
    store_pair<kVector>(to_gate, of_gate, at.second);
    store_pair<kVector>(to_b, g, at.second);
  }
}

template <class G, class T, bool kVector, int kRanks>
__global__ __launch_bounds__(
    kThreads, kBackwardBlocks) void first_order_scan_backward_kernel(Problem<G> p,
                                                                     Gradients<G, T> d) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<G, T, kRanks>*>(memory);
  const Place at(p, kRanks);
  const int length = p.length(at.b);
  constexpr int kStride = kRanks * kTile;
  float carry = entering(p, d.dstate_out, at);
  const int last = (p.seqlen - 1) / kStride * kStride;
  int t0 = last + at.rank * kTile;
  Stream<typename G::Storage, kVector> gate(p.gate, at);
  Stream<T, kVector> h(d.h, at);
  Stream<T, kVector> dh(d.dh, at);
  // Fetches the tile at t, `tokens` away. Returns the state that enters it, for its first slice.
  const auto fetch = [&](int round, int tokens, int t) -> float2 {
    gate.move(tokens);
    h.move(tokens);
    dh.move(tokens);
    gate.fetch(shared.gate[round % 2], at, p.channels, t, length, G::kOpen);
    h.fetch(shared.h[round % 2], at, p.channels, t, length, 0.0F);
    dh.fetch(shared.dh[round % 3], at, p.channels, t, length, 0.0F);
    copy_async_commit();
    if (at.offset > 0 || !at.exists || t >= length) return {0.0F, 0.0F};
    if (t > 0) {
      const T* const row = d.h.data + (at.first_row + t - 1) * d.h.stride + at.channel;
      return unpack(load_pair<kVector>(row, at.second));
    }
    if (p.state_in == nullptr) return {0.0F, 0.0F};
    const float* const row = p.state_in + static_cast<std::int64_t>(at.b) * p.channels + at.channel;
    return {row[0], at.second ? row[1] : 0.0F};
  };
  float2 saved = fetch(0, t0, t0);
  float2 next_saved{0.0F, 0.0F};
  copy_async_wait<0>();
  open_slots(shared.slots);
  __syncthreads();
  if (last > 0) next_saved = fetch(1, -kStride, t0 - kStride);
  int n = 0;
  for (int first = last; first >= 0; first -= kStride, t0 -= kStride, ++n) {
    Kept kept;
    TileOf<T>& dh_tile = shared.dh[n % 3];
    const Affine slice =
        open_slice<G>(shared.gate[n % 2], shared.h[n % 2], dh_tile, at, saved, kept);
    saved = next_saved;
    copy_async_wait<0>();  // the next tile; the barrier of the chain tells the block
    const auto refill = [&] {
      if (first >= 2 * kStride) next_saved = fetch(n + 2, -kStride, t0 - 2 * kStride);
    };
    const float2 right = chain<kRanks, true>(slice, carry, shared.slots, n, at, refill);
    store_gradients<G, kVector>(dh_tile, at, {d.dgate, at, t0, true}, {d.db, at, t0, true}, right,
                                kept, at.steps(t0, length), at.steps(t0, p.seqlen));
  }
  if (d.dstate_in != nullptr && at.writes(p.channels))
    d.dstate_in[at.at_sequence(p.channels)] = carry;
}

// ---- launch ----

template <class G, class T, bool kVector>
void forward(Context& ctx, const Problem<G>& p, const Outputs<T>& out) {
  const int ranks = ranks_for(blocks_of(p), kForwardBlocks);
  visit_ranks(p, ranks, first_order_scan_forward_kernel<G, T, kVector, 2>, [&]<int kRanks>() {
    launch<kRanks>(ctx, first_order_scan_forward_kernel<G, T, kVector, kRanks>,
                   sizeof(ForwardShared<G, T, kRanks>), p, out);
  });
}

template <class G, class T, bool kVector>
void backward(Context& ctx, const Problem<G>& p, const Gradients<G, T>& d) {
  const int ranks = ranks_for(blocks_of(p), kBackwardBlocks);
  visit_ranks(p, ranks, first_order_scan_backward_kernel<G, T, kVector, 2>, [&]<int kRanks>() {
    launch<kRanks>(ctx, first_order_scan_backward_kernel<G, T, kVector, kRanks>,
                   sizeof(BackwardShared<G, T, kRanks>), p, d);
  });
}

/// Calls f.operator()<Gate, T>().
template <class F>
void visit_gate(const char* op, const FirstOrderScanInputs& in, F&& f) {
  visit_float(op, in.b.dtype(), [&]<class T>() {
    if (in.a)
      f.template operator()<Gate<T, false>, T>();
    else
      f.template operator()<Gate<float, true>, T>();
  });
}

}  // namespace

void first_order_scan_forward(Context& ctx, const FirstOrderScanForward& a) {
  visit_gate("first_order_scan_forward", a.in, [&]<class G, class T>() {
    const auto p = make_problem<G>(a.in);
    const Outputs<T> out{{a.in.b.data<T>(), detail::row_stride(a.in.b)},
                         {a.h.data<T>(), detail::row_stride(a.h)},
                         a.state_out ? a.state_out.data<float>() : nullptr};
    if (allows_pieces(p.gate, p.channels) && allows_pieces(out.b, p.channels) &&
        allows_pieces(out.h, p.channels))
      forward<G, T, true>(ctx, p, out);
    else
      forward<G, T, false>(ctx, p, out);
  });
}

void first_order_scan_backward(Context& ctx, const FirstOrderScanBackward& a) {
  visit_gate("first_order_scan_backward", a.in, [&]<class G, class T>() {
    const auto p = make_problem<G>(a.in);
    const MutableTensorView dgate = G::kLog ? a.dlog_a : a.da;
    const Gradients<G, T> d{
        {a.h.data<T>(), detail::row_stride(a.h)},
        {a.dh.data<T>(), detail::row_stride(a.dh)},
        a.dstate_out ? a.dstate_out.data<float>() : nullptr,
        {dgate.data<typename G::Storage>(), detail::row_stride(dgate)},
        {a.db.data<T>(), detail::row_stride(a.db)},
        a.dstate_in ? a.dstate_in.data<float>() : nullptr};
    if (allows_pieces(p.gate, p.channels) && allows_pieces(d.h, p.channels) &&
        allows_pieces(d.dh, p.channels) && allows_pieces(d.dgate, p.channels) &&
        allows_pieces(d.db, p.channels))
      backward<G, T, true>(ctx, p, d);
    else
      backward<G, T, false>(ctx, p, d);
  });
}

}  // namespace lrnn::cuda
