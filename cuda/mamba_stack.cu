// A stack of Mamba blocks, one token of up to kMaxRows sequences, in one cooperative launch.
//
// A block owns kRows channels of E (their two rows of in_proj each, convolution, scan) and its share
// of the rows of x_proj and out_proj, the same in every layer. A layer has four stages, between
// which every block needs what all the others have made: r (the residual sum), u, [q | B | C] and v.
// There is no barrier: every value goes to L2 beside the number of its layer, in one store, and
// whoever needs it asks for it until it has that number. One warp of a block does nothing but copy
// the weights, which it reads through a ring of buffers, one to two layers ahead of the others or as
// far as the ring reaches. The other kWarps multiply on tensor cores, weights as the left operand
// and the sequences as its few columns, each a part of the depth, and keep what belongs to the
// channels of the block.
//
// A sum is cut by its depth alone: step i of 16 goes to warp i % kWarps. So the bits depend neither
// on the number of blocks nor on the number of sequences.
// Bound by the latency of the exchanges and of the stages for small layers, by HBM for large ones.
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

constexpr int kMaxRows = 8;  // sequences: columns of a product
constexpr int kWarps = 8;    // that compute; one more copies
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;                // of a weight, in a product
constexpr int kTileValues = kTileRows * kMaxRows;
constexpr int kStep = 16;                    // depth of a product
constexpr int kRound = kStep * kWarps;       // depth of a step of all warps
constexpr int kUnit = 2 * kRound;            // two rounds go side by side
constexpr int kPad = 8;                      // elements behind a row, so that rows differ in banks
constexpr int kSlotBytes = kTileRows * (768 + kPad) * 2;
constexpr int kMinSlots = 4;
constexpr int kMaxSlots = 32;
constexpr int kStates = 4;   // of a lane
constexpr int kLanes = 4;    // of a channel
constexpr int kDState = kStates * kLanes;
constexpr int kWidth = 4;    // of the convolution
[[maybe_unused]] constexpr int kHeldRank = 8;  // groups of kLanes * 4 weights of dt that a lane keeps
constexpr int kMaxLayers = 24;  // whose pointers are arguments
[[maybe_unused]] constexpr int kComputers = 1;   // barrier of the warps that compute

/// Pointers of one layer.
struct Layer {
  const float* norm_weight;
  const bf16* in_proj;
  const bf16* conv_weight;
  const bf16* conv_bias;  // or null
  const bf16* x_proj;
  const bf16* dt_weight;
  const float* dt_bias;
  const float* A_log;
  const float* D;
  const bf16* out_proj;
  float* conv_state;
  float* lrnn_state;
};

/// A value and the number of the layer that it belongs to, or two of each.
using Word = std::uint64_t;

/// What blocks exchange.
struct Exchange {
  Word* r;      // [B, H], float32
  Word* u;      // [B, E / 2], pairs
  Word* x_dbl;  // [B, R + 2 N], float32
  Word* v;      // [B, E / 2], pairs
};

struct Args {
  Layer layers[kMaxLayers];
  int layer_count;
  unsigned epoch;  // number of the first layer
  int batch, inputs, channels, rank;
  int own_channels, own_x_dbl, own_outputs;  // of a block; the last ones may have less
  int slots;
  float eps, per_input;  // 1 / inputs
  bool narrow_residual;
  const bf16* x;
  const void* residual;  // or null
  bf16* y;
  void* residual_out;
  Exchange to;

  [[nodiscard]] __host__ __device__ int x_dbl() const { return rank + 2 * kDState; }
};

/// Shared memory: the ring, then these arrays, then its barriers.
struct Layout {
  int operand, normal, partials, x_dbl, u, gate, residual, norm_sums, barriers, bytes;

  __host__ __device__ explicit Layout(const Args& p) {
    int at = p.slots * kSlotBytes;
    const auto take = [&at](int size) {
      const int begin = at;
      at += (size + 15) / 16 * 16;
      return begin;
    };
    operand = take(p.batch * (p.channels + kPad) * 2);
    normal = take(p.batch * (p.inputs + kPad) * 2);
    partials = take(4 * kWarps * kTileValues * 4);
    x_dbl = take(p.batch * p.x_dbl() * 4);
    u = take(p.batch * p.own_channels * 4);
    gate = take(p.batch * p.own_channels * 4);
    residual = take(p.batch * p.own_outputs * 4);
    norm_sums = take(kWarps * kMaxRows * 4);
    barriers = take(2 * p.slots * 8);
    bytes = at;
  }
};

/// Rows of a weight [.., depth].
struct Rows {
  const bf16* weight;
  int begin, count, depth;

  /// Depth that a buffer of the ring takes of up to kTileRows rows.
  [[nodiscard]] __host__ __device__ static int part(int rows, int depth) {
    const int fits = (kSlotBytes / rows / 2 - kPad) / kUnit * kUnit;
    return fits < depth ? fits : depth;
  }
};

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void publish(Word* to, std::uint32_t value, unsigned epoch) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to),
               "l"(static_cast<Word>(epoch) << 32 | value)
               : "memory");
}
__device__ __forceinline__ void load_words(const Word* from, Word& first, Word& second) {
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(first), "=l"(second)
               : "l"(from)
               : "memory");
}

/// Calls use(i, j, first value, second value) for the pairs of words at(i, j), i < count, null ones
/// left out, as soon as they belong to `epoch`. j = i % kAhead: so many are asked for at a time.
template <int kAhead, class At, class Use>
__device__ __forceinline__ void gather(int count, unsigned epoch, At at, Use use) {
  for (int first = 0; first < count; first += kAhead) {
    const Word* from[kAhead];
    Word v[kAhead][2];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) from[j] = first + j < count ? at(first + j, j) : nullptr;
    bool missing = true;
#ifdef LRNN_SPIN_LIMIT
    const long long start = clock64();
#endif
    while (missing) {
      missing = false;
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (from[j] != nullptr) load_words(from[j], v[j][0], v[j][1]);
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (from[j] != nullptr)
          missing |= static_cast<unsigned>(v[j][0] >> 32) != epoch ||
                     static_cast<unsigned>(v[j][1] >> 32) != epoch;
#ifdef LRNN_SPIN_LIMIT
      if (clock64() - start > 400000000LL) __trap();
#endif
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (from[j] != nullptr)
        use(first + j, j, static_cast<std::uint32_t>(v[j][0]), static_cast<std::uint32_t>(v[j][1]));
  }
}
/// Pairs of words from `words` on, shared out among the threads.
template <int kAhead, class Use>
__device__ __forceinline__ void gather_pairs(const Word* words, int pairs, unsigned epoch,
                                             Use use) {
  const int thread = static_cast<int>(threadIdx.x);
  gather<kAhead>(
      (pairs - thread + kThreads - 1) / kThreads, epoch,
      [&](int i, int) { return words + 2 * (thread + i * kThreads); },
      [&](int i, int, std::uint32_t one, std::uint32_t two) {
        use(thread + i * kThreads, one, two);
      });
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

/// What the threads of a block share.
struct Block {
  const Args& p;
  char* shared;
  Layout at;
  int first_channel, channels;  // of this block
  int first_x_dbl, x_dbl;
  int first_output, outputs;

  __device__ __forceinline__ Block(const Args& p, char* shared) : p(p), shared(shared), at(p) {
    const auto share = [](int own, int all, int& first, int& count) {
      first = min(static_cast<int>(blockIdx.x) * own, all);
      count = min(own, all - first);
    };
    share(p.own_channels, p.channels, first_channel, channels);
    share(p.own_x_dbl, p.x_dbl(), first_x_dbl, x_dbl);
    share(p.own_outputs, p.inputs, first_output, outputs);
  }
  template <class T>
  __device__ __forceinline__ T* array(int offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }
  __device__ __forceinline__ std::uint32_t full(int slot) const {
    return shared_address(shared + at.barriers) + static_cast<std::uint32_t>(16 * slot);
  }
  __device__ __forceinline__ std::uint32_t empty(int slot) const { return full(slot) + 8; }
  __device__ __forceinline__ void sync() const { group_wait(kComputers, kThreads); }

  /// Tile i of the rows of a stage.
  __device__ __forceinline__ static Rows tile(const bf16* weight, int first, int count, int i,
                                              int depth) {
    return {weight, first + i * kTileRows, min(kTileRows, count - i * kTileRows), depth};
  }
  __device__ __forceinline__ Rows u_tile(const Layer& l, int i) const {
    return tile(l.in_proj, first_channel, channels, i, p.inputs);
  }
  __device__ __forceinline__ Rows z_tile(const Layer& l, int i) const {
    Rows rows = u_tile(l, i);
    rows.begin += p.channels;
    return rows;
  }
  __device__ __forceinline__ Rows x_dbl_tile(const Layer& l, int i) const {
    return tile(l.x_proj, first_x_dbl, x_dbl, i, p.channels);
  }
  __device__ __forceinline__ Rows output_tile(const Layer& l, int i) const {
    return tile(l.out_proj, first_output, outputs, i, p.channels);
  }
};

// --- the warp that copies ----------------------------------------------------------------------

struct Copier {
  const Block& b;
  int lane;
  Place place;

  __device__ __forceinline__ void copy(const Rows& rows) {
    const int part = Rows::part(rows.count, rows.depth);
    for (int k = 0; k < rows.depth; k += part) {
      const int columns = min(part, rows.depth - k);
      const std::uint32_t full = b.full(place.slot);
      barrier_wait(b.empty(place.slot), place.turn ^ 1);
      if (lane == 0) barrier_expect(full, rows.count * columns * 2);
      __syncwarp();
      if (lane < rows.count)
        copy_bytes(shared_address(b.shared + place.slot * kSlotBytes + lane * (part + kPad) * 2),
                   rows.weight + static_cast<std::int64_t>(rows.begin + lane) * rows.depth + k,
                   columns * 2, full);
      place.next(b.p.slots);
    }
  }
  __device__ __forceinline__ void prefetch(const void* from, std::int64_t bytes) const {
    for (std::int64_t at = lane * 128; at < bytes; at += 32 * 128)
      prefetch_to_l2(static_cast<const char*>(from) + at);
  }
  /// The small operands of a layer, which the others read by themselves.
  __device__ __forceinline__ void prefetch_channels(const Layer& l) const {
    const std::int64_t c = b.first_channel;
    prefetch(l.norm_weight, b.p.inputs * 4);
    prefetch(l.conv_weight + c * kWidth, b.channels * kWidth * 2);
    prefetch(l.dt_weight + c * b.p.rank, b.channels * b.p.rank * 2);
    prefetch(l.A_log + c * kDState, b.channels * kDState * 4);
    if (lane == 0) {
      if (l.conv_bias != nullptr) prefetch_to_l2(l.conv_bias + c);
      prefetch_to_l2(l.dt_bias + c);
      prefetch_to_l2(l.D + c);
    }
    for (int n = 0; n < b.p.batch; ++n) {
      const std::int64_t channel = std::int64_t{n} * b.p.channels + c;
      prefetch(l.conv_state + channel * kWidth, b.channels * kWidth * 4);
      prefetch(l.lrnn_state + channel * kDState, b.channels * kDState * 4);
    }
  }
  __device__ __forceinline__ void run() {
    prefetch_channels(b.p.layers[0]);
    for (int i = 0; i < b.p.layer_count; ++i) {
      const Layer& l = b.p.layers[i];
      if (i + 1 < b.p.layer_count) prefetch_channels(b.p.layers[i + 1]);
      for (int t = 0; t * kTileRows < b.channels; ++t) {
        copy(b.u_tile(l, t));
        copy(b.z_tile(l, t));
      }
      for (int t = 0; t * kTileRows < b.x_dbl; ++t) copy(b.x_dbl_tile(l, t));
      for (int t = 0; t * kTileRows < b.outputs; ++t) copy(b.output_tile(l, t));
    }
  }
};

// --- the warps that compute --------------------------------------------------------------------

/// Window and taps of a channel of a sequence.
struct Window {
  float values[kWidth];
  float taps[kWidth];
  float bias;
};

/// Parameters and states of a channel of a sequence that a lane has.
struct ScanLane {
  float h[kStates];
  float A[kStates];
  uint2 dt_weight[kHeldRank];
  float dt_bias, D;
};

/// kRows: sequences for which registers are kept; batch <= kRows.
template <int kRows>
struct Computer {
  const Block& b;
  const Args& p = b.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  Place place;
  int turn = 0;  // of the two sets of partial sums

  /// Sums of this warp's part of a tile, to shared memory.
  __device__ __forceinline__ void multiply(const Rows& rows, const bf16* x, float* partials) {
    const int part = Rows::part(rows.count, rows.depth);
    const int pitch = rows.depth + kPad;
    float c[2][4] = {};
    const bf16* const x_lane =
        x + min(lane % 8, p.batch - 1) * pitch + lane / 16 * kRound + lane / 8 % 2 * 8 + warp * kStep;
    const int w_lane =
        min(lane % 16, rows.count - 1) * (part + kPad) + lane / 16 * 8 + warp * kStep;
    for (int k = 0; k < rows.depth; k += part) {
      const int columns = min(part, rows.depth - k);
      const bf16* const w =
          reinterpret_cast<const bf16*>(b.shared + place.slot * kSlotBytes) + w_lane;
      barrier_wait(b.full(place.slot), place.turn);
#pragma unroll 2
      for (int i = 0; i < columns; i += kUnit) {
        std::uint32_t right[4];
        std::uint32_t left[2][4];
        load_matrices(right, x_lane + k + i);
        load_matrices(left[0], w + i);
        load_matrices(left[1], w + i + kRound);
        multiply_add(c[0], left[0], right[0], right[1]);
        multiply_add(c[1], left[1], right[2], right[3]);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(b.empty(place.slot));
      place.next(p.slots);
    }
    float* const to = partials + warp * kTileValues + lane / 4 * kMaxRows + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(c[0][0] + c[1][0], c[0][1] + c[1][1]);
    *reinterpret_cast<float2*>(to + 8 * kMaxRows) =
        make_float2(c[0][2] + c[1][2], c[0][3] + c[1][3]);
  }
  /// Partial sums of tile `which` of two.
  __device__ __forceinline__ float* partials(int which) const {
    return b.template array<float>(b.at.partials) + (2 * turn + which) * kWarps * kTileValues;
  }
  /// The sum of this thread's place in a tile, times `factor`, rounded: row thread / 8 % 16, sequence
  /// thread % 8.
  __device__ __forceinline__ float finished(int which, float factor = 1.0F) const {
    const float* const from = partials(which) + thread % kTileValues;
    float sum = from[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += from[w * kTileValues];
    return rounded(sum * factor);
  }
  __device__ __forceinline__ static float rounded(float v) { return to_float(from_float<bf16>(v)); }

  // --- r -> u, z -----------------------------------------------------------------------------
  // The factor 1 / rms of a row is that of its products, which therefore need not wait for it: what
  // is rounded is r weight. Thread t has the pairs t, t + kThreads, ... of every row.

  /// The sum that enters the first layer.
  __device__ __forceinline__ float entering(std::int64_t i) const {
    float r = to_float(p.x[i]);
    if (p.residual == nullptr) return r;
    return r + (p.narrow_residual ? to_float(static_cast<const bf16*>(p.residual)[i])
                                  : static_cast<const float*>(p.residual)[i]);
  }
  /// r weight of all rows, to shared memory, and what this thread has of the sums of squares of r.
  __device__ __forceinline__ void take_r(const Layer& l, bool first, unsigned epoch,
                                         float (&squares)[kRows]) {
    constexpr int kAhead = kRows == 1 ? 4 : kRows;
    bf16* const normal = b.template array<bf16>(b.at.normal);
    const auto pair = [&](int i) { return thread + i / kRows * kThreads; };
    const auto weight_of = [&](int i) {
      return reinterpret_cast<const float2*>(l.norm_weight)[pair(i)];
    };
    const auto keep = [&](int i, int n, float2 weight, float one, float two) {
      reinterpret_cast<std::uint32_t*>(normal + n * (p.inputs + kPad))[pair(i)] =
          pack_bf16(one * weight.x, two * weight.y);
      squares[n] = fmaf(one, one, squares[n]);
      squares[n] = fmaf(two, two, squares[n]);
    };
    const int count = kRows * ((p.inputs / 2 - thread + kThreads - 1) / kThreads);
    if (!first) {
      float2 weights[kAhead];
      return gather<kAhead>(
          count, epoch,
          [&](int i, int j) -> const Word* {
            weights[j] = weight_of(i);
            const int n = j % kRows;
            return n < p.batch ? p.to.r + std::int64_t{n} * p.inputs + 2 * pair(i) : nullptr;
          },
          [&](int i, int j, std::uint32_t one, std::uint32_t two) {
            keep(i, j % kRows, weights[j], __uint_as_float(one), __uint_as_float(two));
          });
    }
    for (int i = 0; i < count; i += kRows) {
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        if (n >= p.batch) break;
        const std::int64_t at = std::int64_t{n} * p.inputs + 2 * pair(i);
        keep(i, n, weight_of(i), entering(at), entering(at + 1));
      }
    }
  }
  __device__ __forceinline__ void publish_squares(float (&squares)[kRows]) const {
    float* const sums = b.template array<float>(b.at.norm_sums);
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      squares[n] = warp_sum(squares[n]);
      if (lane == 0) sums[n * kWarps + warp] = squares[n];
    }
  }
  /// 1 / rms of this thread's sequence.
  __device__ __forceinline__ float rstd() const {
    const float* const sums = b.template array<float>(b.at.norm_sums) + sequence() * kWarps;
    float sum = sums[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[w];
    return rsqrtf(fmaf(sum, p.per_input, p.eps));
  }

  // The first half of the threads has the tile of u, the second that of z.

  [[nodiscard]] __device__ __forceinline__ int tile_row() const {
    return thread / kMaxRows % kTileRows;
  }
  [[nodiscard]] __device__ __forceinline__ int sequence() const { return thread % kMaxRows; }

  __device__ __forceinline__ void load(Window& w, const Layer& l, int tile) const {
    const int own = tile * kTileRows + tile_row();
    if (thread >= kTileValues || own >= b.channels || sequence() >= p.batch) return;
    const std::int64_t c = b.first_channel + own;
    load_vec<float, kWidth>(l.conv_state + (sequence() * std::int64_t{p.channels} + c) * kWidth,
                            w.values);
    load_vec<bf16, kWidth>(l.conv_weight + c * kWidth, w.taps);
    w.bias = l.conv_bias != nullptr ? to_float(l.conv_bias[c]) : 0.0F;
  }
  __device__ __forceinline__ float convolve(Window& w, const Layer& l, std::int64_t c,
                                            float newest) const {
    float sum = w.bias;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      w.values[k] = k + 1 < kWidth ? w.values[k + 1] : newest;
      sum = fmaf(w.taps[k], w.values[k], sum);
    }
    store_vec<float, kWidth>(l.conv_state + (sequence() * std::int64_t{p.channels} + c) * kWidth,
                             w.values);
    return rounded(sum * conv::gate(sum));
  }
  /// Pairs of neighbouring channels, of which `mine` is the first where `publishes`.
  __device__ __forceinline__ void publish_pair(Word* to, int n, int channel, float mine, float next,
                                               unsigned epoch) const {
    publish(to + (std::int64_t{n} * p.channels + channel) / 2, pack_bf16(mine, next), epoch);
  }
  __device__ __forceinline__ void finish_u(Window& w, const Layer& l, int tile, unsigned epoch) {
    const int own = tile * kTileRows + tile_row();
    const bool exists = own < b.channels && sequence() < p.batch;
    const float v = finished(0, rstd());
    float u = 0.0F;
    if (exists) u = convolve(w, l, b.first_channel + own, v);
    const float next = __shfl_down_sync(0xFFFFFFFFU, u, kMaxRows);
    if (!exists) return;
    b.template array<float>(b.at.u)[own * p.batch + sequence()] = u;
    if (tile_row() % 2 == 0)
      publish_pair(p.to.u, sequence(), b.first_channel + own, u, next, epoch);
  }
  __device__ __forceinline__ void finish_z(int tile) {
    const int own = tile * kTileRows + tile_row();
    const float z = finished(1, rstd());
    if (own >= b.channels || sequence() >= p.batch) return;
    b.template array<float>(b.at.gate)[own * p.batch + sequence()] = z * selective::fast_sigmoid(z);
  }
  __device__ __forceinline__ void in_proj(const Layer& l, bool first, unsigned epoch) {
    Window window;
    load(window, l, 0);
    float squares[kRows] = {};
    take_r(l, first, epoch, squares);
    b.sync();
    publish_squares(squares);
    const bf16* const normal = b.template array<bf16>(b.at.normal);
    for (int t = 0; t * kTileRows < b.channels; ++t) {
      multiply(b.u_tile(l, t), normal, partials(0));
      multiply(b.z_tile(l, t), normal, partials(1));
      b.sync();
      if (thread < kTileValues)
        finish_u(window, l, t, epoch);
      else
        finish_z(t);
      load(window, l, t + 1);
      turn ^= 1;
    }
  }

  // --- u -> x_dbl ----------------------------------------------------------------------------

  /// What others have published of u or v, as the right operand of a product.
  __device__ __forceinline__ const bf16* take_operand(const Word* words, unsigned epoch) const {
    bf16* const operand = b.template array<bf16>(b.at.operand);
    const int row_pairs = p.channels / 4;
    gather_pairs<kRows == 1 ? 2 : kRows>(
        words, p.batch * row_pairs, epoch, [&](int i, std::uint32_t one, std::uint32_t two) {
          const int n = kRows == 1 ? 0 : i / row_pairs;
          *reinterpret_cast<uint2*>(operand + n * (p.channels + kPad) + (i - n * row_pairs) * 4) =
              make_uint2(one, two);
        });
    b.sync();
    return operand;
  }
  __device__ __forceinline__ void x_proj(const Layer& l, unsigned epoch) {
    if (b.x_dbl <= 0) return;
    const bf16* const u = take_operand(p.to.u, epoch);
    for (int t = 0; t * kTileRows < b.x_dbl; ++t) {
      multiply(b.x_dbl_tile(l, t), u, partials(0));
      b.sync();
      const int own = t * kTileRows + tile_row();
      if (thread < kTileValues && own < b.x_dbl && sequence() < p.batch)
        publish(p.to.x_dbl + sequence() * p.x_dbl() + b.first_x_dbl + own,
                __float_as_uint(finished(0)), epoch);
      turn ^= 1;
    }
  }

  // --- x_dbl -> v ----------------------------------------------------------------------------
  // kLanes lanes have a channel of a sequence.

  /// Channel and sequence of round i.
  struct Item {
    int own, n;
    bool exists;
  };
  [[nodiscard]] __device__ __forceinline__ Item item(int i) const {
    const int at = i * (kThreads / kLanes) + thread / kLanes;
    const int n = at / b.channels;
    return {at - n * b.channels, n, n < p.batch};
  }
  __device__ __forceinline__ void load(ScanLane& s, const Layer& l, const Item& at) const {
    if (!at.exists) return;
    const int part = thread % kLanes;
    const std::int64_t c = b.first_channel + at.own;
    load_vec<float, kStates>(
        l.lrnn_state + (at.n * std::int64_t{p.channels} + c) * kDState + part * kStates, s.h);
    load_vec<float, kStates>(l.A_log + c * kDState + part * kStates, s.A);
    const uint2* const w = reinterpret_cast<const uint2*>(l.dt_weight + c * p.rank) + part;
#pragma unroll
    for (int i = 0; i < kHeldRank; ++i)
      if (i * kLanes * 4 < p.rank) s.dt_weight[i] = w[i * kLanes];
    s.dt_bias = l.dt_bias[c];
    s.D = l.D[c];
  }
  __device__ __forceinline__ static float dot(uint2 w, float4 q, float sum) {
    sum = fmaf(__uint_as_float(w.x << 16), q.x, sum);
    sum = fmaf(__uint_as_float(w.x & 0xFFFF0000U), q.y, sum);
    sum = fmaf(__uint_as_float(w.y << 16), q.z, sum);
    return fmaf(__uint_as_float(w.y & 0xFFFF0000U), q.w, sum);
  }
  /// Over the lanes of a channel, in every one of them.
  __device__ __forceinline__ static float lane_sum(float v) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      v += __shfl_xor_sync(0xFFFFFFFFU, v, offset);
    return v;
  }
  __device__ __forceinline__ float project_dt(const ScanLane& s, const Layer& l, const Item& at,
                                              const float* x_dbl) const {
    const int part = thread % kLanes;
    const float4* const q = reinterpret_cast<const float4*>(x_dbl) + part;
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kHeldRank; ++i)
      if (i * kLanes * 4 < p.rank) sum = dot(s.dt_weight[i], q[i * kLanes], sum);
    const uint2* const w = reinterpret_cast<const uint2*>(
                               l.dt_weight + (b.first_channel + at.own) * std::int64_t{p.rank}) +
                           part;
    for (int i = kHeldRank; i * kLanes * 4 < p.rank; ++i)
      sum = dot(w[i * kLanes], q[i * kLanes], sum);
    return rounded(lane_sum(sum));
  }
  /// Moves a channel on by its token; the gated output.
  __device__ __forceinline__ float advance(ScanLane& s, const Layer& l, const Item& at) const {
    const int part = thread % kLanes;
    const int n = at.exists ? at.n : 0;
    const int own = at.exists ? at.own : 0;
    const float* const x_dbl = b.template array<float>(b.at.x_dbl) + n * p.x_dbl();
    const float u = b.template array<float>(b.at.u)[own * p.batch + n];
    const float gate = b.template array<float>(b.at.gate)[own * p.batch + n];
    const float delta =
        selective::softplus(project_dt(s, l, {own, n, true}, x_dbl) + s.dt_bias);
    const float* const B = x_dbl + p.rank + part * kStates;
    const float* const C = B + kDState;
    float y = 0.0F;
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const float a = exp2_approx(delta * s.A[k]);
      s.h[k] = fmaf(a, s.h[k], delta * u * B[k]);
      y = fmaf(C[k], s.h[k], y);
    }
    if (at.exists)
      store_vec<float, kStates>(
          l.lrnn_state +
              (at.n * std::int64_t{p.channels} + b.first_channel + at.own) * kDState +
              part * kStates,
          s.h);
    return rounded(fmaf(s.D, u, lane_sum(y)) * gate);
  }
  __device__ __forceinline__ void scan(const Layer& l, ScanLane& s, unsigned epoch) {
    float* const x_dbl = b.template array<float>(b.at.x_dbl);
    gather_pairs<1>(p.to.x_dbl, p.batch * p.x_dbl() / 2, epoch,
              [&](int i, std::uint32_t one, std::uint32_t two) {
                reinterpret_cast<uint2*>(x_dbl)[i] = make_uint2(one, two);
              });
    b.sync();
    const int items = p.batch * b.channels;
    for (int i = 0; i * (kThreads / kLanes) < items; ++i) {
      const Item at = item(i);
      if (__all_sync(0xFFFFFFFFU, !at.exists)) break;
      if (i > 0) {
        load(s, l, at);
        rates(s);
      }
      const float v = advance(s, l, at);
      const float next = __shfl_down_sync(0xFFFFFFFFU, v, kLanes);
      if (at.exists && at.own % 2 == 0 && thread % kLanes == 0)
        publish_pair(p.to.v, at.n, b.first_channel + at.own, v, next, epoch);
    }
  }
  /// A log2(e) from A_log.
  __device__ __forceinline__ static void rates(ScanLane& s) {
#pragma unroll
    for (float& a : s.A) a = -expf(a) * selective::kLog2e;
  }

  // --- v -> r --------------------------------------------------------------------------------

  __device__ __forceinline__ float* residual() const {
    return b.template array<float>(b.at.residual);
  }
  __device__ __forceinline__ float stored_residual(float r) const {
    return p.narrow_residual ? rounded(r) : r;
  }
  __device__ __forceinline__ void enter_residual() {
    for (int i = thread; i < p.batch * b.outputs; i += kThreads) {
      const int n = i / b.outputs;
      const int own = i - n * b.outputs;
      residual()[own * p.batch + n] =
          stored_residual(entering(std::int64_t{n} * p.inputs + b.first_output + own));
    }
    b.sync();
  }
  __device__ __forceinline__ void finish_output(int own, float x, bool last, unsigned epoch) {
    const int n = sequence();
    const std::int64_t at = std::int64_t{n} * p.inputs + b.first_output + own;
    float& kept = residual()[own * p.batch + n];
    if (!last) {
      const float r = x + kept;
      kept = stored_residual(r);
      return publish(p.to.r + at, __float_as_uint(r), epoch + 1);
    }
    p.y[at] = from_float<bf16>(x);
    if (p.narrow_residual)
      static_cast<bf16*>(p.residual_out)[at] = from_float<bf16>(kept);
    else
      static_cast<float*>(p.residual_out)[at] = kept;
  }
  __device__ __forceinline__ void out_proj(const Layer& l, bool last, unsigned epoch) {
    if (b.outputs <= 0) return;
    const bf16* const v = take_operand(p.to.v, epoch);
    for (int t = 0; t * kTileRows < b.outputs; ++t) {
      multiply(b.output_tile(l, t), v, partials(0));
      b.sync();
      const int own = t * kTileRows + tile_row();
      if (thread < kTileValues && own < b.outputs && sequence() < p.batch)
        finish_output(own, finished(0), last, epoch);
      turn ^= 1;
    }
  }

  __device__ __forceinline__ void run() {
    enter_residual();
    for (int i = 0; i < p.layer_count; ++i) {
      const Layer& l = p.layers[i];
      const unsigned epoch = p.epoch + static_cast<unsigned>(i);
      in_proj(l, i == 0, epoch);
      ScanLane lane_of_first = {};
      load(lane_of_first, l, item(0));
      rates(lane_of_first);
      x_proj(l, epoch);
      scan(l, lane_of_first, epoch);
      out_proj(l, i + 1 == p.layer_count, epoch);
    }
  }
};

#endif

template <int kRows>
__global__ __launch_bounds__(kThreads + 32, 1) void stack_kernel(const __grid_constant__ Args p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  const Block block(p, shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; ++i) {
      barrier_init(block.full(i), 1);
      barrier_init(block.empty(i), kWarps);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x >= kThreads)
    Copier{block, static_cast<int>(threadIdx.x) % 32, {}}.run();
  else
    Computer<kRows>{block}.run();
#endif
}

// --- host --------------------------------------------------------------------------------------

Layer pointers(const MambaStackLayer& l) {
  return {.norm_weight = l.norm_weight.data<float>(),
          .in_proj = l.in_proj.data<bf16>(),
          .conv_weight = l.conv_weight.data<bf16>(),
          .conv_bias = l.conv_bias ? l.conv_bias.data<bf16>() : nullptr,
          .x_proj = l.x_proj.data<bf16>(),
          .dt_weight = l.dt_weight.data<bf16>(),
          .dt_bias = l.dt_bias.data<float>(),
          .A_log = l.A_log.data<float>(),
          .D = l.D.data<float>(),
          .out_proj = l.out_proj.data<bf16>(),
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

constexpr int share(int all, int blocks, int unit = 1) {
  return (all + blocks * unit - 1) / (blocks * unit) * unit;
}

/// Sizes and the shares of the blocks.
Args sizes_of(const MambaStackStep& a) {
  const MambaStackLayer& l = a.layers.front();
  Args p{};
  p.batch = static_cast<int>(a.x.dim(0));
  p.inputs = static_cast<int>(a.x.dim(1));
  p.channels = static_cast<int>(l.A_log.dim(0));
  p.rank = static_cast<int>(l.dt_weight.dim(1));
  p.own_channels = share(p.channels, multiprocessors(), 2);
  return p;
}

int blocks_of(const Args& p) { return (p.channels + p.own_channels - 1) / p.own_channels; }

/// Whether the sizes are those of a usual Mamba in bfloat16 for few sequences.
bool usual(const MambaStackStep& a) {
  const MambaStackLayer& l = a.layers.front();
  constexpr std::int64_t kMost = 1 << 15;
  return a.x.dtype() == DType::bfloat16 && a.x.dim(0) <= kMaxRows && a.x.dim(1) <= kMost &&
         l.A_log.dim(0) <= kMost && a.x.dim(1) % kUnit == 0 && l.A_log.dim(0) % kUnit == 0 &&
         l.A_log.dim(1) == kDState && l.conv_weight.dim(1) == kWidth &&
         l.dt_weight.dim(1) % (4 * kLanes) == 0;
}
/// Whether all operands may be read 16 bytes at a time.
bool aligned(const MambaStackStep& a) {
  const auto allows = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return std::all_of(a.layers.begin(), a.layers.end(), [&](const MambaStackLayer& layer) {
    const Layer l = pointers(layer);
    return allows(l.norm_weight) && allows(l.in_proj) && allows(l.conv_weight) &&
           allows(l.x_proj) && allows(l.dt_weight) && allows(l.A_log) && allows(l.out_proj) &&
           allows(l.conv_state) && allows(l.lrnn_state);
  });
}

template <int kRows>
bool takes_cooperative() {
  int device = 0;
  int allowed = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&allowed, cudaDevAttrCooperativeLaunch, device));
  cudaFuncAttributes attributes{};
  LRNN_CUDA_CHECK(cudaFuncGetAttributes(&attributes, stack_kernel<kRows>));
  return allowed != 0 && compute_capability() >= 90 && attributes.ptxVersion >= 90;
}

template <int kRows>
void launch(cudaStream_t stream, Args p) {
  const Layout layout(p);
  LRNN_CUDA_CHECK(cudaFuncSetAttribute(
      stack_kernel<kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.bytes));
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks_of(p));
  config.blockDim = kThreads + 32;
  config.dynamicSmemBytes = static_cast<std::size_t>(layout.bytes);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  LRNN_CUDA_CHECK(cudaLaunchKernelEx(&config, stack_kernel<kRows>, p));
}

/// Gives the ring what is left of shared memory; whether that is enough.
bool size_ring(Args& p) {
  p.slots = 0;
  const int rest = shared_memory_per_block() - Layout(p).bytes;
  p.slots = std::min(kMaxSlots, rest / (kSlotBytes + 16));
  return p.slots >= kMinSlots;
}

/// Words of the exchange, cleared: no layer has number 0.
Tensor exchange(Context& ctx, Args& p) {
  const std::int64_t batch = p.batch;
  const std::int64_t words = batch * (p.inputs + p.channels + p.x_dbl());
  Tensor t = ctx.zeros({2 * words}, DType::float32);
  p.to.r = reinterpret_cast<Word*>(t.view().data<float>());
  p.to.u = p.to.r + batch * p.inputs;
  p.to.v = p.to.u + batch * p.channels / 2;
  p.to.x_dbl = p.to.v + batch * p.channels / 2;
  return t;
}

template <int kRows>
bool step(Context& ctx, const MambaStackStep& a) {
  if (!takes_cooperative<kRows>()) return false;
  Args p = sizes_of(a);
  const int blocks = blocks_of(p);
  p.own_x_dbl = share(p.x_dbl(), blocks);
  p.own_outputs = share(p.inputs, blocks);
  p.eps = static_cast<float>(a.eps);
  p.per_input = 1.0F / static_cast<float>(p.inputs);
  p.narrow_residual = a.residual_out.dtype() == DType::bfloat16;
  if (!size_ring(p)) return false;
  const Tensor words = exchange(ctx, p);
  const int count = static_cast<int>(a.layers.size());
  const int launches = (count + kMaxLayers - 1) / kMaxLayers;
  p.y = a.y.data<bf16>();
  p.residual_out = a.residual_out.raw();
  for (int i = 0; i < launches; ++i) {
    const int begin = count * i / launches;
    p.layer_count = count * (i + 1) / launches - begin;
    p.epoch = 1 + static_cast<unsigned>(begin);
    for (int j = 0; j < p.layer_count; ++j)
      p.layers[j] = pointers(a.layers[static_cast<std::size_t>(begin + j)]);
    p.x = i == 0 ? a.x.data<bf16>() : p.y;
    p.residual = i > 0 ? p.residual_out : a.residual ? a.residual.raw() : nullptr;
    launch<kRows>(ctx.stream().handle, p);
  }
  return true;
}

bool step_together(Context& ctx, const MambaStackStep& a) {
  if (!usual(a) || !aligned(a)) return false;
  const std::int64_t batch = a.x.dim(0);
  if (batch == 1) return step<1>(ctx, a);
  if (batch <= 4) return step<4>(ctx, a);
  return step<kMaxRows>(ctx, a);
}

}  // namespace
}  // namespace mamba_stack

void mamba_stack_step(Context& ctx, const MambaStackStep& a) {
  if (!mamba_stack::step_together(ctx, a)) lrnn::detail::mamba_stack_by_parts(ctx, a);
}

}  // namespace lrnn::cuda
