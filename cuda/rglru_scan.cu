// Forward and step of rglru_scan. Ownership and clusters: common/first_order.cuh.
//
// A thread turns its slice of a tile into multipliers and drives, scans it from a zero state,
// learns what enters it and adds that, multiplied by the running products. The next tiles travel
// meanwhile. Bound by issue slots, 50 instructions per element, 5 of them special functions, and by
// HBM, 3 elements in and 1 out. bfloat16, E2560: B8 L2048 issues in 76 % of the cycles and reaches
// 70 % of the rate of a copy, B1 L65536 63 %: its 320 blocks load 132 multiprocessors unevenly.
#include <cmath>

#include "common/launch.cuh"
#include "common/rglru_scan.cuh"

namespace lrnn::cuda {
namespace {

using namespace rglru;  // NOLINT(google-build-using-namespace)

template <class T>
struct Outputs {
  DeviceRows<T> h;
  float* state_out;       // [B, E] or null
  float* chunk_states;    // [B, chunks, E] or null
  const float* state_in;  // [B, E] or null: 0
};

template <class T>
struct Stage {
  TileOf<T> v, pre_r, pre_i;
};
template <class T, int kRanks>
struct Shared {
  Stage<T> stages[2];
  ChainSlots<kRanks> slots[2];
};

/// The maps from the state that enters a slice to those after each of its tokens.
template <class T>
__device__ __forceinline__ void scan_slice(Stage<T>& stage, const Place& at, float2 rate,
                                           Affine (&up_to)[kSteps]) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const float2 v = unpack(stage.v.pair(at, j));
    const float2 pre_r = unpack(stage.pre_r.pair(at, j));
    const float2 pre_i = unpack(stage.pre_i.pair(at, j));
    Affine one;
    token<T>(rate.x, v.x, pre_r.x, pre_i.x, one.a.x, one.b.x);
    token<T>(rate.y, v.y, pre_r.y, pre_i.y, one.a.y, one.b.y);
    up_to[j] = j == 0 ? one : one.after(up_to[j - 1]);
  }
}

/// The first `valid` states of a slice, then zeros up to `stored`.
template <bool kVector, class T>
__device__ __forceinline__ void store_slice(Column<T> h, const Place& at,
                                            const Affine (&up_to)[kSteps], float2 enters, int valid,
                                            int stored) {
  if (valid == kSteps) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) store_pair<kVector>(h.next(), up_to[j](enters), at.second);
    return;
  }
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    T* const to = h.next();
    const float2 state = j < valid ? up_to[j](enters) : float2{0.0F, 0.0F};
    if (j < stored) store_pair<kVector>(to, state, at.second);
  }
}

/// Blocks on a multiprocessor that registers and shared memory allow.
template <class T>
constexpr int kResident = sizeof(T) == 2 ? 6 : 4;

/// Brings the operands of tiles, from the first to the last.
template <class T, bool kVector>
struct Feed {
  Stream<T, kVector> v, pre_r, pre_i;

  __device__ __forceinline__ Feed(const Inputs<T>& p, const Place& at)
      : v(p.v, at), pre_r(p.pre_r, at), pre_i(p.pre_i, at) {}
  __device__ __forceinline__ void move(int tokens) {
    v.move(tokens);
    pre_r.move(tokens);
    pre_i.move(tokens);
  }
  /// The tile at t0, where the feed must be.
  __device__ __forceinline__ void fetch(Stage<T>& stage, const Inputs<T>& p, const Place& at,
                                        int t0, int length) const {
    v.fetch(stage.v, at, p.channels, t0, length, 0.0F);
    pre_r.fetch(stage.pre_r, at, p.channels, t0, length, kClosed);
    pre_i.fetch(stage.pre_i, at, p.channels, t0, length, 0.0F);
    copy_async_commit();
  }
};

template <class T, bool kVector, int kRanks>
__global__ __launch_bounds__(kThreads,
                             kResident<T>) void rglru_scan_forward_kernel(Inputs<T> p,
                                                                          Outputs<T> out) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, kRanks>*>(memory);
  const Place at(p, kRanks);
  const int length = p.length(at.b);
  const float2 rate = rates(p, at);
  constexpr int kStride = kRanks * kTile;
  float carry = 0.0F;
  if (out.state_in != nullptr && at.first_channel + at.lane < p.channels)
    carry = out.state_in[at.at_sequence(p.channels)];
  int t0 = at.rank * kTile;
  Feed<T, kVector> feed(p, at);
  feed.move(t0);
  feed.fetch(shared.stages[0], p, at, t0, length);
  copy_async_wait<0>();
  open_slots(shared.slots);
  __syncthreads();
  if (kStride < p.seqlen) {
    feed.move(kStride);
    feed.fetch(shared.stages[1], p, at, t0 + kStride, length);
  }
  int n = 0;
  for (int first = 0; first < p.seqlen; first += kStride, t0 += kStride, ++n) {
    Affine up_to[kSteps];
    Stage<T>& stage = shared.stages[n % 2];
    scan_slice(stage, at, rate, up_to);
    copy_async_wait<0>();  // the next tile; the barrier of the chain tells the block
    const auto refill = [&] {
      if (first + 2 * kStride >= p.seqlen) return;
      feed.move(kStride);
      feed.fetch(stage, p, at, t0 + 2 * kStride, length);
    };
    const float2 enters =
        chain<kRanks, false>(up_to[kSteps - 1], carry, shared.slots, n, at, refill);
    const int stored = at.steps(t0, p.seqlen);
    if (out.chunk_states != nullptr && stored > 0)
      store_pair<kVector>(saved_state(p, out.chunk_states, at, t0), enters, at.second);
    store_slice<kVector>(Column<T>(out.h, at, t0), at, up_to, enters, at.steps(t0, length), stored);
  }
  if (out.state_out != nullptr && at.writes(p.channels))
    out.state_out[at.at_sequence(p.channels)] = carry;
}

template <class T, bool kVector>
void forward(Context& ctx, const Inputs<T>& p, const Outputs<T>& out) {
  const int ranks = ranks_for(blocks_of(p), kResident<T>);
  visit_ranks(p, ranks, rglru_scan_forward_kernel<T, kVector, 2>, [&]<int kRanks>() {
    launch<kRanks>(ctx, rglru_scan_forward_kernel<T, kVector, kRanks>, sizeof(Shared<T, kRanks>), p,
                   out);
  });
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
  const float before = out.state_in != nullptr ? out.state_in[i] : 0.0F;
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
                         a.in.state_in ? a.in.state_in.data<float>() : nullptr};
    if (p.seqlen == 1) {
      const std::int64_t count = p.batch * p.channels;
      launch_overlapped(rglru_scan_token_kernel<T>,
                        static_cast<unsigned>((count + kTokenThreads - 1) / kTokenThreads),
                        kTokenThreads, 0, ctx.stream().handle, p, out);
      return;
    }
    const bool vectors = allows_pieces(p.v, p.channels) && allows_pieces(p.pre_r, p.channels) &&
                         allows_pieces(p.pre_i, p.channels) && allows_pieces(out.h, p.channels) &&
                         allows_pairs(out.chunk_states, p.channels);
    if (vectors)
      forward<T, true>(ctx, p, out);
    else
      forward<T, false>(ctx, p, out);
  });
}

}  // namespace lrnn::cuda
