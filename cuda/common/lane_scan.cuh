/// What the forward and backward kernels of lane_scan share.
///
/// Time is cut into chunks of kChunk tokens, whose entering states are kept for backward, and into
/// segments of whole chunks, which run in parallel:
///   1. every segment from a zero state, to its end;   (not if there is one segment)
///   2. the carries from segment to segment;           (not if there is one segment)
///   3. every segment from its carry.
///
/// Inside a chunk tokens come in groups of four. With x the state before a group, which has drives
/// v_0 to v_3,
///   x' = a^4 x + a^3 v_0 + a^2 v_1 + a v_2 + v_3
///   w_j = sum_m Re(U_j x) + sum_{d <= j} K_d v_{j-d},   U_j = W a^{j+1},   K_d = sum_m Re(W a^d)
/// where the second sum is one of the lane, not of its sub-states, and skip belongs to K_0. That is
/// 18 FMA per group and sub-state where single tokens take 24, and a chain a quarter as long.
///
/// A block owns `tile` lanes of one segment, `parts` neighbouring threads share a lane: thread
/// `part` owns its sub-states part, part + parts, ... The tokens of a chunk lie in shared memory,
/// one row of kPitch floats per lane. The sub-states of a thread come one after another, each with
/// all tokens of the chunk: 32 partial sums stay in registers and are summed over the threads of a
/// lane by one transposing reduction per chunk. What a thread keeps of each sub-state lies in
/// columns of its own, in shared memory or, if there are too many, in device memory.
///
/// One channel with outputs of its own has kernels with more in registers: common/lane_walk.cuh.
///
/// Tile, parts and segments depend on the sizes alone, so results do not depend on the device.
#pragma once

#include <algorithm>

#include "common/check.cuh"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "ops/lane_scan.hpp"

namespace lrnn::cuda::lane {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = static_cast<int>(kLaneScanChunk);
static_assert(kChunk == 32, "the transposing reduction hands one token to every lane of a warp");
constexpr int kGroup = 4;
constexpr int kPitch = 36;      // keeps rows aligned to float4 and eight of them on distinct banks
constexpr int kPerPart = 4;     // sub-states per thread that are worth a reduction
constexpr int kWalkParts = 16;  // threads per lane that the kernels with registers have at most
constexpr std::int64_t kEnoughBlocks = 256;
constexpr std::int64_t kTargetBlocks = 512;
constexpr std::int64_t kWalkBlocks = 384;   // the same of the kernels with registers
constexpr std::int64_t kMinWalkChunks = 4;  // of a segment: less than a block spends on starting
constexpr std::int64_t kMaxWalkSegments = 128;   // step 2 is serial
constexpr std::int64_t kShortSequence = 128;     // not worth three launches
constexpr std::int64_t kManyChunks = 256;        // cheaper to cut than lanes are
constexpr std::int64_t kCheapSegments = 16;      // that it may be cut into
constexpr std::size_t kSharedLimit = 64 * 1024;  // what every device grants

struct Sizes {
  std::int64_t batch;
  std::int64_t seqlen;
  std::int64_t inputs;
  std::int64_t lanes;
  std::int64_t groups;
  std::int64_t channels;
  std::int64_t substates;
  std::int64_t outputs;
  std::int64_t chunks;
  std::int64_t plane;  // lanes * substates
  std::int64_t tiles;  // of one group
  std::int64_t segments;
  std::int64_t segment_chunks;
  bool real_weight;
  bool in_registers;  // common/lane_walk.cuh
  int parts;
  int per_part;
  int tile;
  int tile_log2;

  /// `tiles_share_output`: a block walks all tiles of a group, because it writes their sum.
  Sizes(const detail::LaneScanSizes& s, int min_parts, bool tiles_share_output)
      : batch(s.batch),
        seqlen(s.seqlen),
        inputs(s.inputs),
        lanes(s.lanes),
        groups(s.groups),
        channels(s.channels),
        substates(s.substates),
        outputs(s.outputs),
        chunks(s.chunks),
        plane(s.plane()),
        real_weight(s.real_weight),
        in_registers(groups == 1 && channels == 1 && substates <= kWalkParts * kPerPart) {
    const auto blocks = [&] {
      tiles = (inputs + kThreads / parts - 1) / (kThreads / parts);
      return batch * (tiles_share_output ? groups : tiles);
    };
    parts = min_parts;
    while (parts < 32 && parts * kPerPart < substates) parts *= 2;
    // A thread with one sub-state spends as much on the reduction as on the recurrence.
    const std::int64_t cuts = chunks < kManyChunks ? 1 : kCheapSegments;
    while (parts < 32 && parts < substates && !tiles_share_output && !in_registers &&
           blocks() * cuts < kEnoughBlocks)
      parts *= 2;
    std::int64_t wanted = 1;
    const std::int64_t target = in_registers ? kWalkBlocks : kTargetBlocks;
    const std::int64_t most =
        in_registers ? std::min(chunks / kMinWalkChunks, kMaxWalkSegments) : chunks;
    if (const std::int64_t have = blocks(); have < kEnoughBlocks && seqlen > kShortSequence)
      wanted = std::clamp((target + have - 1) / have, std::int64_t{1}, most);
    segment_chunks = (chunks + wanted - 1) / wanted;
    segments = (chunks + segment_chunks - 1) / segment_chunks;
    per_part = static_cast<int>((substates + parts - 1) / parts);
    tile = kThreads / parts;
    tile_log2 = 0;
    while (1 << tile_log2 < tile) ++tile_log2;
  }

  [[nodiscard]] std::int64_t rows() const { return batch * segments; }
  [[nodiscard]] std::size_t tile_bytes() const {
    return static_cast<std::size_t>(tile) * kPitch * sizeof(float);
  }
  /// Shape of the states of all segments.
  [[nodiscard]] Shape segment_states() const { return {rows(), 2, lanes, substates}; }
};

__device__ inline float2 operator+(float2 a, float2 b) {
  return {a.x + b.x, a.y + b.y};
}
__device__ inline float2 multiply(float2 a, float2 b) {
  return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}
// a conj(b) + c
__device__ inline float2 multiply_conj_add(float2 a, float2 b, float2 c) {
  return {fmaf(a.x, b.x, fmaf(a.y, b.y, c.x)), fmaf(a.y, b.x, fmaf(-a.x, b.y, c.y))};
}
// a x + v with real v
__device__ inline float2 advance(float2 a, float2 x, float v) {
  return {fmaf(a.x, x.x, fmaf(-a.y, x.y, v)), fmaf(a.x, x.y, a.y * x.x)};
}
struct Pair {
  double re;
  double im;
};
__device__ inline Pair operator*(Pair a, Pair b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ inline Pair widen(float2 v) {
  return {static_cast<double>(v.x), static_cast<double>(v.y)};
}
__device__ inline Pair power(Pair base, std::int64_t exponent) {
  Pair result{1.0, 0.0};
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) result = result * base;
    base = base * base;
  }
  return result;
}

// a + low, what a float32 multiplier was rounded from.
__device__ inline Pair exact_multiplier(float2 a, float2 low) {
  return {static_cast<double>(a.x) + static_cast<double>(low.x),
          static_cast<double>(a.y) + static_cast<double>(low.y)};
}

// a to a^4
struct Powers {
  float2 of[kGroup];

  Powers() = default;
  __device__ __forceinline__ explicit Powers(float2 a) {
    of[0] = a;
    of[1] = multiply(a, a);
    of[2] = multiply(of[1], a);
    of[3] = multiply(of[1], of[1]);
  }
  /// Rounded once each.
  __device__ explicit Powers(Pair a) {
    Pair power = a;
    for (int k = 0; k < kGroup; ++k) {
      of[k] = {static_cast<float>(power.re), static_cast<float>(power.im)};
      power = power * a;
    }
  }
};

// a^steps less what groups and single tokens make of it with float32 powers: applied once per
// chunk, it keeps their rounding from adding up along the sequence.
__device__ inline float2 power_gap(Pair a, float2 single, float2 fourth, int steps) {
  const Pair exact = power(a, steps);
  const Pair walked = power(widen(fourth), steps / kGroup) * power(widen(single), steps % kGroup);
  return {static_cast<float>(exact.re - walked.re), static_cast<float>(exact.im - walked.im)};
}

// x behind a whole group.
__device__ __forceinline__ float2 advance_group(const Powers& a, float2 x, float4 v) {
  const float2 drive{fmaf(a.of[2].x, v.x, fmaf(a.of[1].x, v.y, fmaf(a.of[0].x, v.z, v.w))),
                     fmaf(a.of[2].y, v.x, fmaf(a.of[1].y, v.y, a.of[0].y * v.z))};
  return {fmaf(a.of[3].x, x.x, fmaf(-a.of[3].y, x.y, drive.x)),
          fmaf(a.of[3].x, x.y, fmaf(a.of[3].y, x.x, drive.y))};
}
// Re(a b) + c
__device__ __forceinline__ float real_part(float2 a, float2 b, float c) {
  return fmaf(a.x, b.x, fmaf(-a.y, b.y, c));
}

/// The part of a sequence that a block walks. `holds_last`: the state behind the last valid token
/// is the one at the end of this segment.
struct Segment {
  std::int64_t batch;
  std::int64_t index;
  std::int64_t row;  // of carries and partial sums
  std::int64_t first_chunk;
  std::int64_t last_chunk;  // one past
  std::int64_t length;
  bool holds_last;

  __device__ Segment(const Sizes& s, const std::int32_t* lengths, std::int64_t at) {
    row = at;
    batch = at / s.segments;
    index = at % s.segments;
    first_chunk = index * s.segment_chunks;
    last_chunk = min(first_chunk + s.segment_chunks, s.chunks);
    length = lengths == nullptr ? s.seqlen : static_cast<std::int64_t>(lengths[batch]);
    const bool reaches_back = index == 0 || first_chunk * kChunk < length;
    holds_last = reaches_back && length <= last_chunk * kChunk;
  }
  // One past the last chunk of the segment with valid tokens.
  [[nodiscard]] __device__ std::int64_t valid_end() const {
    return max(first_chunk, min(last_chunk, (length + kChunk - 1) / kChunk));
  }
  // Valid tokens of a chunk.
  __device__ int steps(std::int64_t chunk) const {
    return static_cast<int>(
        max(std::int64_t{0}, min(length - chunk * kChunk, std::int64_t{kChunk})));
  }
};

/// What a thread owns. `row` is its lane's row of the tiles.
struct Place {
  int part;
  int row;
  std::int64_t column;  // of the first lane of the tile, in v
  int columns;          // lanes of the tile that exist
  std::int64_t lane;
  bool exists;

  __device__ Place(const Sizes& s, std::int64_t group, std::int64_t tile) {
    part = static_cast<int>(threadIdx.x) & (s.parts - 1);
    row = static_cast<int>(threadIdx.x) / s.parts;
    column = tile * s.tile;
    columns = static_cast<int>(min(s.inputs - column, static_cast<std::int64_t>(s.tile)));
    lane = group * s.inputs + column + row;
    exists = row < columns;
  }
};

/// One sub-state of a thread: where it lies in a plane [N, M].
struct Slot {
  std::int64_t offset;
  bool exists;

  __device__ Slot(const Sizes& s, const Place& place, int i) {
    const std::int64_t m = place.part + static_cast<std::int64_t>(i) * s.parts;
    offset = place.lane * s.substates + m;
    exists = place.exists && m < s.substates;
  }
};

// A value of planes [2, N, M]; 0 where the planes or the sub-state do not exist.
__device__ inline float2 load_pair(const float* planes, const Sizes& s, const Slot& slot) {
  if (planes == nullptr || !slot.exists) return {0.0F, 0.0F};
  return {planes[slot.offset], planes[s.plane + slot.offset]};
}
__device__ inline void store_pair(float* planes, const Sizes& s, const Slot& slot, float2 value) {
  if (!slot.exists) return;
  planes[slot.offset] = value.x;
  planes[s.plane + slot.offset] = value.y;
}
__device__ inline float2 load_weight(const float* W, const Sizes& s, const Slot& slot,
                                     std::int64_t channel) {
  if (!s.real_weight) return load_pair(W + channel * 2 * s.plane, s, slot);
  return {slot.exists ? W[channel * s.plane + slot.offset] : 0.0F, 0.0F};
}

/// float2 values of a thread: `fields` of every sub-state, then `singles`.
struct Columns {
  float2* base;
  int per_part;
  int fields;

  __device__ float2& at(int field, int i) const {
    return base[(field * per_part + i) * kThreads + static_cast<int>(threadIdx.x)];
  }
  __device__ float2& single(int i) const { return at(fields, i); }
};

// Sum over the `parts` threads of a lane, in every thread.
__device__ inline float sum_parts(float value, int parts) {
  for (int distance = 1; distance < parts; distance *= 2)
    value += __shfl_xor_sync(0xFFFFFFFFU, value, distance);
  return value;
}

// K_0 to K_3 of the lane of a thread, skip included.
struct Taps {
  float of[kGroup];
};
__device__ inline Taps make_taps(const Sizes& s, const Place& place, const float* a, const float* W,
                                 const float* skip, int channel) {
  Taps taps{};
  for (int i = 0; i < s.per_part; ++i) {
    const Slot slot(s, place, i);
    const Powers powers(load_pair(a, s, slot));
    const float2 weight = load_weight(W, s, slot, channel);
    taps.of[0] += weight.x;
#pragma unroll
    for (int d = 1; d < kGroup; ++d) taps.of[d] = real_part(weight, powers.of[d - 1], taps.of[d]);
  }
#pragma unroll
  for (int d = 0; d < kGroup; ++d) taps.of[d] = sum_parts(taps.of[d], s.parts);
  if (skip != nullptr && place.exists) taps.of[0] += skip[channel * s.lanes + place.lane];
  return taps;
}

/// tile[c][t] = rows[t * stride + c * step] for t < steps and c < columns, else 0.
template <class T>
__device__ void fill_tile(float* tile, const T* rows, std::int64_t stride, int step, int steps,
                          int columns, const Sizes& s) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kChunk << s.tile_log2; i += kThreads) {
    const int t = i >> s.tile_log2;
    const int c = i & (s.tile - 1);
    float value = 0.0F;
    if (t < steps && c < columns) value = to_float(rows[t * stride + c * step]);
    tile[c * kPitch + t] = value;
  }
}

// One round of reduce_parts, which leaves every thread with half the tokens.
template <int kHalf>
__device__ __forceinline__ void exchange_halves(float (&w)[kChunk], int part) {
  constexpr int kDistance = 16 / kHalf;
  const bool upper = (part & kDistance) != 0;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const float send = upper ? w[j] : w[j + kHalf];
    const float keep = upper ? w[j + kHalf] : w[j];
    w[j] = keep + __shfl_xor_sync(0xFFFFFFFFU, send, kDistance);
  }
}
/// w[j] summed over the `parts` threads of a lane, neighbours in a warp, of which every thread is
/// left with 32 / parts tokens: first_token(part, parts) + j in w[j].
__device__ __forceinline__ void reduce_parts(float (&w)[kChunk], int part, int parts) {
  if (parts > 1) exchange_halves<16>(w, part);
  if (parts > 2) exchange_halves<8>(w, part);
  if (parts > 4) exchange_halves<4>(w, part);
  if (parts > 8) exchange_halves<2>(w, part);
  if (parts > 16) exchange_halves<1>(w, part);
}
/// The rounds that reduce_parts left out: the sum over the whole warp of token first_token(lane,
/// 32) in w[0].
__device__ __forceinline__ void reduce_warp(float (&w)[kChunk], int lane, int parts) {
  if (parts <= 1) exchange_halves<16>(w, lane);
  if (parts <= 2) exchange_halves<8>(w, lane);
  if (parts <= 4) exchange_halves<4>(w, lane);
  if (parts <= 8) exchange_halves<2>(w, lane);
  if (parts <= 16) exchange_halves<1>(w, lane);
}
__device__ inline int first_token(int part, int parts) {
  int token = 0;
#pragma unroll
  for (int round = 0; round < 5; ++round)
    if (1 << round < parts) token += (part >> round & 1) << (4 - round);
  return token;
}

/// Step 2. Forward: carries[b, s] is the state that enters segment s, from the ends of the segments
/// before it and `start` [B, 2, N, M] (0 if null). Reverse: what enters segment s from the right,
/// with conjugate multipliers; `start` is null.
struct CarryArgs {
  Sizes sizes;
  bool reverse;
  const float* a;
  const float* a_low;
  const float* ends;
  const float* start;
  float* carries;
};
void launch_carry(Context& ctx, const CarryArgs& args);

template <class T>
T* data_or_null(const MutableTensorView& t) {
  return t ? t.data<T>() : nullptr;
}
template <class T>
const T* data_or_null(const TensorView& t) {
  return t ? t.data<T>() : nullptr;
}

}  // namespace lrnn::cuda::lane
