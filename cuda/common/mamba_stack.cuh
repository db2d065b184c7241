/// What the kernels of mamba_stack_step share: sizes, the ring of buffers through which the weights
/// come, and their launch.
///
/// One warp of a block copies the weights into a ring of buffers, as far ahead as the ring reaches,
/// and one asks for the small operands of the next layer; kWarps warps multiply, the sequences as
/// the left operand and rows of the weights as its columns, each a part of the depth: 32 of every
/// 256.
///
/// How the weights are copied decides the rate. A copy takes its warp about 120 cycles, so rows
/// should be long: 16 rows of 1.5 KB at a time come at 3.2 TB/s, of 2 KB at 4.2, 8 rows of 4 KB at
/// 4.4. What is on its way delays what the blocks exchange: a word takes 840 cycles without copies,
/// 1200 behind 48 KB, 1600 behind 64 KB and 6800 behind 192 KB of each block, while 48 KB already
/// come at 4.4 TB/s. So a ring is deep, but little of it is on its way at a time, and where that
/// helps less while the blocks exchange than while they multiply; and what is copied is the first
/// to leave L2, where it would drive out what the blocks exchange.
///
/// The 120 cycles are those of a loop over the lanes that the compiler puts around a copy (see
/// elected()). Without it a buffer is asked for at once: better for more sequences, but for one or
/// two, whose stages are shorter, copies that come one by one disturb less.
///
/// Who asks for a word that cannot be there yet slows down those who make it: all blocks ask for
/// the same few lines of L2, through which the words must come. So warps that have nothing else to
/// do sleep first, and those that have no part in a stage wait for the others of their block. To
/// sleep between two questions for the same word costs more than it gains.
#pragma once

#include <algorithm>

#include "common/capability.cuh"
#include "common/causal_conv1d.cuh"
#include "common/selective_scan.cuh"
#include "common/wgmma.cuh"
#include "ops/mamba_stack_parts.hpp"

namespace lrnn::cuda::mamba_stack {

constexpr int kWarps = 8;  // that compute
constexpr int kThreads = 32 * kWarps;
constexpr int kAllThreads = kThreads + 64;  // one warp copies, one prefetches
constexpr int kTileRows = 16;               // of a weight, in a product
constexpr int kBufferRows = 8;  // of a weight, in a buffer of the ring: columns of a product
constexpr int kStep = 32;       // depth of a step of a warp: two products
constexpr int kUnit = kStep * kWarps;
constexpr int kPad = 32;            // elements behind a row, so that two rows fill the banks
constexpr int kPieceBytes = 17000;  // at most, of a buffer
constexpr int kMinSlots = 4;
constexpr int kMaxSlots = 16;
constexpr int kMostPieces = 2;  // of a buffer
constexpr int kMostRows = 16;   // sequences
constexpr int kStates = 4;      // of a lane
constexpr int kLanes = 4;       // of a channel
constexpr int kDState = kStates * kLanes;
constexpr int kWidth = 4;  // of the convolution
// Before a warp asks for words that cannot be there yet.
[[maybe_unused]] constexpr unsigned kPause = 200;  // ns
// Whose pointers are arguments, of 4 KB before CUDA 12.1.
constexpr int kMaxLayers = CUDART_VERSION >= 12010 ? 64 : 24;

/// Products of a layer, in their order.
enum Stage { kIn, kXDbl, kOut, kStages };

/// Sizes of a model of d_model kInputs with the usual options, on kBlocks blocks, of each of which
/// at most kBytesExchanging are on their way while it waits for others, kBytesStreaming while it
/// multiplies. kCluster blocks share their rows of out_proj: each takes a part of the depth.
template <int kInputs_, int kBlocks_, int kBytesExchanging, int kBytesStreaming = kBytesExchanging,
          int kCluster_ = 1>
struct Sizes {
  static constexpr int kInputs = kInputs_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kChannels = 2 * kInputs;
  static constexpr int kRank = kInputs / 16;
  static constexpr int kXDblRows = kRank + 2 * kDState;
  /// Of a buffer of the ring: rows of a weight, or the states of kMostRows sequences.
  static constexpr int kSlotBytes =
      std::max(kBufferRows * (kInputs + kPad) * 2, (kChannels / kBlocks) * kMostRows * kDState * 4);
  /// Pieces in which a buffer is copied: each costs those who wait for it a barrier.
  static constexpr int kPieces = (kSlotBytes + kPieceBytes - 1) / kPieceBytes;
  /// Pieces in so many bytes that may be on their way.
  static constexpr int pieces(int bytes) {
    return std::min(kPieces * kMinSlots, bytes / (kSlotBytes / kPieces));
  }
  static constexpr int kLeastInFlight = pieces(kBytesExchanging);
  static constexpr int kMostInFlight = pieces(kBytesStreaming);
  static constexpr bool kAdapts = kLeastInFlight != kMostInFlight;

  __host__ __device__ static constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
  __host__ __device__ static constexpr int all(int stage) {
    return stage == kIn ? kChannels : stage == kXDbl ? kXDblRows : kInputs;
  }
  __host__ __device__ static constexpr int lesser(int a, int b) { return a < b ? a : b; }
  /// Rows of a block.
  __host__ __device__ static constexpr int own(int stage) { return ceil_div(all(stage), kBlocks); }
  __host__ __device__ static constexpr int shared_by(int stage) {
    return stage == kOut ? kCluster : 1;
  }
  /// Rows that a block multiplies, and how much of their length.
  __host__ __device__ static constexpr int multiplied(int stage) {
    return own(stage) * shared_by(stage);
  }
  __host__ __device__ static constexpr int length(int stage) {
    return stage == kIn ? kInputs : kChannels;
  }
  __host__ __device__ static constexpr int depth(int stage) {
    return length(stage) / shared_by(stage);
  }
  __host__ __device__ static constexpr int steps(int stage) { return depth(stage) / kUnit; }
  /// Tiles of rows; in kIn those of u and z take turns.
  __host__ __device__ static constexpr int tiles(int stage) {
    return ceil_div(multiplied(stage), kTileRows) * (stage == kIn ? 2 : 1);
  }
  __host__ __device__ static constexpr int first_row(int stage, int tile) {
    return (stage == kIn ? tile / 2 : tile) * kTileRows;
  }
  __host__ __device__ static constexpr int rows(int stage, int tile) {
    return lesser(kTileRows, multiplied(stage) - first_row(stage, tile));
  }
  /// Buffers that take its rows: the first kBufferRows, and the others.
  __host__ __device__ static constexpr int halves(int stage, int tile) {
    return ceil_div(rows(stage, tile), kBufferRows);
  }
  __host__ __device__ static constexpr int rows(int stage, int tile, int half) {
    return lesser(kBufferRows, rows(stage, tile) - half * kBufferRows);
  }
  /// Steps that a buffer of the ring takes: depth by depth of kIn, which divides the others'.
  __host__ __device__ static constexpr int part(int stage) {
    constexpr int kInputSteps = kInputs / kUnit;
    const int rows = lesser(kBufferRows, multiplied(stage));
    const int room = (kSlotBytes / rows / 2 - kPad) / kUnit;
    return lesser(steps(stage), room / kInputSteps * kInputSteps);
  }
  __host__ __device__ static constexpr int parts(int stage) {
    return ceil_div(steps(stage), part(stage));
  }
  __host__ __device__ static constexpr int pitch(int stage) { return part(stage) * kUnit + kPad; }
  /// Buffers that the weights of a stage fill.
  __host__ __device__ static constexpr int buffers(int stage) {
    return ceil_div(multiplied(stage), kBufferRows) * parts(stage) * (stage == kIn ? 2 : 1);
  }
  static_assert(kPieces <= kMostPieces && kLeastInFlight > 0 && kInputs % kUnit == 0 &&
                kInputs % kBlocks == 0 && kChannels % (4 * kBlocks) == 0 &&
                kBlocks % kCluster == 0);
};

/// Pointers of one layer.
struct Layer {
  const bf16* weights[kStages];
  const float* norm_weight;
  const bf16* conv_weight;
  const bf16* conv_bias;  // or null
  const bf16* dt_weight;
  const float* dt_bias;
  const float* A_log;
  const float* D;
  float* conv_state;
  float* lrnn_state;
};

struct Args {
  Layer layers[kMaxLayers];
  int layer_count;
  unsigned epoch;  // number of the first layer
  int batch;
  int slots;
  std::uint32_t none;  // 0, unknown to the compiler
  float eps;
  bool narrow_residual;
  const bf16* x;
  const void* residual;  // or null
  bf16* y;
  void* residual_out;
  void* words;  // of the exchange
};

/// Barriers of the buffers, and the pointers of all layers, in shared memory.
struct Common {
  Layer layers[kMaxLayers];
  std::uint64_t full[kMaxSlots][kMostPieces];
  std::uint64_t empty[kMaxSlots];
  std::uint64_t reached;    // layers, by the warps that compute
  std::uint64_t streaming;  // in odd phases they multiply, and do not wait for other blocks

#if __CUDA_ARCH__ >= 900
  /// By all threads of a block.
  __device__ __forceinline__ void prepare(const Args& p) {
    constexpr int kWords = static_cast<int>(sizeof(p.layers) / sizeof(std::uint64_t));
    const auto* const from = reinterpret_cast<const std::uint64_t*>(p.layers);
    for (int i = static_cast<int>(threadIdx.x); i < kWords; i += static_cast<int>(blockDim.x))
      reinterpret_cast<std::uint64_t*>(layers)[i] = from[i];
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.slots; ++i) {
        for (std::uint64_t& piece : full[i]) barrier_init(shared_address(&piece), 1);
        barrier_init(shared_address(&empty[i]), kThreads);
      }
      barrier_init(shared_address(&reached), 1);
      barrier_init(shared_address(&streaming), 1);
      barrier_init_done();
    }
    __syncthreads();
  }
#endif
};

#if __CUDA_ARCH__ >= 900

constexpr int kComputers = 1;  // barrier of the warps that compute
constexpr int kLayers = 2;     // the same, once a layer, when the one that prefetches is there
constexpr int kOrdered = 3;    // of the same

/// Where in the ring a warp is.
struct Place {
  int slot = 0;
  int turn = 0;

  __device__ __forceinline__ void next(int slots) {
    if (++slot == slots) {
      slot = 0;
      turn ^= 1;
    }
  }
};

/// The warp that copies, as it writes the ring: rows of a piece one by one, or all at once.
template <class Z, bool kRowsAtOnce>
struct RingWriter {
  Common& common;
  std::uint32_t ring;
  int slots;
  int lane;
  Place place = {};
  Place landed = {};  // what comes behind it is on its way
  int landed_piece = 0;
  int in_flight = 0;  // pieces

  /// Waits for the next piece that is on its way.
  __device__ __forceinline__ void land() {
    barrier_wait(shared_address(&common.full[landed.slot][landed_piece]), landed.turn);
    if (++landed_piece < Z::kPieces) return;
    landed_piece = 0;
    landed.next(slots);
  }
  [[nodiscard]] __device__ __forceinline__ int most_in_flight() const {
    const bool streams = Z::kAdapts && barrier_passed(shared_address(&common.streaming), 0);
    return streams ? Z::kMostInFlight : Z::kLeastInFlight;
  }
  /// Waits until so little is on its way that another piece may follow.
  __device__ __forceinline__ void pace() {
    if constexpr (Z::kAdapts) {
      for (; in_flight >= most_in_flight(); --in_flight) land();
      ++in_flight;
    } else if (in_flight < Z::kLeastInFlight) {
      ++in_flight;
    } else {
      land();
    }
  }
  /// `rows` rows of `bytes` each, `stride` bytes apart, to the next buffer, where they are `pitch`
  /// bytes apart.
  __device__ __forceinline__ void copy(const void* from, std::int64_t stride, int rows, int bytes,
                                       int pitch) {
    const std::uint32_t to = ring + static_cast<std::uint32_t>(place.slot * Z::kSlotBytes);
    barrier_wait(shared_address(&common.empty[place.slot]), place.turn ^ 1);
#pragma unroll
    for (int piece = 0; piece < Z::kPieces; ++piece) {
      const int first = piece * rows / Z::kPieces;
      const int last = (piece + 1) * rows / Z::kPieces;
      const std::uint32_t full = shared_address(&common.full[place.slot][piece]);
      pace();
      // One lane's addresses are the warp's: those of several would take turns, slowly.
      if (kRowsAtOnce ? elected() : lane == 0) {
        barrier_expect(full, (last - first) * bytes);
#pragma unroll 4
        for (int i = first; i < last; ++i)
          copy_bytes_once(to + static_cast<std::uint32_t>(i * pitch),
                          static_cast<const char*>(from) + i * stride, bytes, full);
      }
      __syncwarp();
    }
    place.next(slots);
  }
  /// What this block has of the weight of a stage.
  template <int kStage>
  __device__ __forceinline__ void copy_stage(const Layer& l) {
    constexpr int kLength = Z::length(kStage);
    constexpr int kDepth = Z::depth(kStage);
    constexpr int kPart = Z::part(kStage) * kUnit;
    constexpr int kSharedBy = Z::shared_by(kStage);
    const int first = static_cast<int>(blockIdx.x) / kSharedBy * Z::multiplied(kStage);
    if (first >= Z::all(kStage)) return;
#pragma unroll 1
    for (int t = 0; t < Z::tiles(kStage); ++t) {
      const int row =
          first + Z::first_row(kStage, t) + (kStage == kIn && t % 2 != 0 ? Z::kChannels : 0);
      const bf16* const from = l.weights[kStage] + std::int64_t{row} * kLength +
                               static_cast<int>(blockIdx.x) % kSharedBy * kDepth;
#pragma unroll 1
      for (int k = 0; k < kDepth; k += kPart)
#pragma unroll 1
        for (int h = 0; h < Z::halves(kStage, t); ++h)
          copy(from + h * kBufferRows * kLength + k, kLength * 2, Z::rows(kStage, t, h),
               min(kPart, kDepth - k) * 2, Z::pitch(kStage) * 2);
    }
  }
};

// --- the warp that prefetches ------------------------------------------------------------------

constexpr int kSector = 32;  // bytes that a prefetch brings

__device__ __forceinline__ void prefetch_bytes(const void* from, int bytes, int lane) {
  for (int at = lane * kSector; at < bytes; at += 32 * kSector)
    prefetch_to_l2(static_cast<const char*>(from) + at);
}
/// The small operands of this block's channels, which the others read by themselves.
template <class Z>
__device__ __forceinline__ void prefetch_channels(const Layer& l, int batch, int lane) {
  constexpr int kOwn = Z::own(kIn);
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kOwn;
  prefetch_bytes(l.conv_weight + c * kWidth, kOwn * kWidth * 2, lane);
  prefetch_bytes(l.dt_weight + c * Z::kRank, kOwn * Z::kRank * 2, lane);
  prefetch_bytes(l.A_log + c * kDState, kOwn * kDState * 4, lane);
  if (lane == 0) {
    if (l.conv_bias != nullptr) prefetch_to_l2(l.conv_bias + c);
    prefetch_to_l2(l.dt_bias + c);
    prefetch_to_l2(l.D + c);
  }
  for (int n = 0; n < batch; ++n)
    prefetch_bytes(l.conv_state + (std::int64_t{n} * Z::kChannels + c) * kWidth, kOwn * kWidth * 4,
                   lane);
}
/// The warps that compute and the one that prefetches have come to the same layer. The latter only
/// arrives where the former wait, since synccheck wants all who wait at a barrier at one place.
__device__ __forceinline__ void meet(Common& common) {
  group_wait(kLayers, kThreads + 32);
  if (threadIdx.x == 0) barrier_arrive(shared_address(&common.reached));
}
/// Orders what publish() cleared before the warps met before all that is published behind
/// ordered(): a fence takes longer than those who compute may wait.
__device__ __forceinline__ void order() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  group_arrive(kOrdered, kThreads + 32);
}
__device__ __forceinline__ void ordered() {
  group_wait(kOrdered, kThreads + 32);
}
/// By the warps that compute, where they begin and end to multiply, in turns. The wait is over at
/// once, but synccheck wants one in every phase.
template <class Z>
__device__ __forceinline__ void set_streaming(Common& common, bool streams) {
  if constexpr (!Z::kAdapts) return;
  if (threadIdx.x == 0) {
    barrier_arrive(shared_address(&common.streaming));
    barrier_wait(shared_address(&common.streaming), streams ? 0 : 1);
  }
  __syncwarp();
}
/// Prefetches the first layer, and every other one while the one before is computed: much
/// earlier, and the weights that pass through L2 would drive it out again.
template <bool kOrders, class Prefetch>
__device__ __forceinline__ void prefetch_layers(Common& common, int count, Prefetch prefetch) {
  prefetch(common.layers[0]);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    group_arrive(kLayers, kThreads + 32);
    barrier_wait(shared_address(&common.reached), i % 2);
    if constexpr (kOrders) order();
    if (i + 1 < count) prefetch(common.layers[i + 1]);
  }
}

// --- the warps that compute --------------------------------------------------------------------

/// A step of a warp is two products of depth 16, with even and odd steps four independent sums.
/// Lane 4 g + c has 8 neighbours in depth, 8 c on, of row g of the weight and of sequences g and
/// g + 8: the order within a step is free.
constexpr int kSums = 4;

/// A step's left operand, as its two products take it.
struct Operand {
  std::uint32_t first[4], second[4];

  /// Of 8 neighbours in depth of two sequences. Arranged once: if there were nothing to compute
  /// (`none` is 0), the compiler would do so for every product.
  __device__ __forceinline__ static Operand of(uint4 upper, uint4 lower, std::uint32_t none) {
    return {{upper.x | none, lower.x | none, upper.y | none, lower.y | none},
            {upper.z | none, lower.z | none, upper.w | none, lower.w | none}};
  }
};
/// c += the product of step `step` with weights w.
__device__ __forceinline__ void multiply(float (&c)[kSums][4], int step, uint4 w,
                                         const Operand& a) {
  multiply_add(c[step % 2 * 2], a.first, w.x, w.y);
  multiply_add(c[step % 2 * 2 + 1], a.second, w.z, w.w);
}
__device__ __forceinline__ void clear(float (&c)[kSums][4]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[i][e] = 0.0F;
}

/// The first weights of a stage, in the order of the ring: they wait in registers, so that their
/// buffers may be filled again.
template <class Z, int kStage, int kMost>
struct Held {
  static constexpr int kPart = Z::part(kStage);
  static constexpr int kHalves = Z::halves(kStage, 0);
  static constexpr int kTile = Z::steps(kStage) * kHalves;
  static constexpr int kCount = Z::lesser(kMost, kTile*(kStage == kIn ? 2 : 1));
  static_assert(Z::steps(kStage) % kPart == 0 && Z::ceil_div(kCount, kPart) <= kMinSlots);

  uint4 w[kCount];

  /// Which of the weights is step `step` of a half of a tile.
  __device__ __forceinline__ static constexpr int index(int tile, int half, int step) {
    return tile * kTile + (step / kPart * kHalves + half) * kPart + step % kPart;
  }
};

/// A warp that multiplies, as it reads the ring.
template <class Z>
struct RingReader {
  Common& common;
  const char* ring;
  int slots;
  std::uint32_t none;
  int lane;
  int warp;
  Place place = {};
  Place freed = {};
  int read = 0;            // buffers behind `freed` that have been read
  std::uint32_t seen = 0;  // of their values

  /// The next buffer, once it is full.
  __device__ __forceinline__ void wait() const {
#pragma unroll
    for (int piece = 0; piece < Z::kPieces; ++piece)
      barrier_wait(shared_address(&common.full[place.slot][piece]), place.turn);
  }
  [[nodiscard]] __device__ __forceinline__ const char* buffer() const {
    return ring + place.slot * Z::kSlotBytes;
  }
  /// To the buffer after this one, which has been read.
  __device__ __forceinline__ void next() {
    place.next(slots);
    ++read;
  }
  /// Leaves what has been read to the next copies, each lane for itself: racecheck follows no lane's
  /// reads to another's arrival. Its loads have come back by then: on what was seen of them depends
  /// whether it arrives, as it always does. Without that the barrier may overtake them, and without
  /// the test the code is slower.
  __device__ __forceinline__ void release() {
    if (read == 0) return;
    const bool has_read = (seen & none) == 0;
    for (int i = 0; i < read; ++i) {
      if (has_read) barrier_arrive(shared_address(&common.empty[freed.slot]));
      freed.next(slots);
    }
    read = 0;
    seen = 0;
  }
  /// Step `step` of a half of a tile: rows of the weight as they lie in the next buffer.
  template <int kStage>
  __device__ __forceinline__ uint4 load(int tile, int half, int step) {
    constexpr int kPart = Z::part(kStage);
    if (step % kPart == 0) wait();
    const int row = lane / 4;
    uint4 w = {};
    if (row < Z::rows(kStage, tile, half))
      w = *reinterpret_cast<const uint4*>(buffer() + row * Z::pitch(kStage) * 2 + lane % 4 * 16 +
                                          warp * kStep * 2 + step % kPart * kUnit * 2);
    seen |= w.x;
    if (step % kPart == kPart - 1 || step == Z::steps(kStage) - 1) next();
    return w;
  }
  template <int kStage, int kMost>
  __device__ __forceinline__ void hold(Held<Z, kStage, kMost>& held) {
    using H = Held<Z, kStage, kMost>;
#pragma unroll
    for (int i = 0; i < H::kCount; ++i) {
      const int buffer = i % H::kTile / H::kPart;
      held.w[i] = load<kStage>(i / H::kTile, buffer % H::kHalves,
                               buffer / H::kHalves * H::kPart + i % H::kPart);
    }
    release();
  }
  /// Step `step` of a half of a tile, if it is not held.
  template <int kStage, int kMost>
  __device__ __forceinline__ uint4 take(const Held<Z, kStage, kMost>& held, int tile, int half,
                                        int step) {
    using H = Held<Z, kStage, kMost>;
    const int i = H::index(tile, half, step);
    return i < H::kCount ? held.w[i < H::kCount ? i : 0] : load<kStage>(tile, half, step);
  }
};

__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<bf16>(v));
}
__device__ __forceinline__ float low(std::uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high(std::uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000U);
}
/// In pairs, which is a shorter chain than one after the other.
__device__ __forceinline__ float sum_of(const float (&v)[kWarps]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}
/// Barrier of the warps that compute.
__device__ __forceinline__ void sync() {
  group_wait(kComputers, kThreads);
}

/// Window and taps of a channel of a sequence.
struct Window {
  float4 values;
  uint2 taps;
  bf16 bias;

  /// Channel c, whose window is at `at`.
  __device__ __forceinline__ void load(const Layer& l, int c, std::int64_t at) {
    values = *reinterpret_cast<const float4*>(l.conv_state + at);
    taps = reinterpret_cast<const uint2*>(l.conv_weight)[c];
    bias = l.conv_bias != nullptr ? l.conv_bias[c] : from_float<bf16>(0.0F);
  }
  /// Moves the window on.
  __device__ __forceinline__ float convolve(float newest) {
    values = make_float4(values.y, values.z, values.w, newest);
    float sum = fmaf(low(taps.x), values.x, to_float(bias));
    sum = fmaf(high(taps.x), values.y, sum);
    sum = fmaf(low(taps.y), values.z, sum);
    sum = fmaf(high(taps.y), newest, sum);
    return rounded(sum * conv::gate(sum));
  }
};

/// Over the lanes of a channel, in every one of them.
__device__ __forceinline__ float lane_sum(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    v += __shfl_xor_sync(0xFFFFFFFFU, v, offset);
  return v;
}
/// A log2(e) from A_log.
__device__ __forceinline__ void rates(float4& A) {
  A.x = -expf(A.x) * selective::kLog2e;
  A.y = -expf(A.y) * selective::kLog2e;
  A.z = -expf(A.z) * selective::kLog2e;
  A.w = -expf(A.w) * selective::kLog2e;
}
/// One state: h = exp(delta A) h + delta u B, and C h.
__device__ __forceinline__ float advance(float& h, float rate, float delta, float drive, float B,
                                         float C) {
  h = fmaf(selective::decay(delta, rate), h, drive * B);
  return C * h;
}
/// The states of a lane, and its part of the output.
__device__ __forceinline__ float advance(float4& h, const float4& A, float delta, float u,
                                         const float4& B, const float4& C) {
  const float drive = delta * u;
  return (advance(h.x, A.x, delta, drive, B.x, C.x) + advance(h.y, A.y, delta, drive, B.y, C.y)) +
         (advance(h.z, A.z, delta, drive, B.z, C.z) + advance(h.w, A.w, delta, drive, B.w, C.w));
}

#endif

// --- host --------------------------------------------------------------------------------------

inline Layer pointers(const MambaStackLayer& l) {
  return {.weights = {l.in_proj.data<bf16>(), l.x_proj.data<bf16>(), l.out_proj.data<bf16>()},
          .norm_weight = l.norm_weight.data<float>(),
          .conv_weight = l.conv_weight.data<bf16>(),
          .conv_bias = l.conv_bias ? l.conv_bias.data<bf16>() : nullptr,
          .dt_weight = l.dt_weight.data<bf16>(),
          .dt_bias = l.dt_bias.data<float>(),
          .A_log = l.A_log.data<float>(),
          .D = l.D.data<float>(),
          .conv_state = l.conv_state.data<float>(),
          .lrnn_state = l.lrnn_state.data<float>()};
}

/// Whether all blocks of the kernel run at the same time on the current device.
template <class Kernel>
bool fits(Kernel* kernel, int blocks) {
  int device = 0;
  int allowed = 0;
  int driver = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&allowed, cudaDevAttrCooperativeLaunch, device));
  LRNN_CUDA_CHECK(cudaDriverGetVersion(&driver));  // older ones take 4 KB of arguments
  cudaFuncAttributes attributes{};
  LRNN_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return allowed != 0 && multiprocessors() >= blocks && compute_capability() >= 90 &&
         attributes.ptxVersion >= 90 && (sizeof(Args) <= 4096 || driver >= 12010);
}

/// How blocks that run at the same time are launched, by clusters.
struct Launch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Launch(cudaStream_t stream, int blocks, int cluster, int shared) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = kAllThreads;
    config.dynamicSmemBytes = static_cast<std::size_t>(shared);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};
/// Whether so many clusters run at the same time: a device has multiprocessors that are of use to
/// none.
template <class Kernel>
bool clusters_fit(Kernel* kernel, const Launch& launch, int clusters) {
  int count = 0;
  LRNN_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config));
  return count >= clusters;
}

/// Takes all layers, numbered from `first_epoch`, kMaxLayers at most in a launch. The ring, of at
/// most `slots` buffers, lies `offset` bytes into shared memory; words() gives the exchange. False
/// if the device is another.
template <class Z, class Kernel, class Words>
bool step_layers(Context& ctx, const MambaStackStep& a, Kernel* kernel, int offset, int slots,
                 unsigned first_epoch, Words words) {
  Args p{};
  p.slots = std::min(slots, (shared_memory_per_block() - offset) / Z::kSlotBytes);
  if (p.slots < kMinSlots || !fits(kernel, Z::kBlocks)) return false;
  const int shared = offset + p.slots * Z::kSlotBytes;
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  const Launch launch(ctx.stream().handle, Z::kBlocks, Z::kCluster, shared);
  if (Z::kCluster > 1 && !clusters_fit(kernel, launch, Z::kBlocks / Z::kCluster)) return false;
  Tensor exchange = words();
  p.words = exchange.view().raw();
  p.batch = static_cast<int>(a.x.dim(0));
  p.eps = static_cast<float>(a.eps);
  p.narrow_residual = a.residual_out.dtype() == DType::bfloat16;
  p.y = a.y.data<bf16>();
  p.residual_out = a.residual_out.raw();
  const int count = static_cast<int>(a.layers.size());
  const int launches = (count + kMaxLayers - 1) / kMaxLayers;
  for (int i = 0; i < launches; ++i) {
    const int begin = count * i / launches;
    p.layer_count = count * (i + 1) / launches - begin;
    p.epoch = first_epoch + static_cast<unsigned>(begin);
    for (int j = 0; j < p.layer_count; ++j)
      p.layers[j] = pointers(a.layers[static_cast<std::size_t>(begin + j)]);
    p.x = i == 0 ? a.x.data<bf16>() : p.y;
    p.residual = i > 0 ? p.residual_out : a.residual ? a.residual.raw() : nullptr;
    LRNN_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, p));
  }
  return true;
}

/// One launch for up to 16 sequences (mamba_stack_rows.cu); false if the device is another.
bool step_rows(Context& ctx, const MambaStackStep& a);

}  // namespace lrnn::cuda::mamba_stack
