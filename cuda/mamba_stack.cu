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
constexpr int kHeldRank = 8;  // groups of kLanes * 4 weights of dt that a lane keeps
constexpr int kMaxLayers = 24;  // whose pointers are arguments
constexpr int kReplicas = 4;    // of what is exchanged, so that readers spread over L2
constexpr int kComputers = 1;   // barrier of the warps that compute

/// Products of a layer, in their order.
enum Stage { kIn, kXDbl, kOut, kStages };

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

/// What blocks exchange, in words from the begin of a replica.
struct Exchange {
  Word* words;
  int r;      // [B, H], float32
  int u;      // [B, E / 2], pairs
  int v;      // [B, E / 2], pairs
  int x_dbl;  // [B, R + 2 N], float32
  int size;
};

/// The share of a block in a product: `own` rows of the weight, less in the last blocks.
struct Share {
  int own, depth;
  int part;  // depth that a buffer of the ring takes
};

struct Args {
  Layer layers[kMaxLayers];
  int layer_count;
  unsigned epoch;  // number of the first layer
  int batch, inputs, channels, rank;
  Share shares[kStages];
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

/// A product of this block: rows [first, first + rows) of the weight.
struct Product {
  int first, rows, depth, part;
  int tiles;  // of kTileRows rows; in kIn those of u and z take turns
  int operand;  // where it lies
};

/// Shared memory: the ring, then these arrays.
struct Layout {
  int operand, normal, partials, x_dbl, u, gate, residual, norm_sums, layers, products, barriers;
  int bytes;

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
    u = take(p.batch * p.shares[kIn].own * 4);
    gate = take(p.batch * p.shares[kIn].own * 4);
    residual = take(p.batch * p.shares[kOut].own * 4);
    norm_sums = take(kWarps * kMaxRows * 4);
    layers = take(static_cast<int>(sizeof(p.layers)));
    products = take(kStages * static_cast<int>(sizeof(Product)));
    barriers = take(2 * p.slots * 8);
    bytes = at;
  }
};

#if __CUDA_ARCH__ >= 900

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
#pragma unroll 1
  for (int first = 0; first < count; first += kAhead) {
    const Word* from[kAhead];
    Word v[kAhead][2];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) from[j] = first + j < count ? at(first + j, j) : nullptr;
    bool missing = true;
#ifdef LRNN_SPIN_LIMIT
    const long long start = clock64();
#endif
#pragma unroll 1
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
  int first_output, outputs;

  __device__ __forceinline__ Block(const Args& p, char* shared) : p(p), shared(shared), at(p) {
    const Product in = product_of(kIn);
    const Product out = product_of(kOut);
    first_channel = in.first;
    channels = in.rows;
    first_output = out.first;
    outputs = out.rows;
  }
  [[nodiscard]] __device__ __forceinline__ Product product_of(int stage) const {
    const Share& share = p.shares[stage];
    const int all = stage == kIn ? p.channels : stage == kXDbl ? p.x_dbl() : p.inputs;
    Product q{};
    q.first = min(static_cast<int>(blockIdx.x) * share.own, all);
    q.rows = min(share.own, all - q.first);
    q.depth = share.depth;
    q.part = share.part;
    q.tiles = (q.rows + kTileRows - 1) / kTileRows * (stage == kIn ? 2 : 1);
    q.operand = stage == kIn ? at.normal : at.operand;
    return q;
  }
  /// By all threads, before a barrier of the block.
  __device__ __forceinline__ void prepare() const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kStages) array<Product>(at.products)[thread] = product_of(thread);
    constexpr int kWords = static_cast<int>(sizeof(p.layers) / sizeof(std::uint64_t));
    const auto* const from = reinterpret_cast<const std::uint64_t*>(p.layers);
    for (int i = thread; i < kWords; i += static_cast<int>(blockDim.x))
      array<std::uint64_t>(at.layers)[i] = from[i];
    if (thread != 0) return;
    for (int i = 0; i < p.slots; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), kWarps);
    }
    barrier_init_done();
  }
  template <class T>
  __device__ __forceinline__ T* array(int offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }
  [[nodiscard]] __device__ __forceinline__ const Layer& layer(int i) const {
    return array<Layer>(at.layers)[i];
  }
  [[nodiscard]] __device__ __forceinline__ const Product& product(int stage) const {
    return array<Product>(at.products)[stage];
  }
  [[nodiscard]] __device__ __forceinline__ std::uint32_t full(int slot) const {
    return shared_address(shared + at.barriers) + static_cast<std::uint32_t>(16 * slot);
  }
  [[nodiscard]] __device__ __forceinline__ std::uint32_t empty(int slot) const {
    return full(slot) + 8;
  }
  __device__ __forceinline__ void sync() const { group_wait(kComputers, kThreads); }

  /// What this block reads of the exchange.
  [[nodiscard]] __device__ __forceinline__ const Word* words(int offset) const {
    return p.to.words + blockIdx.x % kReplicas * p.to.size + offset;
  }
  __device__ __forceinline__ void publish(int offset, std::uint32_t value, unsigned epoch) const {
    Word* to = p.to.words + offset;
#pragma unroll
    for (int i = 0; i < kReplicas; ++i) {
      asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to),
                   "l"(static_cast<Word>(epoch) << 32 | value)
                   : "memory");
      to += p.to.size;
    }
  }
};

// --- the warp that copies ----------------------------------------------------------------------

struct Copier {
  const Block& b;
  int lane;
  Place place;

  __device__ __forceinline__ void copy(const bf16* weight, const Product& q, int begin, int count) {
    const bf16* from = weight + static_cast<std::int64_t>(begin + lane) * q.depth;
    for (int k = 0; k < q.depth; k += q.part) {
      const int columns = min(q.part, q.depth - k);
      const std::uint32_t full = b.full(place.slot);
      barrier_wait(b.empty(place.slot), place.turn ^ 1);
      if (lane == 0) barrier_expect(full, count * columns * 2);
      __syncwarp();
      if (lane < count)
        copy_bytes(shared_address(b.shared + place.slot * kSlotBytes + lane * (q.part + kPad) * 2),
                   from + k, columns * 2, full);
      place.next(b.p.slots);
    }
  }
  __device__ __forceinline__ void copy(const Layer& l, int stage) {
    const Product q = b.product(stage);
    for (int t = 0; t < q.tiles; ++t) {
      const int tile = stage == kIn ? t / 2 : t;
      const int begin = q.first + tile * kTileRows + (stage == kIn && t % 2 != 0 ? b.p.channels : 0);
      copy(l.weights[stage], q, begin, min(kTileRows, q.rows - tile * kTileRows));
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
    prefetch_channels(b.layer(0));
    for (int i = 0; i < b.p.layer_count; ++i) {
      for (int stage = 0; stage < kStages; ++stage) copy(b.layer(i), stage);
      if (i + 1 < b.p.layer_count) prefetch_channels(b.layer(i + 1));
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
struct ScanLane {
  float4 h, A;
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

  __device__ __forceinline__ static float rounded(float v) { return to_float(from_float<bf16>(v)); }

  // --- products ------------------------------------------------------------------------------

  /// Operands of a step of two rounds.
  struct Fragments {
    std::uint32_t left[2][4];
    std::uint32_t right[4];

    __device__ __forceinline__ void load(const bf16* w, const bf16* x) {
      load_matrices(right, x);
      load_matrices(left[0], w);
      load_matrices(left[1], w + kRound);
    }
  };
  /// Sums of this warp's part of a tile, to shared memory.
  __device__ __forceinline__ void multiply(const Product& q, int rows, float* partials) {
    const int part = q.part;
    const int depth = q.depth;
    float c[2][4] = {};
    const bf16* x = b.template array<bf16>(q.operand) + min(lane % 8, p.batch - 1) * (depth + kPad) +
                    lane / 16 * kRound + lane / 8 % 2 * 8 + warp * kStep;
    const int w_lane = min(lane % 16, rows - 1) * (part + kPad) + lane / 16 * 8 + warp * kStep;
#pragma unroll 1
    for (int k = 0; k < depth; k += part) {
      const bf16* w = b.template array<bf16>(place.slot * kSlotBytes) + w_lane;
      barrier_wait(b.full(place.slot), place.turn);
      Fragments f;
      f.load(w, x);
#pragma unroll 1
      for (int left = min(part, depth - k) / kUnit; left > 0; --left) {
        const Fragments now = f;
        x += kUnit;
        w += kUnit;
        if (left > 1) f.load(w, x);
        multiply_add(c[0], now.left[0], now.right[0], now.right[1]);
        multiply_add(c[1], now.left[1], now.right[2], now.right[3]);
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
  /// The sum of this thread's place in one of two tiles.
  __device__ __forceinline__ float finished() const {
    const float* const from = partials(thread / kTileValues) + thread % kTileValues;
    float sum = from[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += from[w * kTileValues];
    return sum;
  }
  /// Row of a tile and sequence whose sum this thread finishes. The first half of the threads has
  /// the first of two tiles.
  [[nodiscard]] __device__ __forceinline__ int tile_row() const {
    return thread / kMaxRows % kTileRows;
  }
  [[nodiscard]] __device__ __forceinline__ int sequence() const { return thread % kMaxRows; }

  // --- r -> u, z -----------------------------------------------------------------------------
  // The factor 1 / rms of a row is that of its products, which therefore need not wait for it: what
  // is rounded is r weight. Thread t has the pairs t, t + kThreads, ... of every row.

  /// r weight of all rows, to shared memory, and what this thread has of the sums of squares of r.
  __device__ __forceinline__ void take_r(const Layer& l, unsigned epoch) {
    constexpr int kAhead = kRows == 1 ? 2 : kRows;
    float squares[kRows] = {};
    bf16* const normal = b.template array<bf16>(b.at.normal);
    const Word* const words = b.words(p.to.r);
    const auto* const norm_weight = reinterpret_cast<const float2*>(l.norm_weight);
    const auto pair = [&](int i) { return thread + i / kRows * kThreads; };
    float2 weights[kAhead];
    gather<kAhead>(
        kRows * ((p.inputs / 2 - thread + kThreads - 1) / kThreads), epoch,
        [&](int i, int j) -> const Word* {
          weights[j] = norm_weight[pair(i)];
          const int n = j % kRows;
          return n < p.batch ? words + n * p.inputs + 2 * pair(i) : nullptr;
        },
        [&](int i, int j, std::uint32_t one, std::uint32_t two) {
          const float2 r = make_float2(__uint_as_float(one), __uint_as_float(two));
          const int n = j % kRows;
          reinterpret_cast<std::uint32_t*>(normal + n * (p.inputs + kPad))[pair(i)] =
              pack_bf16(r.x * weights[j].x, r.y * weights[j].y);
          squares[n] = fmaf(r.y, r.y, fmaf(r.x, r.x, squares[n]));
        });
    float* const sums = b.template array<float>(b.at.norm_sums);
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      squares[n] = warp_sum(squares[n]);
      if (lane == 0) sums[n * kWarps + warp] = squares[n];
    }
    b.sync();
  }
  /// 1 / rms of this thread's sequence.
  __device__ __forceinline__ float rstd() const {
    const float* const sums = b.template array<float>(b.at.norm_sums) + sequence() * kWarps;
    float sum = sums[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[w];
    return rsqrtf(fmaf(sum, p.per_input, p.eps));
  }
  [[nodiscard]] __device__ __forceinline__ std::int64_t window_of(int own) const {
    return (sequence() * std::int64_t{p.channels} + b.first_channel + own) * kWidth;
  }
  __device__ __forceinline__ void load(Window& w, const Layer& l, int tile) const {
    const int own = tile * kTileRows + tile_row();
    if (thread >= kTileValues || own >= b.channels || sequence() >= p.batch) return;
    const int c = b.first_channel + own;
    w.values = *reinterpret_cast<const float4*>(l.conv_state + window_of(own));
    w.taps = reinterpret_cast<const uint2*>(l.conv_weight)[c];
    w.bias = l.conv_bias != nullptr ? l.conv_bias[c] : from_float<bf16>(0.0F);
  }
  __device__ __forceinline__ static float low(std::uint32_t pair) {
    return __uint_as_float(pair << 16);
  }
  __device__ __forceinline__ static float high(std::uint32_t pair) {
    return __uint_as_float(pair & 0xFFFF0000U);
  }
  __device__ __forceinline__ float convolve(const Window& w, float* state, float newest) const {
    const float4 next = make_float4(w.values.y, w.values.z, w.values.w, newest);
    float sum = fmaf(low(w.taps.x), next.x, to_float(w.bias));
    sum = fmaf(high(w.taps.x), next.y, sum);
    sum = fmaf(low(w.taps.y), next.z, sum);
    sum = fmaf(high(w.taps.y), next.w, sum);
    *reinterpret_cast<float4*>(state) = next;
    return rounded(sum * conv::gate(sum));
  }
  /// Channels `own` and the next one of a sequence.
  __device__ __forceinline__ void publish_pair(int to, int n, int own, float mine, float next,
                                               unsigned epoch) const {
    b.publish(to + (n * p.channels + b.first_channel + own) / 2, pack_bf16(mine, next), epoch);
  }
  __device__ __forceinline__ void finish_in(const Window& w, const Layer& l, int tile,
                                            unsigned epoch) const {
    const int own = tile * kTileRows + tile_row();
    const bool exists = own < b.channels && sequence() < p.batch;
    const float v = rounded(finished() * rstd());
    if (thread >= kTileValues) {
      if (exists)
        b.template array<float>(b.at.gate)[own * p.batch + sequence()] =
            v * selective::fast_sigmoid(v);
      return;
    }
    float u = 0.0F;
    if (exists) u = convolve(w, l.conv_state + window_of(own), v);
    const float next = __shfl_down_sync(0xFFFFFFFFU, u, kMaxRows);
    if (!exists) return;
    if (tile_row() % 2 == 0) publish_pair(p.to.u, sequence(), own, u, next, epoch);
    b.template array<float>(b.at.u)[own * p.batch + sequence()] = u;
  }

  // --- u -> x_dbl, v -> r ----------------------------------------------------------------------

  /// What others have published of u or v, as the right operand of a product.
  __device__ __forceinline__ void take_operand(const Word* words, unsigned epoch) const {
    bf16* const operand = b.template array<bf16>(b.at.operand);
    const int row_pairs = p.channels / 4;
    gather_pairs<kRows == 1 ? 2 : kRows>(
        words, p.batch * row_pairs, epoch, [&](int i, std::uint32_t one, std::uint32_t two) {
          const int n = kRows == 1 ? 0 : i / row_pairs;
          *reinterpret_cast<uint2*>(operand + n * (p.channels + kPad) + (i - n * row_pairs) * 4) =
              make_uint2(one, two);
        });
    b.sync();
  }
  __device__ __forceinline__ float* residual() const {
    return b.template array<float>(b.at.residual);
  }
  /// r = x + residual: to the others, and as it is stored.
  __device__ __forceinline__ void add_residual(int own, int n, float x, float before,
                                               unsigned epoch) const {
    const float r = x + before;
    b.publish(p.to.r + n * p.inputs + b.first_output + own, __float_as_uint(r), epoch);
    residual()[own * p.batch + n] = p.narrow_residual ? rounded(r) : r;
  }
  __device__ __forceinline__ void enter() const {
    for (int i = thread; i < p.batch * b.outputs; i += kThreads) {
      const int n = i / b.outputs;
      const int own = i - n * b.outputs;
      const std::int64_t at = std::int64_t{n} * p.inputs + b.first_output + own;
      float before = 0.0F;
      if (p.residual != nullptr)
        before = p.narrow_residual ? to_float(static_cast<const bf16*>(p.residual)[at])
                                   : static_cast<const float*>(p.residual)[at];
      add_residual(own, n, to_float(p.x[at]), before, p.epoch);
    }
  }
  __device__ __forceinline__ void leave(int own, int n, float x) const {
    const std::int64_t at = std::int64_t{n} * p.inputs + b.first_output + own;
    const float before = residual()[own * p.batch + n];
    p.y[at] = from_float<bf16>(x);
    if (p.narrow_residual)
      static_cast<bf16*>(p.residual_out)[at] = from_float<bf16>(before);
    else
      static_cast<float*>(p.residual_out)[at] = before;
  }
  __device__ __forceinline__ void finish_rows(const Product& q, int stage, int tile, bool last,
                                              unsigned epoch) const {
    const int own = (tile + thread / kTileValues) * kTileRows + tile_row();
    const int n = sequence();
    if (own >= q.rows || n >= p.batch) return;
    const float v = rounded(finished());
    if (stage == kXDbl)
      b.publish(p.to.x_dbl + n * p.x_dbl() + q.first + own, __float_as_uint(v), epoch);
    else if (last)
      leave(own, n, v);
    else
      add_residual(own, n, v, residual()[own * p.batch + n], epoch + 1);
  }

  /// Products of a stage, two tiles at a time.
  __device__ __forceinline__ void products(int stage, Window& window, const Layer& l, bool last,
                                           unsigned epoch) {
    const Product& q = b.product(stage);
#pragma unroll 1
    for (int t = 0; t < q.tiles; t += 2) {
#pragma unroll 1
      for (int which = 0; which < min(2, q.tiles - t); ++which) {
        const int tile = stage == kIn ? t / 2 : t + which;
        multiply(q, min(kTileRows, q.rows - tile * kTileRows), partials(which));
      }
      b.sync();
      if (stage == kIn) {
        finish_in(window, l, t / 2, epoch);
        load(window, l, t / 2 + 1);
      } else {
        finish_rows(q, stage, t, last, epoch);
      }
      turn ^= 1;
    }
  }

  // --- x_dbl -> v ----------------------------------------------------------------------------
  // kLanes lanes have a channel of a sequence.

  struct Item {
    int own, n;
  };
  [[nodiscard]] __device__ __forceinline__ Item first_item() const {
    const int n = thread / kLanes / b.channels;
    return {thread / kLanes - n * b.channels, n};
  }
  __device__ __forceinline__ void next(Item& at) const {
    at.own += kThreads / kLanes;
    while (at.own >= b.channels) {
      at.own -= b.channels;
      ++at.n;
    }
  }
  [[nodiscard]] __device__ __forceinline__ std::int64_t state_of(const Item& at) const {
    return (at.n * std::int64_t{p.channels} + b.first_channel + at.own) * kDState +
           thread % kLanes * kStates;
  }
  __device__ __forceinline__ const uint2* dt_weight(const Layer& l, int own) const {
    return reinterpret_cast<const uint2*>(l.dt_weight +
                                          (b.first_channel + own) * std::int64_t{p.rank}) +
           thread % kLanes;
  }
  __device__ __forceinline__ void load(ScanLane& s, const Layer& l, const Item& at) const {
    if (at.n >= p.batch) return;
    const int c = b.first_channel + at.own;
    s.h = *reinterpret_cast<const float4*>(l.lrnn_state + state_of(at));
    s.A = reinterpret_cast<const float4*>(l.A_log)[c * kLanes + thread % kLanes];
    const uint2* const w = dt_weight(l, at.own);
#pragma unroll
    for (int i = 0; i < kHeldRank; ++i)
      if (i * kLanes * 4 < p.rank) s.dt_weight[i] = w[i * kLanes];
    s.dt_bias = l.dt_bias[c];
    s.D = l.D[c];
  }
  __device__ __forceinline__ static float dot(uint2 w, float4 q, float sum) {
    sum = fmaf(low(w.x), q.x, sum);
    sum = fmaf(high(w.x), q.y, sum);
    sum = fmaf(low(w.y), q.z, sum);
    return fmaf(high(w.y), q.w, sum);
  }
  /// Over the lanes of a channel, in every one of them.
  __device__ __forceinline__ static float lane_sum(float v) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      v += __shfl_xor_sync(0xFFFFFFFFU, v, offset);
    return v;
  }
  __device__ __forceinline__ float project_dt(const ScanLane& s, const Layer& l, int own,
                                              const float* x_dbl) const {
    const float4* const q = reinterpret_cast<const float4*>(x_dbl) + thread % kLanes;
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kHeldRank; ++i)
      if (i * kLanes * 4 < p.rank) sum = dot(s.dt_weight[i], q[i * kLanes], sum);
    const uint2* const w = dt_weight(l, own);
#pragma unroll 1
    for (int i = kHeldRank; i * kLanes * 4 < p.rank; ++i)
      sum = dot(w[i * kLanes], q[i * kLanes], sum);
    return rounded(lane_sum(sum));
  }
  /// One state: h = exp(delta A) h + delta u B, and C h.
  __device__ __forceinline__ static float advance(float& h, float rate, float delta, float drive,
                                                  float B, float C, float y) {
    h = fmaf(exp2_approx(delta * rate), h, drive * B);
    return fmaf(C, h, y);
  }
  /// Moves a channel on by its token; the gated output.
  __device__ __forceinline__ float advance(ScanLane& s, const Layer& l, const Item& at) const {
    const bool exists = at.n < p.batch;
    const int n = exists ? at.n : 0;
    const float* const x_dbl = b.template array<float>(b.at.x_dbl) + n * p.x_dbl();
    const float u = b.template array<float>(b.at.u)[at.own * p.batch + n];
    const float gate = b.template array<float>(b.at.gate)[at.own * p.batch + n];
    const float4 B = *reinterpret_cast<const float4*>(x_dbl + p.rank + thread % kLanes * kStates);
    const float4 C =
        *reinterpret_cast<const float4*>(x_dbl + p.rank + kDState + thread % kLanes * kStates);
    const float delta = selective::softplus(project_dt(s, l, at.own, x_dbl) + s.dt_bias);
    const float drive = delta * u;
    float y = advance(s.h.x, s.A.x, delta, drive, B.x, C.x, 0.0F);
    y = advance(s.h.y, s.A.y, delta, drive, B.y, C.y, y);
    y = advance(s.h.z, s.A.z, delta, drive, B.z, C.z, y);
    y = advance(s.h.w, s.A.w, delta, drive, B.w, C.w, y);
    if (exists) *reinterpret_cast<float4*>(l.lrnn_state + state_of(at)) = s.h;
    return rounded(fmaf(s.D, u, lane_sum(y)) * gate);
  }
  /// A log2(e) from A_log.
  __device__ __forceinline__ static void rates(float4& A) {
    A.x = -expf(A.x) * selective::kLog2e;
    A.y = -expf(A.y) * selective::kLog2e;
    A.z = -expf(A.z) * selective::kLog2e;
    A.w = -expf(A.w) * selective::kLog2e;
  }
  /// `s` has been loaded for the first item.
  __device__ __forceinline__ void scan(const Layer& l, ScanLane& s, Item at, unsigned epoch) const {
    rates(s.A);
    float* const x_dbl = b.template array<float>(b.at.x_dbl);
    gather_pairs<1>(b.words(p.to.x_dbl), p.batch * p.x_dbl() / 2, epoch,
                    [&](int i, std::uint32_t one, std::uint32_t two) {
                      reinterpret_cast<uint2*>(x_dbl)[i] = make_uint2(one, two);
                    });
    b.sync();
#pragma unroll 1
    while (__any_sync(0xFFFFFFFFU, at.n < p.batch)) {
      const float v = advance(s, l, at);
      const float following = __shfl_down_sync(0xFFFFFFFFU, v, kLanes);
      if (at.n < p.batch && at.own % 2 == 0 && thread % kLanes == 0)
        publish_pair(p.to.v, at.n, at.own, v, following, epoch);
      next(at);
      if (__all_sync(0xFFFFFFFFU, at.n >= p.batch)) break;
      load(s, l, at);
      rates(s.A);
    }
  }

  __device__ __forceinline__ void run() {
    const Item item = first_item();
    enter();
#pragma unroll 1
    for (int i = 0; i < p.layer_count; ++i) {
      const Layer& l = b.layer(i);
      const unsigned epoch = p.epoch + static_cast<unsigned>(i);
      Window window{};
      ScanLane scan_lane{};
#pragma unroll 1
      for (int stage = 0; stage < kStages; ++stage) {
        if (stage == kIn) {
          load(window, l, 0);
          take_r(l, epoch);
        } else if (b.product(stage).rows > 0) {
          take_operand(b.words(stage == kXDbl ? p.to.u : p.to.v), epoch);
        }
        products(stage, window, l, i + 1 == p.layer_count, epoch);
        if (stage == kIn) load(scan_lane, l, item);
        if (stage == kXDbl) scan(l, scan_lane, item, epoch);
      }
    }
  }
};

#endif

template <int kRows>
__global__ __launch_bounds__(kThreads + 32, 1) void stack_kernel(const __grid_constant__ Args p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  const Block block(p, shared);
  block.prepare();
  __syncthreads();
  if (threadIdx.x >= kThreads)
    Copier{block, static_cast<int>(threadIdx.x) % 32, {}}.run();
  else
    Computer<kRows>{block}.run();
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

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// `own` rows of a weight: as much of their depth as fits into a buffer.
Share share_of(int own, int depth) {
  const int rows = std::min(own, kTileRows);
  const int part = (kSlotBytes / rows / 2 - kPad) / kUnit * kUnit;
  return {own, depth, std::min(part, depth)};
}

int blocks_of(const Args& p) { return ceil_div(p.channels, p.shares[kIn].own); }

/// Sizes and the shares of the blocks.
Args sizes_of(const MambaStackStep& a) {
  const MambaStackLayer& l = a.layers.front();
  Args p{};
  p.batch = static_cast<int>(a.x.dim(0));
  p.inputs = static_cast<int>(a.x.dim(1));
  p.channels = static_cast<int>(l.A_log.dim(0));
  p.rank = static_cast<int>(l.dt_weight.dim(1));
  p.shares[kIn] = share_of(2 * ceil_div(p.channels, 2 * multiprocessors()), p.inputs);
  const int blocks = blocks_of(p);
  p.shares[kXDbl] = share_of(ceil_div(p.x_dbl(), blocks), p.channels);
  p.shares[kOut] = share_of(ceil_div(p.inputs, blocks), p.channels);
  return p;
}

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
    return allows(l.weights[kIn]) && allows(l.weights[kXDbl]) && allows(l.weights[kOut]) &&
           allows(l.norm_weight) && allows(l.conv_weight) && allows(l.dt_weight) &&
           allows(l.A_log) && allows(l.conv_state) && allows(l.lrnn_state);
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
  p.to.u = p.batch * p.inputs;
  p.to.v = p.to.u + p.batch * p.channels / 2;
  p.to.x_dbl = p.to.v + p.batch * p.channels / 2;
  p.to.size = (p.to.x_dbl + p.batch * p.x_dbl() + 15) / 16 * 16;
  Tensor t = ctx.zeros({2 * std::int64_t{kReplicas} * p.to.size}, DType::float32);
  p.to.words = reinterpret_cast<Word*>(t.view().data<float>());
  return t;
}

template <int kRows>
bool step(Context& ctx, const MambaStackStep& a) {
  if (!takes_cooperative<kRows>()) return false;
  Args p = sizes_of(a);
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
