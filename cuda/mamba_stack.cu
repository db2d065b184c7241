// A stack of Mamba blocks, one token of a few sequences, in one cooperative launch.
//
// A block owns 1 / kBlocks of the channels of E (their rows of in_proj, convolution, scan) and of
// the rows of x_proj and out_proj, the same in every layer. A layer has four stages, between which
// every block needs what all the others have made: r (the residual sum), u, [q | B | C] and v.
// There is no barrier: every value goes to L2 beside the number of its layer, in one store, and
// whoever needs it asks for it until it has that number. One warp of a block does nothing but copy
// the weights, which it reads through a ring of buffers, as far ahead of the others as the ring
// reaches. The other kWarps multiply on tensor cores, weights as the left operand and the sequences
// as its few columns, each a part of the depth; they take the first weights of a stage before they
// ask for its input.
//
// A sum is cut by its depth alone: 32 of every 256 go to each warp. So the bits depend neither on
// the device nor on the number of sequences.
//
// One sequence on an H200, recorded: 48 layers of d_model 2048 in 0.76 ms, weights at 3.3 TB/s;
// bound by HBM next to the waiting. 24 layers of d_model 768 in 0.15 ms, bound by latency: an
// exchange takes about 1500 cycles, four of which are more than half of a layer's 10,400. Clusters
// that make x_dbl for themselves would save one, but 128 blocks do not fit into clusters of 8.
#include <algorithm>

#include "common/capability.cuh"
#include "common/causal_conv1d.cuh"
#include "common/reduce.cuh"
#include "common/selective_scan.cuh"
#include "common/wgmma.cuh"
#include "ops/mamba_stack_parts.hpp"

namespace lrnn::cuda {
namespace mamba_stack {
namespace {

constexpr int kBlocks = 128;
constexpr int kWarps = 8;  // that compute; one more copies
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;  // of a weight, in a product
constexpr int kStep = 32;      // depth of a step of a warp: two products
constexpr int kUnit = kStep * kWarps;
constexpr int kPad = 32;  // elements behind a row, so that two rows fill the banks
constexpr int kSlotBytes = kTileRows * (3 * kUnit + kPad) * 2;  // of the ring: 3 steps of a tile
constexpr int kMinSlots = 3;
constexpr int kStates = 4;  // of a lane
constexpr int kLanes = 4;   // of a channel
constexpr int kDState = kStates * kLanes;
constexpr int kWidth = 4;               // of the convolution
constexpr int kRankGroup = 4 * kLanes;  // weights of dt that the lanes of a channel read at a time
constexpr int kMaxLayers = 24;          // whose pointers are arguments

/// Products of a layer, in their order.
enum Stage { kIn, kXDbl, kOut, kStages };

/// Sizes of a model of d_model kInputs with the usual options.
template <int kInputs_>
struct Sizes {
  static constexpr int kInputs = kInputs_;
  static constexpr int kChannels = 2 * kInputs;
  static constexpr int kRank = kInputs / 16;
  static constexpr int kXDblRows = kRank + 2 * kDState;

  __host__ __device__ static constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
  __host__ __device__ static constexpr int all(int stage) {
    return stage == kIn ? kChannels : stage == kXDbl ? kXDblRows : kInputs;
  }
  __host__ __device__ static constexpr int lesser(int a, int b) { return a < b ? a : b; }
  /// Rows of a block.
  __host__ __device__ static constexpr int own(int stage) { return ceil_div(all(stage), kBlocks); }
  __host__ __device__ static constexpr int depth(int stage) {
    return stage == kIn ? kInputs : kChannels;
  }
  __host__ __device__ static constexpr int steps(int stage) { return depth(stage) / kUnit; }
  /// Tiles of rows; in kIn those of u and z take turns.
  __host__ __device__ static constexpr int tiles(int stage) {
    return ceil_div(own(stage), kTileRows) * (stage == kIn ? 2 : 1);
  }
  __host__ __device__ static constexpr int first_row(int stage, int tile) {
    return (stage == kIn ? tile / 2 : tile) * kTileRows;
  }
  __host__ __device__ static constexpr int rows(int stage, int tile) {
    return lesser(kTileRows, own(stage) - first_row(stage, tile));
  }
  /// Steps that a buffer of the ring takes.
  __host__ __device__ static constexpr int part(int stage) {
    const int rows = lesser(kTileRows, own(stage));
    return lesser(steps(stage), (kSlotBytes / rows / 2 - kPad) / kUnit);
  }
  __host__ __device__ static constexpr int pitch(int stage) { return part(stage) * kUnit + kPad; }
  static_assert(kInputs % kUnit == 0 && kRank % kRankGroup == 0 && kChannels % (4 * kBlocks) == 0 &&
                kInputs % kBlocks == 0 && kXDblRows % own(kXDbl) == 0);
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

/// A value and the number of the layer that it belongs to.
using Word = std::uint64_t;

struct Args {
  Layer layers[kMaxLayers];
  int layer_count;
  unsigned epoch;  // number of the first layer
  int batch;
  int slots;
  float eps;
  bool narrow_residual;
  const bf16* x;
  const void* residual;  // or null
  bf16* y;
  void* residual_out;
  Word* words;  // of the exchange
};

/// What blocks exchange: words of kRows sequences.
template <class Z, int kRows>
struct Exchange {
  static constexpr int r = 0;                                 // [B, H], float32
  static constexpr int u = r + kRows * Z::kInputs;            // [B, E / 2], pairs
  static constexpr int v = u + kRows * Z::kChannels / 2;      // [B, E / 2], pairs
  static constexpr int x_dbl = v + kRows * Z::kChannels / 2;  // [B, R + 2 N], float32
  static constexpr int kWords = x_dbl + kRows * Z::kXDblRows;
};

/// Shared memory of a block, before the ring.
template <class Z, int kRows>
struct Shared {
  static constexpr int kMaxSlots = 16;

  alignas(128) bf16 operand[kRows][Z::kChannels + kPad];
  bf16 normal[kRows][Z::kInputs + kPad];
  float partials[2][2][kWarps][kRows][kTileRows];
  float x_dbl[kRows][Z::kXDblRows];
  float u[kRows][Z::own(kIn)];
  float gate[kRows][Z::own(kIn)];
  float residual[kRows][Z::own(kOut)];
  alignas(16) float squares[kRows][kWarps];
  Layer layers[kMaxLayers];
  std::uint64_t full[kMaxSlots];
  std::uint64_t empty[kMaxSlots];
};
template <class Z, int kRows>
constexpr int kRingOffset = (static_cast<int>(sizeof(Shared<Z, kRows>)) + 127) / 128 * 128;

#if __CUDA_ARCH__ >= 900

constexpr int kMostAhead = 8;  // pairs of words that a thread asks for at a time
constexpr int kHeldSteps = 6;  // of a stage, whose weights wait in registers
constexpr int kComputers = 1;  // barrier of the warps that compute

__device__ __forceinline__ void publish(Word* to, std::uint32_t value, unsigned epoch) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to),
               "l"(static_cast<Word>(epoch) << 32 | value)
               : "memory");
}
/// Two words, if `wanted`, without a branch that would split the loads around it.
__device__ __forceinline__ void load_words(bool wanted, const Word* from, Word& first,
                                           Word& second) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\n"
      "@p ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];\n}"
      : "+l"(first), "+l"(second)
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
}

/// Calls use(j, first value, second value) for the pairs of words at(j), j < kCount, null ones left
/// out, as soon as they belong to `epoch`.
template <int kCount, class At, class Use>
__device__ __forceinline__ void gather(unsigned epoch, At at, Use use) {
  const Word* from[kCount];
  Word v[kCount][2] = {};
#pragma unroll
  for (int j = 0; j < kCount; ++j) from[j] = at(j);
  // What is there is not asked for again: waiting must not slow down the weights on their way.
  bool wanted[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) wanted[j] = from[j] != nullptr;
  bool missing = true;
#pragma unroll 1
  while (missing) {
    missing = false;
#pragma unroll
    for (int j = 0; j < kCount; ++j) load_words(wanted[j], from[j], v[j][0], v[j][1]);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      wanted[j] = wanted[j] && (static_cast<unsigned>(v[j][0] >> 32) != epoch ||
                                static_cast<unsigned>(v[j][1] >> 32) != epoch);
      missing |= wanted[j];
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    if (from[j] != nullptr)
      use(j, static_cast<std::uint32_t>(v[j][0]), static_cast<std::uint32_t>(v[j][1]));
}

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

// --- the warp that copies ----------------------------------------------------------------------

template <class Z, int kRows>
struct Copier {
  const Args& p;
  Shared<Z, kRows>& s;
  std::uint32_t ring;
  int lane;
  Place place;

  template <int kStage>
  __device__ __forceinline__ void copy(const bf16* weight, int rows) {
    constexpr int kPart = Z::part(kStage) * kUnit;
    constexpr int kDepth = Z::depth(kStage);
    weight += static_cast<std::int64_t>(lane) * kDepth;
#pragma unroll 1
    for (int k = 0; k < kDepth; k += kPart) {
      const int columns = min(kPart, kDepth - k);
      const std::uint32_t full = shared_address(&s.full[place.slot]);
      barrier_wait(shared_address(&s.empty[place.slot]), place.turn ^ 1);
      if (lane == 0) barrier_expect(full, rows * columns * 2);
      __syncwarp();
      if (lane < rows)
        copy_bytes(ring + static_cast<std::uint32_t>(place.slot * kSlotBytes +
                                                     lane * Z::pitch(kStage) * 2),
                   weight + k, columns * 2, full);
      place.next(p.slots);
    }
  }
  template <int kStage>
  __device__ __forceinline__ void copy(const Layer& l) {
    const int first = static_cast<int>(blockIdx.x) * Z::own(kStage);
    if (first >= Z::all(kStage)) return;
#pragma unroll 1
    for (int t = 0; t < Z::tiles(kStage); ++t) {
      const int row =
          first + Z::first_row(kStage, t) + (kStage == kIn && t % 2 != 0 ? Z::kChannels : 0);
      copy<kStage>(l.weights[kStage] + static_cast<std::int64_t>(row) * Z::depth(kStage),
                   Z::rows(kStage, t));
    }
  }
  __device__ __forceinline__ void prefetch(const void* from, int bytes) const {
    for (int at = lane * 128; at < bytes; at += 32 * 128)
      prefetch_to_l2(static_cast<const char*>(from) + at);
  }
  /// The small operands of a layer, which the others read by themselves.
  __device__ __forceinline__ void prefetch_channels(const Layer& l) const {
    constexpr int kOwn = Z::own(kIn);
    const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kOwn;
    prefetch(l.norm_weight, Z::kInputs * 4);
    prefetch(l.conv_weight + c * kWidth, kOwn * kWidth * 2);
    prefetch(l.dt_weight + c * Z::kRank, kOwn * Z::kRank * 2);
    prefetch(l.A_log + c * kDState, kOwn * kDState * 4);
    if (lane == 0) {
      if (l.conv_bias != nullptr) prefetch_to_l2(l.conv_bias + c);
      prefetch_to_l2(l.dt_bias + c);
      prefetch_to_l2(l.D + c);
    }
    for (int n = 0; n < p.batch; ++n) {
      const std::int64_t channel = std::int64_t{n} * Z::kChannels + c;
      prefetch(l.conv_state + channel * kWidth, kOwn * kWidth * 4);
      prefetch(l.lrnn_state + channel * kDState, kOwn * kDState * 4);
    }
  }
  __device__ __forceinline__ void run() {
    prefetch_channels(s.layers[0]);
#pragma unroll 1
    for (int i = 0; i < p.layer_count; ++i) {
      copy<kIn>(s.layers[i]);
      copy<kXDbl>(s.layers[i]);
      copy<kOut>(s.layers[i]);
      if (i + 1 < p.layer_count) prefetch_channels(s.layers[i + 1]);
    }
  }
};

// --- the warps that compute --------------------------------------------------------------------

/// Window and taps of a channel of a sequence, as they come from memory.
struct Window {
  float4 values;
  uint2 taps;
  bf16 bias;
};

/// Parameters and states of a channel of a sequence that a lane has.
template <class Z>
struct ScanLane {
  static constexpr int kGroups = Z::kRank / kRankGroup;

  float4 h, A;
  uint2 dt_weight[kGroups];
  float dt_bias, D;
};

/// batch <= kRows.
template <class Z, int kRows>
struct Computer {
  using To = Exchange<Z, kRows>;
  static constexpr int kChannels = Z::own(kIn);
  static constexpr int kOutputs = Z::own(kOut);

  const Args& p;
  Shared<Z, kRows>& s;
  const char* ring;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int batch = kRows == 1 ? 1 : p.batch;
  const int first_channel = static_cast<int>(blockIdx.x) * kChannels;
  const int first_output = static_cast<int>(blockIdx.x) * kOutputs;
  Place place = {};
  int turn = 0;  // of the two sets of partial sums

  __device__ __forceinline__ static float rounded(float v) { return to_float(from_float<bf16>(v)); }
  __device__ __forceinline__ static float low(std::uint32_t pair) {
    return __uint_as_float(pair << 16);
  }
  __device__ __forceinline__ static float high(std::uint32_t pair) {
    return __uint_as_float(pair & 0xFFFF0000U);
  }
  __device__ __forceinline__ static void sync() { group_wait(kComputers, kThreads); }

  // --- products ------------------------------------------------------------------------------
  // A step of a warp is two products of depth 16. Lane 4 g + c has 8 neighbours in depth, 8 c on,
  // of rows g and g + 8 of the weight and of sequence g: the order within a step is free.

  struct Weights {
    uint4 upper, lower;
  };
  /// Step `unit` of a stage, counted over its tiles, from the ring.
  template <int kStage>
  __device__ __forceinline__ void load(Weights& w, int unit) {
    constexpr int kSteps = Z::steps(kStage);
    constexpr int kPart = Z::part(kStage);
    const int rows = Z::rows(kStage, unit / kSteps);
    const int step = unit % kSteps;
    if (step % kPart == 0) barrier_wait(shared_address(&s.full[place.slot]), place.turn);
    const int row = lane / 4;
    const char* const from = ring + place.slot * kSlotBytes + row * Z::pitch(kStage) * 2 +
                             lane % 4 * 16 + warp * kStep * 2 + step % kPart * kUnit * 2;
    w = {};
    if (row < rows) w.upper = *reinterpret_cast<const uint4*>(from);
    if (rows > 8 && row + 8 < rows)
      w.lower = *reinterpret_cast<const uint4*>(from + 8 * Z::pitch(kStage) * 2);
    if (step % kPart != kPart - 1 && step != kSteps - 1) return;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.empty[place.slot]));
    place.next(p.slots);
  }
  __device__ __forceinline__ static void multiply(float (&c)[2][4], const Weights& w, uint4 x) {
    const std::uint32_t first[4] = {w.upper.x, w.lower.x, w.upper.y, w.lower.y};
    const std::uint32_t second[4] = {w.upper.z, w.lower.z, w.upper.w, w.lower.w};
    multiply_add(c[0], first, x.x, x.y);
    multiply_add(c[1], second, x.z, x.w);
  }
  /// Sums of this warp's part of a tile, to shared memory.
  __device__ __forceinline__ void store(const float (&c)[2][4], int which) {
    float (&to)[kRows][kTileRows] = s.partials[turn][which][warp];
    const int row = lane / 4;
    const int column = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (column + j < kRows) {
        to[column + j][row] = c[0][j] + c[1][j];
        to[column + j][row + 8] = c[0][j + 2] + c[1][j + 2];
      }
  }
  /// Row of a tile and sequence whose sum this thread finishes: the first half of the threads in
  /// the first of two tiles.
  [[nodiscard]] __device__ __forceinline__ int tile_row() const { return thread % kTileRows; }
  [[nodiscard]] __device__ __forceinline__ int sequence() const {
    return thread / kTileRows % (kThreads / 2 / kTileRows);
  }
  [[nodiscard]] __device__ __forceinline__ int which() const { return thread / (kThreads / 2); }
  __device__ __forceinline__ float finished() const {
    float parts[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      parts[w] = s.partials[turn][which()][w][sequence()][tile_row()];
    return sum_of(parts);
  }
  /// In pairs, which is a shorter chain than one after the other.
  __device__ __forceinline__ static float sum_of(const float (&v)[kWarps]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }

  template <int kStage>
  static constexpr int kUnits = Z::tiles(kStage) * Z::steps(kStage);
  template <int kStage>
  static constexpr int kHeld = Z::lesser(kHeldSteps, kUnits<kStage>);

  /// All products of a stage. take() brings their operand, of rows `pitch` elements apart;
  /// finish(t) gets tiles t and t + 1.
  template <int kStage, class Take, class Finish>
  __device__ __forceinline__ void products(const bf16* operand, Take take, Finish finish) {
    constexpr int kSteps = Z::steps(kStage);
    constexpr int kTiles = Z::tiles(kStage);
    Weights held[kHeld<kStage>];
#pragma unroll
    for (int i = 0; i < kHeld<kStage>; ++i) load<kStage>(held[i], i);
    take();
    const bf16* const x =
        operand + lane / 4 * (Z::depth(kStage) + kPad) + lane % 4 * 8 + warp * kStep;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float c[2][4] = {};
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int unit = t * kSteps + i;
        uint4 right = {};
        if (lane / 4 < batch) right = *reinterpret_cast<const uint4*>(x + i * kUnit);
        if (unit < kHeld<kStage>) {
          multiply(c, held[unit < kHeld<kStage> ? unit : 0], right);
        } else {
          Weights w;
          load<kStage>(w, unit);
          multiply(c, w, right);
        }
      }
      store(c, t % 2);
      if (t % 2 == 0 && t + 1 < kTiles) continue;
      sync();
      finish(t / 2 * 2);
      turn ^= 1;
    }
  }

  // --- r -> u, z -----------------------------------------------------------------------------
  // The factor 1 / rms of a row is that of its products, which therefore need not wait for it: what
  // is rounded is r weight. Thread t has the pairs t, t + kThreads, ... of every row.

  /// r weight of all rows, and sums of the squares of r.
  __device__ __forceinline__ void take_r(const Layer& l, unsigned epoch) {
    constexpr int kPairs = Z::kInputs / 2;
    constexpr int kPerThread = Z::ceil_div(kPairs, kThreads);
    const auto* const norm_weight = reinterpret_cast<const float2*>(l.norm_weight);
    float2 weights[kPerThread];
    float squares[kRows] = {};
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (thread + i * kThreads < kPairs) weights[i] = norm_weight[thread + i * kThreads];
    constexpr int kAhead = Z::lesser(kPerThread, Z::ceil_div(kMostAhead, kRows));
#pragma unroll
    for (int first = 0; first < kPerThread; first += kAhead)
      gather<kAhead * kRows>(
          epoch,
          [&](int j) -> const Word* {
            const int pair = thread + (first + j / kRows) * kThreads;
            const int n = j % kRows;
            const bool exists = pair < kPairs && n < batch;
            return exists ? p.words + To::r + n * Z::kInputs + 2 * pair : nullptr;
          },
          [&](int j, std::uint32_t one, std::uint32_t two) {
            const float2 r = make_float2(__uint_as_float(one), __uint_as_float(two));
            const float2 w = weights[first + j / kRows];
            const int n = j % kRows;
            *reinterpret_cast<std::uint32_t*>(
                &s.normal[n][2 * (thread + (first + j / kRows) * kThreads)]) =
                pack_bf16(r.x * w.x, r.y * w.y);
            squares[n] = fmaf(r.y, r.y, fmaf(r.x, r.x, squares[n]));
          });
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      squares[n] = warp_sum(squares[n]);
      if (lane == 0) s.squares[n][warp] = squares[n];
    }
    sync();
  }
  /// 1 / rms of this thread's sequence.
  __device__ __forceinline__ float rstd() const {
    float parts[kWarps];
    load_vec<float, 4>(s.squares[sequence()], *reinterpret_cast<float (*)[4]>(parts));
    load_vec<float, 4>(s.squares[sequence()] + 4, *reinterpret_cast<float (*)[4]>(parts + 4));
    return rsqrtf(fmaf(sum_of(parts), 1.0F / Z::kInputs, p.eps));
  }
  [[nodiscard]] __device__ __forceinline__ std::int64_t window_of(int own) const {
    return (sequence() * std::int64_t{Z::kChannels} + first_channel + own) * kWidth;
  }
  [[nodiscard]] __device__ __forceinline__ bool finishes(int own, int count) const {
    return own < count && sequence() < batch;
  }
  __device__ __forceinline__ void load(Window& w, const Layer& l, int own) const {
    if (which() != 0 || !finishes(own, kChannels)) return;
    const int c = first_channel + own;
    w.values = *reinterpret_cast<const float4*>(l.conv_state + window_of(own));
    w.taps = reinterpret_cast<const uint2*>(l.conv_weight)[c];
    w.bias = l.conv_bias != nullptr ? l.conv_bias[c] : from_float<bf16>(0.0F);
  }
  /// Moves the window on.
  __device__ __forceinline__ static float convolve(Window& w, float newest) {
    w.values = make_float4(w.values.y, w.values.z, w.values.w, newest);
    float sum = fmaf(low(w.taps.x), w.values.x, to_float(w.bias));
    sum = fmaf(high(w.taps.x), w.values.y, sum);
    sum = fmaf(low(w.taps.y), w.values.z, sum);
    sum = fmaf(high(w.taps.y), newest, sum);
    return rounded(sum * conv::gate(sum));
  }
  /// Channels `own` and the next one of a sequence.
  __device__ __forceinline__ void publish_pair(int to, int n, int own, float mine, float next,
                                               unsigned epoch) const {
    publish(p.words + to + (n * Z::kChannels + first_channel + own) / 2, pack_bf16(mine, next),
            epoch);
  }
  __device__ __forceinline__ void finish_in(Window& w, const Layer& l, int own,
                                            unsigned epoch) const {
    if (sequence() >= kRows) return;  // whole warps, or half of one for one sequence
    const bool exists = finishes(own, kChannels);
    const float v = rounded(finished() * rstd());
    if (which() != 0) {
      if (exists) s.gate[sequence()][own] = v * selective::fast_sigmoid(v);
      return;
    }
    float u = 0.0F;
    if (exists) u = convolve(w, v);
    const float next = __shfl_down_sync(kRows == 1 ? 0xFFFFU : 0xFFFFFFFFU, u, 1);
    if (!exists) return;
    if (own % 2 == 0) publish_pair(To::u, sequence(), own, u, next, epoch);
    s.u[sequence()][own] = u;
    *reinterpret_cast<float4*>(l.conv_state + window_of(own)) = w.values;
  }
  __device__ __forceinline__ void in_proj(const Layer& l, unsigned epoch) {
    Window window{};
    load(window, l, tile_row());
    products<kIn>(
        s.normal[0], [&] { take_r(l, epoch); },
        [&](int t) {
          const int own = t / 2 * kTileRows + tile_row();
          finish_in(window, l, own, epoch);
          load(window, l, own + kTileRows);
        });
  }

  // --- u -> x_dbl, v -> r ----------------------------------------------------------------------

  /// What others have published of u or v, as the right operand of a product.
  __device__ __forceinline__ void take_operand(int offset, unsigned epoch) const {
    constexpr int kPairs = Z::kChannels / 4;
    constexpr int kPerThread = Z::ceil_div(kPairs, kThreads);
    constexpr int kAhead = Z::lesser(kPerThread, Z::ceil_div(kMostAhead, kRows));
#pragma unroll
    for (int first = 0; first < kPerThread; first += kAhead)
      gather<kAhead * kRows>(
          epoch,
          [&](int j) -> const Word* {
            const int pair = thread + (first + j / kRows) * kThreads;
            const int n = j % kRows;
            const bool exists = pair < kPairs && n < batch;
            return exists ? p.words + offset + n * (Z::kChannels / 2) + 2 * pair : nullptr;
          },
          [&](int j, std::uint32_t one, std::uint32_t two) {
            *reinterpret_cast<uint2*>(
                &s.operand[j % kRows][4 * (thread + (first + j / kRows) * kThreads)]) =
                make_uint2(one, two);
          });
    sync();
  }
  __device__ __forceinline__ void x_proj(const Layer&, unsigned epoch) {
    constexpr int kOwn = Z::own(kXDbl);
    const int first = static_cast<int>(blockIdx.x) * kOwn;
    if (first >= Z::kXDblRows) return;
    products<kXDbl>(
        s.operand[0], [&] { take_operand(To::u, epoch); },
        [&](int t) {
          const int own = (t + which()) * kTileRows + tile_row();
          if (!finishes(own, kOwn)) return;
          publish(p.words + To::x_dbl + sequence() * Z::kXDblRows + first + own,
                  __float_as_uint(rounded(finished())), epoch);
        });
  }
  /// r = x + residual: to the others, and as it is stored.
  __device__ __forceinline__ void add_residual(int own, int n, float x, float before,
                                               unsigned epoch) const {
    const float r = x + before;
    publish(p.words + To::r + n * Z::kInputs + first_output + own, __float_as_uint(r), epoch);
    s.residual[n][own] = p.narrow_residual ? rounded(r) : r;
  }
  __device__ __forceinline__ void enter() const {
    for (int i = thread; i < batch * kOutputs; i += kThreads) {
      const int n = i / kOutputs;
      const int own = i % kOutputs;
      const std::int64_t at = std::int64_t{n} * Z::kInputs + first_output + own;
      float before = 0.0F;
      if (p.residual != nullptr)
        before = p.narrow_residual ? to_float(static_cast<const bf16*>(p.residual)[at])
                                   : static_cast<const float*>(p.residual)[at];
      add_residual(own, n, to_float(p.x[at]), before, p.epoch);
    }
  }
  __device__ __forceinline__ void leave(int own, int n, float x) const {
    const std::int64_t at = std::int64_t{n} * Z::kInputs + first_output + own;
    p.y[at] = from_float<bf16>(x);
    if (p.narrow_residual)
      static_cast<bf16*>(p.residual_out)[at] = from_float<bf16>(s.residual[n][own]);
    else
      static_cast<float*>(p.residual_out)[at] = s.residual[n][own];
  }
  __device__ __forceinline__ void out_proj(bool last, unsigned epoch) {
    products<kOut>(
        s.operand[0], [&] { take_operand(To::v, epoch); },
        [&](int t) {
          const int own = (t + which()) * kTileRows + tile_row();
          if (!finishes(own, kOutputs)) return;
          const float x = rounded(finished());
          if (last)
            leave(own, sequence(), x);
          else
            add_residual(own, sequence(), x, s.residual[sequence()][own], epoch + 1);
        });
  }

  // --- x_dbl -> v ----------------------------------------------------------------------------
  // kLanes lanes have a channel of a sequence.

  static constexpr int kItems = kThreads / kLanes;  // at a time

  /// The state of this lane of item i.
  [[nodiscard]] __device__ __forceinline__ std::int64_t state_of(int i) const {
    return (i / kChannels * std::int64_t{Z::kChannels} + first_channel + i % kChannels) * kDState +
           thread % kLanes * kStates;
  }
  __device__ __forceinline__ void load(ScanLane<Z>& a, const Layer& l, int i) const {
    if (i >= batch * kChannels) return;
    const int c = first_channel + i % kChannels;
    a.h = *reinterpret_cast<const float4*>(l.lrnn_state + state_of(i));
    a.A = reinterpret_cast<const float4*>(l.A_log)[c * kLanes + thread % kLanes];
    const auto* const w =
        reinterpret_cast<const uint2*>(l.dt_weight + std::int64_t{c} * Z::kRank) + thread % kLanes;
#pragma unroll
    for (int k = 0; k < ScanLane<Z>::kGroups; ++k) a.dt_weight[k] = w[k * kLanes];
    a.dt_bias = l.dt_bias[c];
    a.D = l.D[c];
  }
  /// Over the lanes of a channel, in every one of them.
  __device__ __forceinline__ static float lane_sum(float v) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      v += __shfl_xor_sync(0xFFFFFFFFU, v, offset);
    return v;
  }
  __device__ __forceinline__ float project_dt(const ScanLane<Z>& a, const float* x_dbl) const {
    const float4* const q = reinterpret_cast<const float4*>(x_dbl) + thread % kLanes;
    float sums[2] = {};
#pragma unroll
    for (int k = 0; k < ScanLane<Z>::kGroups; ++k) {
      const float4 v = q[k * kLanes];
      sums[0] = fmaf(low(a.dt_weight[k].x), v.x, sums[0]);
      sums[1] = fmaf(high(a.dt_weight[k].x), v.y, sums[1]);
      sums[0] = fmaf(low(a.dt_weight[k].y), v.z, sums[0]);
      sums[1] = fmaf(high(a.dt_weight[k].y), v.w, sums[1]);
    }
    return rounded(lane_sum(sums[0] + sums[1]));
  }
  /// One state: h = exp(delta A) h + delta u B, and C h.
  __device__ __forceinline__ static float advance(float& h, float rate, float delta, float drive,
                                                  float B, float C) {
    h = fmaf(selective::decay(delta, rate), h, drive * B);
    return C * h;
  }
  /// Moves a channel on by its token; the gated output.
  __device__ __forceinline__ float advance(ScanLane<Z>& a, int i) const {
    const int n = i < batch * kChannels ? i / kChannels : 0;
    const int own = i % kChannels;
    const float* const x_dbl = s.x_dbl[n];
    const float u = s.u[n][own];
    const float gate = s.gate[n][own];
    const float* const lane_x_dbl = x_dbl + thread % kLanes * kStates;
    const float4 B = *reinterpret_cast<const float4*>(lane_x_dbl + Z::kRank);
    const float4 C = *reinterpret_cast<const float4*>(lane_x_dbl + Z::kRank + kDState);
    const float delta = selective::softplus(project_dt(a, x_dbl) + a.dt_bias);
    const float drive = delta * u;
    const float y = (advance(a.h.x, a.A.x, delta, drive, B.x, C.x) +
                     advance(a.h.y, a.A.y, delta, drive, B.y, C.y)) +
                    (advance(a.h.z, a.A.z, delta, drive, B.z, C.z) +
                     advance(a.h.w, a.A.w, delta, drive, B.w, C.w));
    return rounded(fmaf(a.D, u, lane_sum(y)) * gate);
  }
  /// A log2(e) from A_log.
  __device__ __forceinline__ static void rates(float4& A) {
    A.x = -expf(A.x) * selective::kLog2e;
    A.y = -expf(A.y) * selective::kLog2e;
    A.z = -expf(A.z) * selective::kLog2e;
    A.w = -expf(A.w) * selective::kLog2e;
  }
  __device__ __forceinline__ void take_x_dbl(unsigned epoch) const {
    constexpr int kPairs = Z::kXDblRows / 2;
    static_assert(kPairs <= kThreads);
    gather<kRows>(
        epoch,
        [&](int n) -> const Word* {
          const bool exists = thread < kPairs && n < batch;
          return exists ? p.words + To::x_dbl + n * Z::kXDblRows + 2 * thread : nullptr;
        },
        [&](int n, std::uint32_t one, std::uint32_t two) {
          *reinterpret_cast<uint2*>(&s.x_dbl[n][2 * thread]) = make_uint2(one, two);
        });
    sync();
  }
  /// `a` has been loaded for the first item.
  __device__ __forceinline__ void scan(const Layer& l, ScanLane<Z>& a, unsigned epoch) const {
    rates(a.A);
    take_x_dbl(epoch);
    const int items = batch * kChannels;
#pragma unroll 1
    for (int first = 0;; first += kItems) {
      const int i = first + thread / kLanes;
      if (first + warp * (32 / kLanes) >= items) break;
      const float v = advance(a, i);
      const float next = __shfl_down_sync(0xFFFFFFFFU, v, kLanes);
      if (i < items && i % 2 == 0 && thread % kLanes == 0)
        publish_pair(To::v, i / kChannels, i % kChannels, v, next, epoch);
      if (i < items) *reinterpret_cast<float4*>(l.lrnn_state + state_of(i)) = a.h;
      if (first + kItems >= items) break;
      load(a, l, i + kItems);
      rates(a.A);
    }
  }

  __device__ __forceinline__ void run() {
    enter();
#pragma unroll 1
    for (int i = 0; i < p.layer_count; ++i) {
      const Layer& l = s.layers[i];
      const unsigned epoch = p.epoch + static_cast<unsigned>(i);
      in_proj(l, epoch);
      ScanLane<Z> scan_lane{};
      load(scan_lane, l, thread / kLanes);
      x_proj(l, epoch);
      scan(l, scan_lane, epoch);
      out_proj(i + 1 == p.layer_count, epoch);
    }
  }
};

/// By all threads of a block: pointers and barriers.
template <class Z, int kRows>
__device__ __forceinline__ void prepare(const Args& p, Shared<Z, kRows>& s) {
  constexpr int kWords = static_cast<int>(sizeof(p.layers) / sizeof(std::uint64_t));
  const auto* const from = reinterpret_cast<const std::uint64_t*>(p.layers);
  for (int i = static_cast<int>(threadIdx.x); i < kWords; i += static_cast<int>(blockDim.x))
    reinterpret_cast<std::uint64_t*>(s.layers)[i] = from[i];
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; ++i) {
      barrier_init(shared_address(&s.full[i]), 1);
      barrier_init(shared_address(&s.empty[i]), kWarps);
    }
    barrier_init_done();
  }
  __syncthreads();
}

#endif

template <class Z, int kRows>
__global__ __launch_bounds__(kThreads + 32, 1) void stack_kernel(const __grid_constant__ Args p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  auto& s = *reinterpret_cast<Shared<Z, kRows>*>(shared);
  const char* const ring = shared + kRingOffset<Z, kRows>;
  prepare(p, s);
  if (threadIdx.x >= kThreads)
    Copier<Z, kRows>{p, s, shared_address(ring), static_cast<int>(threadIdx.x) % 32, {}}.run();
  else
    Computer<Z, kRows>{p, s, ring}.run();
#endif
}

// --- host --------------------------------------------------------------------------------------

Layer pointers(const MambaStackLayer& l) {
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

int multiprocessors() {
  int device = 0;
  int count = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

/// Whether the sizes are those of Sizes<d_model>, in bfloat16.
bool usual(const MambaStackStep& a) {
  const MambaStackLayer& l = a.layers.front();
  const std::int64_t inputs = a.x.dim(1);
  return a.x.dtype() == DType::bfloat16 && l.A_log.dim(0) == 2 * inputs &&
         l.A_log.dim(1) == kDState && l.conv_weight.dim(1) == kWidth &&
         16 * l.dt_weight.dim(1) == inputs;
}
/// Whether all operands may be read 16 bytes at a time.
bool aligned(const MambaStackStep& a) {
  const auto allows = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return std::all_of(a.layers.begin(), a.layers.end(), [&](const MambaStackLayer& layer) {
    const Layer l = pointers(layer);
    return allows(l.weights[kIn]) && allows(l.weights[kXDbl]) && allows(l.weights[kOut]) &&
           allows(l.norm_weight) && allows(l.conv_weight) && allows(l.dt_weight) &&
           allows(l.A_log) && allows(l.conv_state) && allows(l.lrnn_state);
  });
}

/// Whether all blocks of the kernel run at the same time on the current device.
template <class Kernel>
bool fits(Kernel* kernel) {
  int device = 0;
  int allowed = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&allowed, cudaDevAttrCooperativeLaunch, device));
  cudaFuncAttributes attributes{};
  LRNN_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return allowed != 0 && multiprocessors() >= kBlocks && compute_capability() >= 90 &&
         attributes.ptxVersion >= 90;
}

template <class Kernel>
void launch(cudaStream_t stream, Kernel* kernel, int shared, const Args& p) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = kBlocks;
  config.blockDim = kThreads + 32;
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  LRNN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

template <class Z, int kRows>
bool step(Context& ctx, const MambaStackStep& a) {
  const auto kernel = stack_kernel<Z, kRows>;
  constexpr int kOffset = kRingOffset<Z, kRows>;
  Args p{};
  p.slots =
      std::min(Shared<Z, kRows>::kMaxSlots, (shared_memory_per_block() - kOffset) / kSlotBytes);
  if (p.slots < kMinSlots || !fits(kernel)) return false;
  const int shared = kOffset + p.slots * kSlotBytes;
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  // Cleared: no layer has number 0.
  constexpr std::int64_t kWords = Exchange<Z, kRows>::kWords;
  Tensor words = ctx.zeros(Shape{2 * kWords}, DType::float32);
  p.words = reinterpret_cast<Word*>(words.view().data<float>());
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
    p.epoch = 1 + static_cast<unsigned>(begin);
    for (int j = 0; j < p.layer_count; ++j)
      p.layers[j] = pointers(a.layers[static_cast<std::size_t>(begin + j)]);
    p.x = i == 0 ? a.x.data<bf16>() : p.y;
    p.residual = i > 0 ? p.residual_out : a.residual ? a.residual.raw() : nullptr;
    launch(ctx.stream().handle, kernel, shared, p);
  }
  return true;
}

template <class Z>
bool step_rows(Context& ctx, const MambaStackStep& a) {
  switch (a.x.dim(0)) {
    case 1:
      return step<Z, 1>(ctx, a);
    case 2:
      return step<Z, 2>(ctx, a);
    default:
      return false;  // for more the exchanges cost more than the launches
  }
}

bool step_together(Context& ctx, const MambaStackStep& a) {
  if (!usual(a) || !aligned(a)) return false;
  switch (a.x.dim(1)) {
    case 256:
      return step_rows<Sizes<256>>(ctx, a);
    case 768:
      return step_rows<Sizes<768>>(ctx, a);
    case 1024:
      return step_rows<Sizes<1024>>(ctx, a);
    case 1536:
      return step_rows<Sizes<1536>>(ctx, a);
    case 2048:
      return step_rows<Sizes<2048>>(ctx, a);
    default:
      return false;
  }
}

}  // namespace
}  // namespace mamba_stack

void mamba_stack_step(Context& ctx, const MambaStackStep& a) {
  if (!mamba_stack::step_together(ctx, a)) lrnn::detail::mamba_stack_by_parts(ctx, a);
}

}  // namespace lrnn::cuda
