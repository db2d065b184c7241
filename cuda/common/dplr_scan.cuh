/// What the kernels of dplr_scan share.
///
/// Time is cut into segments, whole numbers of chunks, so that few heads and sequences still fill
/// the device. With one segment there is only step 3.
///   1. Ends: every segment alone from state 0 (the first from state_in), keeping its last state.
///      Backward: every segment alone from adjoint 0 (the last valid one from dstate_out).
///   2. Carries: chain of the segments with the power M^Q of the transition, Q tokens a segment.
///   3. The whole work, from the true state or adjoint.
/// Sizes decide the number of segments, never the device: results have the same bits everywhere.
///
/// Many tokens of few states and one rank are taken by whole chunks, as products of matrices:
/// common/dplr_scan_chunk.cuh. What is left of every sequence then follows token by token.
///
/// kLanes neighbouring threads own one head of one segment; lane l holds states l, l + kLanes, ...
/// in registers. Groups of one warp may differ in length: a warp walks to the end of its longest
/// group, and every shuffle is executed by all 32 threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/capability.cuh"
#include "common/check.cuh"
#include "common/dtype.cuh"
#include "ops/dplr_scan.hpp"

namespace lrnn::cuda::dplr {

constexpr int kChunk = static_cast<int>(kDplrScanChunk);
constexpr int kBlock = 8;  // tokens that a group loads and stores at once, one per lane
constexpr unsigned kAll = 0xFFFFFFFFU;

constexpr int kMaxStates = 128;      // of the kernels with states in registers
constexpr int kMaxSplitStates = 32;  // more: the matrices M^Q would not fit into shared memory
constexpr int kColumns = 8;          // sequences or segments of a product
constexpr std::int64_t kManyTokens = 512;  // fewer are not worth the maps of a chunk
constexpr std::int64_t kFewBlocks = 256;
constexpr std::int64_t kFewChunks = 48;      // one walk is shorter than what connects segments
constexpr std::int64_t kFewThreads = 16384;  // below, one segment leaves most of a device idle
constexpr std::int64_t kManyThreads = 65536;
constexpr std::int64_t kMinSegmentChunks = 8;
constexpr std::int64_t kTokensPerHead = 16;  // fewer: the powers of step 2 cost more than they save

inline int lanes_for(std::int64_t states) {
  return states <= 32 ? 8 : states <= 64 ? 16 : 32;
}

struct Sizes {
  std::int64_t batch;
  std::int64_t seqlen;
  std::int64_t heads;
  std::int64_t states;
  std::int64_t rank;
  std::int64_t channels;
  std::int64_t chunks;
  std::int64_t plane;
  std::int64_t fields;
  std::int64_t segments = 1;
  std::int64_t segment_chunks;  // a power of 2 if there are several segments
  bool by_chunks = false;       // whole chunks on tensor cores

  Sizes(const lrnn::detail::DplrScanSizes& s, bool chunks_possible)
      : batch(s.batch),
        seqlen(s.seqlen),
        heads(s.heads),
        states(s.states),
        rank(s.rank),
        channels(s.channels),
        chunks(s.chunks),
        plane(s.plane()),
        fields(s.fields()),
        segment_chunks(s.chunks) {
    LRNN_CHECK(std::max(seqlen, batch) < std::numeric_limits<int>::max() / 2, ShapeError,
               "dplr_scan: u: expected fewer than 2^30 tokens and sequences on CUDA, got ", batch,
               " x ", seqlen);
    if (!in_registers() || states > kMaxSplitStates) return;
    by_chunks =
        chunks_possible && seqlen >= 2 * kChunk && batch * seqlen >= kManyTokens && has_mma();
    if (by_chunks) {
      cut_for_chunks();
      return;
    }
    const std::int64_t threads = batch * heads * lanes_for(states);
    if (threads >= kFewThreads || chunks < 2 * kMinSegmentChunks || seqlen < kTokensPerHead * heads)
      return;
    segment_chunks = kMinSegmentChunks;
    while (threads * ((chunks + segment_chunks - 1) / segment_chunks) > kManyThreads)
      segment_chunks *= 2;
    if (segment_chunks > chunks) segment_chunks = chunks;
    segments = (chunks + segment_chunks - 1) / segment_chunks;
  }

  // Walking a segment twice pays if few sequences would leave columns of products or most of a
  // device idle.
  void cut_for_chunks() {
    if (chunks < kFewChunks) return;
    std::int64_t wanted = 1;
    while (batch * wanted < kColumns / 2 ||
           heads * ((batch * wanted + kColumns - 1) / kColumns) < kFewBlocks)
      wanted *= 2;
    while (wanted > 1 && batch * wanted % kColumns != 0) wanted *= 2;
    segment_chunks = kMinSegmentChunks;
    while (segment_chunks * wanted < chunks) segment_chunks *= 2;
    if (wanted == 1 || segment_chunks >= chunks) segment_chunks = chunks;
    segments = (chunks + segment_chunks - 1) / segment_chunks;
  }

  [[nodiscard]] bool in_registers() const {
    return rank == 1 && channels == 1 && states <= kMaxStates;
  }
  [[nodiscard]] __host__ __device__ std::int64_t rows() const { return batch * segments; }
};

template <class T, class View>
T* data_or_null(const View& t) {
  return t ? const_cast<T*>(t.template data<std::remove_const_t<T>>()) : nullptr;
}

/// The operands that tokens share; rank and channels are 1 in the kernels with registers.
struct Parameters {
  const float* e;
  const float* w;
  const float* k;
  const float* b;
  const float* C;
  const float* D;
  const float* e_low = nullptr;  // used where several tokens are taken at once
};
template <class Args>
Parameters parameters_of(const Args& a) {
  return {a.e.template data<float>(), a.w.template data<float>(), a.k.template data<float>(),
          a.b.template data<float>(), a.C.template data<float>(), data_or_null<const float>(a.D)};
}

__device__ __forceinline__ int warp_max(int v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = max(v, __shfl_xor_sync(kAll, v, offset));
  return v;
}

/// Segments of a sequence that a launch works on: step 1 leaves out the one that nothing follows.
struct SegmentRange {
  std::int64_t first;
  std::int64_t count;
};

/// What one group works on.
template <int kLanes>
struct Place {
  bool exists;
  bool first;       // segment of the sequence
  bool holds_last;  // valid token
  int lane;         // of the group
  int sub;          // token of a block that this thread loads and stores
  int row;          // batch * segments + segment
  int batch;
  int head;
  int begin;     // first token
  int size_end;  // end of the segment
  int end;       // end of its valid tokens; at most begin if there are none
  int longest;   // tokens of the longest group of the warp

  __device__ Place(const Sizes& s, const std::int32_t* lengths, const SegmentRange& range) {
    const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    std::int64_t index = thread / kLanes;
    exists = index < s.batch * range.count * s.heads;
    if (!exists) index = 0;
    lane = static_cast<int>(threadIdx.x) % kLanes;
    sub = static_cast<int>(threadIdx.x) % kBlock;
    head = static_cast<int>(index % s.heads);
    batch = static_cast<int>(index / s.heads / range.count);
    const std::int64_t segment = range.first + index / s.heads % range.count;
    row = static_cast<int>(batch * s.segments + segment);
    const std::int64_t tokens = s.segment_chunks * kChunk;
    begin = static_cast<int>(segment * tokens);
    size_end = static_cast<int>(min(segment * tokens + tokens, s.seqlen));
    const int length = lengths == nullptr ? static_cast<int>(s.seqlen) : lengths[batch];
    end = min(size_end, length);
    first = segment == 0;
    holds_last = begin < length && length <= size_end;
    longest = warp_max(size_end - begin);
  }
  /// Leaves the tokens after the last whole chunk that is valid, of a sequence of one segment.
  __device__ void skip_whole_chunks() {
    begin = end / kChunk * kChunk;
    longest = warp_max(size_end - begin);
  }
  /// Of row 0 of [B, L, H].
  __device__ __forceinline__ std::int64_t column(const Sizes& s) const {
    return batch * s.seqlen * s.heads + head;
  }
  /// Valid tokens from token t on, at most `most`.
  __device__ __forceinline__ int left(int t, int most) const { return max(0, min(end - t, most)); }
};

/// States of one lane.
template <int kPer>
struct Pairs {
  float2 v[kPer];
};

/// Of planes [2, H, N] that may be absent.
template <int kLanes, int kPer>
__device__ __forceinline__ Pairs<kPer> load_planes(const float* planes, const Sizes& s,
                                                   const Place<kLanes>& p) {
  Pairs<kPer> out;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int n = i * kLanes + p.lane;
    out.v[i] = {0.0F, 0.0F};
    if (planes == nullptr || n >= s.states) continue;
    const float* const at = planes + p.head * s.states + n;
    out.v[i] = {at[0], at[s.plane]};
  }
  return out;
}
template <int kLanes, int kPer>
__device__ __forceinline__ void store_planes(float* planes, const Sizes& s, const Place<kLanes>& p,
                                             const Pairs<kPer>& pairs) {
  if (!p.exists) return;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int n = i * kLanes + p.lane;
    if (n >= s.states) continue;
    float* const at = planes + p.head * s.states + n;
    at[0] = pairs.v[i].x;
    at[s.plane] = pairs.v[i].y;
  }
}
/// Of pairs [H, N, 2].
template <int kLanes, int kPer>
__device__ __forceinline__ Pairs<kPer> load_interleaved(const float* values, const Sizes& s,
                                                        const Place<kLanes>& p) {
  Pairs<kPer> out;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int n = i * kLanes + p.lane;
    out.v[i] = {0.0F, 0.0F};
    if (n >= s.states) continue;
    const float* const at = values + 2 * (p.head * s.states + n);
    out.v[i] = {at[0], at[1]};
  }
  return out;
}

template <int kPer>
__device__ __forceinline__ Pairs<kPer> conjugate(Pairs<kPer> v) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) v.v[i].y = -v.v[i].y;
  return v;
}

/// The sum over a group, the same bits in all its lanes.
template <int kLanes>
__device__ __forceinline__ float group_sum(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return v;
}

/// The sum over a group of value[sub], in the lanes with this sub. Seven shuffles for eight sums.
template <int kLanes>
__device__ __forceinline__ float transposed_sum(const float (&value)[kBlock], int sub) {
  float four[4];
  float two[2];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float keep = (sub & 4) != 0 ? value[j + 4] : value[j];
    const float give = (sub & 4) != 0 ? value[j] : value[j + 4];
    four[j] = keep + __shfl_xor_sync(kAll, give, 4);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float keep = (sub & 2) != 0 ? four[j + 2] : four[j];
    const float give = (sub & 2) != 0 ? four[j] : four[j + 2];
    two[j] = keep + __shfl_xor_sync(kAll, give, 2);
  }
  const float keep = (sub & 1) != 0 ? two[1] : two[0];
  const float give = (sub & 1) != 0 ? two[0] : two[1];
  float sum = keep + __shfl_xor_sync(kAll, give, 1);
#pragma unroll
  for (int offset = 8; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  return sum;
}

/// The sum over a group of value[lane % 4]. Four shuffles for four sums and eight lanes.
template <int kLanes>
__device__ __forceinline__ float transposed_sum_of_four(const float (&value)[4], int lane) {
  float two[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float keep = (lane & 2) != 0 ? value[j + 2] : value[j];
    const float give = (lane & 2) != 0 ? value[j] : value[j + 2];
    two[j] = keep + __shfl_xor_sync(kAll, give, 2);
  }
  const float keep = (lane & 1) != 0 ? two[1] : two[0];
  const float give = (lane & 1) != 0 ? two[0] : two[1];
  float sum = keep + __shfl_xor_sync(kAll, give, 1);
#pragma unroll
  for (int offset = 4; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  return sum;
}

/// Value of the token j of a block: the lanes of a group hold one token each.
template <int kLanes>
__device__ __forceinline__ float token_value(float own, int j) {
  return __shfl_sync(kAll, own, j, kLanes);
}

/// Parts of 2 Re sum conj(p) q of one lane, without the factor 2.
template <int kPer>
__device__ __forceinline__ float partial_product(const Pairs<kPer>& p, const Pairs<kPer>& q) {
  float re = p.v[0].x * q.v[0].x;
  float im = p.v[0].y * q.v[0].y;
#pragma unroll
  for (int i = 1; i < kPer; ++i) {
    re = fmaf(p.v[i].x, q.v[i].x, re);
    im = fmaf(p.v[i].y, q.v[i].y, im);
  }
  return re + im;
}

/// What moves the states of a group on.
template <int kPer>
struct Transition {
  Pairs<kPer> e;
  Pairs<kPer> w;
  Pairs<kPer> k;
};
template <int kLanes, int kPer>
__device__ __forceinline__ Transition<kPer> load_transition(const Parameters& a, const Sizes& s,
                                                            const Place<kLanes>& p) {
  return {load_planes<kLanes, kPer>(a.e, s, p), load_planes<kLanes, kPer>(a.w, s, p),
          load_planes<kLanes, kPer>(a.k, s, p)};
}

/// x_t from x_{t-1}, given product = <k, x_{t-1}>. The state is added last: one rounding of its
/// size.
template <int kPer>
__device__ __forceinline__ void advance_by(const Transition<kPer>& m, const Pairs<kPer>& b, float u,
                                           float product, bool valid, Pairs<kPer>& x) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const float2 x0 = x.v[i];
    float re = fmaf(-m.w.v[i].x, product, b.v[i].x * u);
    float im = fmaf(-m.w.v[i].y, product, b.v[i].y * u);
    re = fmaf(m.e.v[i].x, x0.x, fmaf(-m.e.v[i].y, x0.y, re));
    im = fmaf(m.e.v[i].x, x0.y, fmaf(m.e.v[i].y, x0.x, im));
    if (valid) x.v[i] = {x0.x + re, x0.y + im};
  }
}
/// x_t from x_{t-1}; returns <k, x_{t-1}>.
template <int kLanes, int kPer>
__device__ __forceinline__ float advance(const Transition<kPer>& m, const Pairs<kPer>& b, float u,
                                         bool valid, Pairs<kPer>& x) {
  const float product = 2.0F * group_sum<kLanes>(partial_product(m.k, x));
  advance_by(m, b, u, product, valid, x);
  return product;
}

inline unsigned group_blocks(const Sizes& s, const SegmentRange& range, int lanes, int threads) {
  const std::int64_t total = s.batch * range.count * s.heads * lanes;
  return static_cast<unsigned>((total + threads - 1) / threads);
}

/// Operands of steps 1 and 2, forward or backward.
template <class T>
struct EndsArgs {
  Sizes sizes;
  Parameters parameters;
  const T* tokens;  // u or dy
  const std::int32_t* lengths;
  const float* start;     // [B, 2, H, N] state_in or dstate_out, or null
  float* ends = nullptr;  // [B, segments, 2, H, N]; filled in
};
/// Steps 1 and 2. Returns the carries, [B, segments, 2, H, N].
template <class T>
Tensor connect_segments(Context& ctx, EndsArgs<T> args, bool reverse);

/// Segments that step 1 walks: all but the one that nothing follows.
inline SegmentRange ends_range(const Sizes& s, bool reverse) {
  return {reverse ? 1 : 0, s.segments - 1};
}
/// Of whole chunks: the segment in which those of a sequence of `length` valid tokens end.
__device__ __forceinline__ int last_segment(const Sizes& s, std::int64_t length) {
  return static_cast<int>(min(length / kChunk / s.segment_chunks, s.segments - 1));
}

/// Step 2.
struct CarryArgs {
  Sizes sizes;
  bool reverse;
  const std::int32_t* lengths;
  const float* powers;  // of M, transposed in forward, so that a product reads columns
  const float* ends;    // [B, segments, 2, H, N]
  const float* start;   // [B, 2, H, N] or null
  float* carries;       // [B, segments, 2, H, N]
};
void launch_carry(Context& ctx, const CarryArgs& args);

/// All steps of the whole chunks, if sizes.by_chunks. `reverse`: the adjoints, from dy to du.
template <class T>
struct ChunkWalkArgs {
  Sizes sizes;
  Parameters parameters;
  const T* tokens;  // [B, chunks, H, Q]
  const std::int32_t* lengths;
  const float* start;  // [B, 2, H, N], where the walk along a sequence starts; null: 0
  T* outputs;          // [B, chunks, H, Q]
  float* states;       // [B, chunks, 2, H, N] before each chunk on the walk, or null
  float* finals;       // [B, 2, H, N] after all chunks, or null
};
template <class T>
void walk_chunks(Context& ctx, const ChunkWalkArgs<T>& args, bool reverse);

/// Tokens of whole chunks, [B, chunks, H, Q]: a head of [B, L, H] alone would fill an eighth of
/// every sector of memory.
template <class T>
Tensor empty_by_head(Context& ctx, const Sizes& s) {
  return ctx.empty({s.batch, s.chunks, s.heads, kChunk},
                   sizeof(T) == 4 ? DType::float32 : DType::bfloat16);
}
template <class T>
Tensor by_head(Context& ctx, const Sizes& s, const std::int32_t* lengths, const T* tokens);
/// Back.
template <class T>
void by_token(Context& ctx, const Sizes& s, const std::int32_t* lengths, const Tensor& by_head,
              T* tokens);

/// Sums over the tokens of all whole chunks.
template <class T>
struct ChunkSumArgs {
  Sizes sizes;
  Parameters parameters;
  const std::int32_t* lengths;
  const T* u;   // [B, chunks, H, Q]
  const T* dy;  // [B, chunks, H, Q]
  const float* chunk_states;
  const float* adjoints;
  std::int64_t rows;    // of the partial sums
  float* partial;       // [rows, 5, 2, H, N]: e, b, w, k, C
  float* partial_skip;  // [rows, H] or null
};
/// Whether the device has the shared memory that this takes.
bool can_sum_chunks(std::int64_t states);
/// Rows of partial sums that keep a device busy.
std::int64_t chunk_sum_rows(const Sizes& s);
template <class T>
void sum_chunks(Context& ctx, const ChunkSumArgs<T>& args);

/// Calls f with the lanes of a group and the states of a lane as constants.
template <class F>
void visit_width(std::int64_t states, F&& f) {
  using std::integral_constant;
  if (states <= 8) return f(integral_constant<int, 8>{}, integral_constant<int, 1>{});
  if (states <= 16) return f(integral_constant<int, 8>{}, integral_constant<int, 2>{});
  if (states <= 32) return f(integral_constant<int, 8>{}, integral_constant<int, 4>{});
  if (states <= 64) return f(integral_constant<int, 16>{}, integral_constant<int, 4>{});
  return f(integral_constant<int, 32>{}, integral_constant<int, 4>{});
}

// --- any number of states, ranks and read-outs -------------------------------------------------
//
// One warp owns one head of a sequence, from its first token to its last. States lie in global
// memory, lane l owns states l, l + 32, ...; the R inner products of a token are shared in shared
// memory. Bound by the latency of these accesses: a fall-back.

constexpr int kGeneralWarps = 4;
constexpr int kGeneralThreads = 32 * kGeneralWarps;

/// What one warp works on.
struct GeneralPlace {
  std::int64_t index;  // batch * heads + head
  std::int64_t batch;
  std::int64_t head;
  int lane;
  bool exists;

  explicit __device__ GeneralPlace(const Sizes& s)
      : index(static_cast<std::int64_t>(blockIdx.x) * kGeneralWarps + threadIdx.x / 32),
        batch(index / s.heads),
        head(index % s.heads),
        lane(static_cast<int>(threadIdx.x) % 32),
        exists(index < s.batch * s.heads) {}
};
inline unsigned general_blocks(const Sizes& s) {
  return static_cast<unsigned>((s.batch * s.heads + kGeneralWarps - 1) / kGeneralWarps);
}

/// State n of row r of planes [R, 2, H, N].
__device__ __forceinline__ float2 general_pair(const float* planes, const Sizes& s,
                                               const GeneralPlace& p, std::int64_t r,
                                               std::int64_t n) {
  const float* const at = planes + r * 2 * s.plane + p.head * s.states + n;
  return {at[0], at[s.plane]};
}
__device__ __forceinline__ float2 general_read_out(const Parameters& a, const Sizes& s,
                                                   const GeneralPlace& p, std::int64_t c,
                                                   std::int64_t n) {
  const float* const at = a.C + 2 * (c * s.plane + p.head * s.states + n);
  return {at[0], at[1]};
}
__device__ __forceinline__ float general_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return v;
}
/// products[r] = <rows_r, x>, visible to the warp.
__device__ __forceinline__ void general_products(const float* rows, const Sizes& s,
                                                 const GeneralPlace& p, const float2* x,
                                                 float* products) {
  __syncwarp();
  for (std::int64_t r = 0; r < s.rank; ++r) {
    float sum = 0.0F;
    for (std::int64_t n = p.lane; n < s.states; n += 32) {
      const float2 k = general_pair(rows, s, p, r, n);
      sum = fmaf(k.x, x[n].x, fmaf(k.y, x[n].y, sum));
    }
    sum = 2.0F * general_sum(sum);
    if (p.lane == 0) products[r] = sum;
  }
  __syncwarp();
}
/// x_t from x_{t-1}, which may be the same memory; products[r] = <k_r, x_{t-1}>.
__device__ __forceinline__ void general_advance(const Parameters& a, const Sizes& s,
                                                const GeneralPlace& p, float u,
                                                const float2* before, float2* x, float* products) {
  general_products(a.k, s, p, before, products);
  for (std::int64_t n = p.lane; n < s.states; n += 32) {
    const float2 x0 = before[n];
    const float2 e = general_pair(a.e, s, p, 0, n);
    const float2 b = general_pair(a.b, s, p, 0, n);
    float re = b.x * u;
    float im = b.y * u;
    for (std::int64_t r = 0; r < s.rank; ++r) {
      const float2 w = general_pair(a.w, s, p, r, n);
      re = fmaf(-w.x, products[r], re);
      im = fmaf(-w.y, products[r], im);
    }
    re = fmaf(e.x, x0.x, fmaf(-e.y, x0.y, re));
    im = fmaf(e.x, x0.y, fmaf(e.y, x0.x, im));
    x[n] = {x0.x + re, x0.y + im};
  }
}
__device__ __forceinline__ void general_load(const float* planes, const Sizes& s,
                                             const GeneralPlace& p, float2* x) {
  for (std::int64_t n = p.lane; n < s.states; n += 32)
    x[n] = planes == nullptr ? float2{0.0F, 0.0F} : general_pair(planes, s, p, 0, n);
}
__device__ __forceinline__ void general_store(float* planes, const Sizes& s, const GeneralPlace& p,
                                              const float2* x) {
  for (std::int64_t n = p.lane; n < s.states; n += 32) {
    float* const at = planes + p.head * s.states + n;
    at[0] = x[n].x;
    at[s.plane] = x[n].y;
  }
}

}  // namespace lrnn::cuda::dplr
