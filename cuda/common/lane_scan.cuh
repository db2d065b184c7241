/// What the forward and backward kernels of lane_scan share.
///
/// Time is cut into chunks of kChunk tokens, whose entering states are kept for backward, and into
/// segments of whole chunks, which run in parallel:
///   1. every segment from a zero state, to its end;   (not if there is one segment)
///   2. the carries from segment to segment;           (not if there is one segment)
///   3. every segment from its carry.
///
/// A block owns `tile` lanes of one segment, `parts` neighbouring threads share a lane: thread
/// `part` owns its sub-states part, part + parts, ... The tokens of a chunk lie in shared memory,
/// one row of kPitch floats per lane. The sub-states of a thread come one after another, each with
/// all tokens of the chunk: 32 partial sums stay in registers and are summed over the threads of a
/// lane by one transposing reduction per chunk. What a thread keeps of each sub-state lies in
/// columns of its own, in shared memory or, if there are too many, in device memory.
///
/// Tile, parts and segments depend on the sizes alone, so results do not depend on the device.
#pragma once

#include <algorithm>

#include "common/dtype.cuh"
#include "ops/lane_scan.hpp"

namespace lrnn::cuda::lane {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = static_cast<int>(kLaneScanChunk);
static_assert(kChunk == 32, "the transposing reduction hands one token to every lane of a warp");
constexpr int kPitch = 36;    // keeps rows aligned to float4 and eight of them on distinct banks
constexpr int kMinParts = 2;  // at most 64 lanes in a block
constexpr int kPerPart = 4;   // sub-states per thread that are worth a reduction
constexpr std::int64_t kEnoughBlocks = 256;
constexpr std::int64_t kTargetBlocks = 512;
constexpr std::int64_t kShortSequence = 128;     // not worth three launches
constexpr std::size_t kSharedLimit = 48 * 1024;  // what every device grants unasked

/// `tiles_share_output`: a block walks all tiles of a group, because it writes their sum.
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
  int parts;
  int per_part;
  int tile;
  int tile_log2;

  Sizes(const detail::LaneScanSizes& s, bool tiles_share_output)
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
        real_weight(s.real_weight) {
    const auto blocks = [&] {
      tiles = (inputs + kThreads / parts - 1) / (kThreads / parts);
      return batch * (tiles_share_output ? groups : tiles);
    };
    parts = kMinParts;
    while (parts < 32 && parts * kPerPart < substates) parts *= 2;
    while (parts < 32 && parts < substates && !tiles_share_output && blocks() < kEnoughBlocks)
      parts *= 2;
    std::int64_t wanted = 1;
    if (const std::int64_t have = blocks(); have < kEnoughBlocks && seqlen > kShortSequence)
      wanted = std::min((kTargetBlocks + have - 1) / have, chunks);
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
// (a + low)^steps - a^steps to first order, which leaves less than 1e-12 of a^steps
__device__ inline float2 power_gap(float2 a, float2 low, int steps) {
  const auto factor = static_cast<float>(steps);
  float2 out{factor * low.x, factor * low.y};
  for (int e = steps - 1; e > 0; e /= 2) {
    if (e % 2 == 1) out = multiply(out, a);
    a = multiply(a, a);
  }
  return out;
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

/// float2 values of a thread by field and sub-state. Memory: `fields` * per_part * kThreads.
struct Columns {
  float2* base;
  int per_part;

  __device__ float2& at(int field, int i) const {
    return base[(static_cast<std::int64_t>(field) * per_part + i) * kThreads + threadIdx.x];
  }
};

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
