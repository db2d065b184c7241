// A stack of Mamba blocks, one token of up to 16 sequences, in one cooperative launch.
//
// What mamba_stack.cu does for one or two, with fewer and larger exchanges. A block owns 16 or 32
// of the channels of E (their rows of in_proj, columns of x_proj, convolution, scan) and 8 or 16
// rows of out_proj. What the blocks exchange goes to L2 as words of 16 bytes in the order in which
// the lanes of a product take them, so an operand comes straight into registers. A word is 8
// values in bfloat16 of a sequence; that it has not come is a pair of NaNs that no rounding gives,
// and its author puts that back two layers before the word is used again. A fence a layer, by the
// warp that prefetches, orders that before whatever lets the others ask for the word. The sums of
// x_dbl over the blocks are those of a warp of some block for a row and 4 sequences, between two
// exchanges; the last bit of their parts is that of the number of their layer. States come through
// the ring as the weights do. The ring holds less than a layer, so states and the first weights of
// out_proj go to registers as soon as they have come: the blocks wait for each other while HBM does
// not.
//
// All blocks ask for all of v: with d_model 2048 that is 16 MB a layer from L2. There clusters of
// two blocks share their rows of out_proj, each takes half of the depth, and they exchange sums.
// With smaller v that takes longer than it saves.
//
// A sum is cut by the sizes alone, so the bits depend neither on the device nor on the number of
// sequences.
//
// 16 sequences on an H200, recorded: 24 layers of d_model 768 in 0.168 ms, bound by latency: four
// exchanges, the sums of x_dbl, and one warp's chain of instructions between them. 48 layers of
// d_model 2048 in 0.88 ms, weights and states at 3.4 TB/s, bound by the same chain, for the ring is
// full where products begin.
#include "common/cluster.cuh"
#include "common/mamba_stack.cuh"
#include "core/runtime.hpp"

namespace lrnn::cuda {
namespace mamba_stack {
namespace {

constexpr int kRows = kMostRows;
// Of a block, on their way while it waits for others: more delays what the blocks exchange.
constexpr int kBytesExchanging = 34000;
// And while it multiplies; of no use where layers are so small that latency binds.
constexpr int kBytesStreaming = 50000;
constexpr int kMostShared = 227 * 1024;  // bytes that a block of Hopper may have

/// States of a sequence in a block.
template <class Z>
constexpr int kStateBytes = Z::own(kIn) * kDState * 4;

/// Buffers that a layer takes.
template <class Z>
constexpr int kLayerBuffers = Z::buffers(kIn) + 1 + Z::buffers(kOut);

/// Of the exchange: 8 values in bfloat16, or four numbers.
struct alignas(16) Word {
  std::uint64_t low, high;
};
// No rounded pair, and no number that is computed.
[[maybe_unused]] constexpr std::uint32_t kAbsent = 0xFFFFFFFF;

template <class Z>
struct Exchange {
  static constexpr int kTurns = 4;
  static constexpr int r = 0;                                 // [B, H] bf16
  static constexpr int v = r + kRows * Z::kInputs / 8;        // [B, E] bf16
  static constexpr int x_dbl = v + kRows * Z::kChannels / 8;  // [R + 2 N, B] bf16
  // Copies, since every block asks for all of these few.
  static constexpr int kCopies = 4;
  static constexpr int squares = x_dbl + kCopies * Z::kXDblRows * 2;  // [blocks, B] float32
  static constexpr int kTurn = squares + Z::kBlocks * kRows / 4;
  static constexpr int partials = kTurns * kTurn;  // [R + 2 N, blocks, B / 4]
  static constexpr std::int64_t kWords = partials + Z::kXDblRows * Z::kBlocks * kRows / 4;
};

/// Shared memory of a block, before the ring.
template <class Z>
struct Shared {
  static constexpr int kOwn = Z::own(kIn);
  // Two sets of sums where the ring takes a whole layer anyway; else a barrier parts their users.
  static constexpr int kSets = kLayerBuffers<Z> * Z::kSlotBytes < kMostShared / 2 ? 2 : 1;

  /// Of the stages between the products.
  struct Scratch {
    alignas(16) bf16 x_dbl[kRows][Z::kXDblRows + 8];
    float delta[kRows][kOwn];
  };
  union Set {
    float partials[2][kWarps][kRows][kTileRows];
    Scratch scratch;
  };
  alignas(128) Set sets[kSets];
  alignas(16) bf16 u[kRows][kOwn + 8];
  float gate[kRows][kOwn];
  alignas(16) float squares[kWarps][kRows];
  // Of this block's rows of out_proj, from the other block of its cluster.
  float others[Z::kCluster > 1 ? kRows : 1][kTileRows];
  Mailbox mailbox;
  Common common;
};
template <class Z>
constexpr int kRingOffset = (static_cast<int>(sizeof(Shared<Z>)) + 127) / 128 * 128;

#if __CUDA_ARCH__ >= 900

constexpr unsigned kPartsPause = 300;  // ns, before a warp asks for parts of sums of x_dbl
constexpr int kMostSteps = 8;  // of a stage, whose operand, or first weights, wait in registers

__device__ __forceinline__ void store_word(Word* to, Word w) {
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(w.low), "l"(w.high)
               : "memory");
}
__device__ __forceinline__ void store_half(std::uint64_t* to, std::uint64_t v) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(v) : "memory");
}
__device__ __forceinline__ void store_number(void* to, std::uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
/// If `wanted`, without a branch that would split the loads around it.
__device__ __forceinline__ void load_word(bool wanted, const Word* from, Word& w) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\n"
      "@p ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];\n}"
      : "+l"(w.low), "+l"(w.high)
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
}
__device__ __forceinline__ std::uint32_t upper(std::uint64_t v) {
  return static_cast<std::uint32_t>(v >> 32);
}
__device__ __forceinline__ std::uint32_t lower(std::uint64_t v) {
  return static_cast<std::uint32_t>(v);
}
__device__ __forceinline__ std::uint64_t joined(std::uint32_t low, std::uint32_t high) {
  return static_cast<std::uint64_t>(high) << 32 | low;
}

constexpr int kGroups = 6;  // of words: there are 7 predicates

/// The words at(j), j < kCount, of those that are wanted, as soon as here(j, word). What is there
/// is not asked for again, for waiting must not slow down the weights on their way; but by groups
/// of words, which are wanted together: were there a predicate for each, some loads would have to
/// wait for the words of others.
template <int kCount, class Group, class At, class Wanted, class Here>
__device__ __forceinline__ void gather(Word (&v)[kCount], Group group, At at, Wanted wanted,
                                       Here here) {
  bool missing[kGroups] = {};
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    missing[group(j)] = wanted(j);
    v[j] = {};
  }
  bool any = false;
#pragma unroll
  for (const bool& m : missing) any |= m;
#pragma unroll 1
  while (any) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) load_word(missing[group(j)], at(j), v[j]);
    bool absent[kGroups] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) absent[group(j)] |= !here(j, v[j]);
    any = false;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      missing[g] &= absent[g];
      any |= missing[g];
    }
  }
  __syncwarp();
}
__device__ __forceinline__ uint4 values(const Word& w) {
  return make_uint4(lower(w.low), upper(w.low), lower(w.high), upper(w.high));
}
/// A part of a sum, whose last bit makes room for that of the number of its layer.
__device__ __forceinline__ std::uint32_t tagged(float v, unsigned epoch) {
  return (__float_as_uint(v) & ~1U) | (epoch & 1U);
}
__device__ __forceinline__ float untagged(std::uint32_t v) {
  return __uint_as_float(v & ~1U);
}
/// Whether all four parts are of that layer, rather than of the one before.
__device__ __forceinline__ bool of_layer(const Word& w, unsigned epoch) {
  const std::uint64_t tags = static_cast<std::uint64_t>(epoch & 1U) << 32 | (epoch & 1U);
  return (((w.low ^ tags) | (w.high ^ tags)) & 0x0000000100000001U) == 0;
}
/// Whether a word that is stored at once is there. By the larger of two: no branch may come between
/// the loads of several words.
__device__ __forceinline__ bool complete(const Word& w) {
  return max(upper(w.low), upper(w.high)) != kAbsent;
}
/// Whether all four of its numbers are, which are stored one by one.
__device__ __forceinline__ bool all_complete(const Word& w) {
  return max(max(upper(w.low), upper(w.high)), max(lower(w.low), lower(w.high))) != kAbsent;
}

// --- the warps that copy and prefetch ----------------------------------------------------------

template <class Z>
struct Copier {
  const Args& p;
  RingWriter<Z, true> ring;

  __device__ __forceinline__ void copy_states(const Layer& l) {
    const std::int64_t first_channel = static_cast<std::int64_t>(blockIdx.x) * Z::own(kIn);
    ring.copy(l.lrnn_state + first_channel * kDState, std::int64_t{Z::kChannels} * kDState * 4,
              p.batch, kStateBytes<Z>, kStateBytes<Z>);
  }
  __device__ __forceinline__ void run() {
    const Layer* const layers = ring.common.layers;
#pragma unroll 1
    for (int i = 0; i < p.layer_count; ++i) {
      ring.template copy_stage<kIn>(layers[i]);
      copy_states(layers[i]);
      ring.template copy_stage<kOut>(layers[i]);
    }
  }
};

/// The small operands of a layer.
template <class Z>
__device__ __forceinline__ void prefetch_small(const Layer& l, int batch, int lane) {
  prefetch_channels<Z>(l, batch, lane);
  if (lane == 0)
    prefetch_to_l2(l.norm_weight + static_cast<std::int64_t>(blockIdx.x) * Z::own(kOut));
  for (int row = lane; row < Z::kXDblRows; row += 32)
    for (int at = 0; at < Z::own(kIn); at += kSector / 2)
      prefetch_to_l2(l.weights[kXDbl] + std::int64_t{row} * Z::kChannels +
                     static_cast<std::int64_t>(blockIdx.x) * Z::own(kIn) + at);
}

// --- the warps that compute --------------------------------------------------------------------

template <class Z>
struct Computer {
  using To = Exchange<Z>;
  static constexpr int kChannels = Z::own(kIn);
  static constexpr int kOutputs = Z::own(kOut);
  static constexpr int kPairs = kChannels / kTileRows;  // of tiles of u and z
  static constexpr int kVec = kChannels / 16;           // products of depth 16 of own channels
  static_assert(kChannels % 16 == 0 && kOutputs % 8 == 0 && kOutputs <= 16);

  const Args& p;
  Shared<Z>& s;
  RingReader<Z> ring;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int batch = p.batch;
  const int block = static_cast<int>(blockIdx.x);
  const int first_channel = block * kChannels;
  const int first_output = block * kOutputs;
  // Of a tile, what this thread finishes.
  const int tile_row = thread % kTileRows;
  const int sequence = thread / kTileRows;
  int turn = 0;  // of the sets of partial sums
  float residual = 0.0F;

  __device__ __forceinline__ Word* words(unsigned epoch) const {
    return static_cast<Word*>(p.words) + static_cast<int>(epoch % To::kTurns) * To::kTurn;
  }
  /// Free from in_proj's last sums on to out_proj's first.
  [[nodiscard]] __device__ __forceinline__ typename Shared<Z>::Scratch& scratch() const {
    return s.sets[(turn + 1) % Shared<Z>::kSets].scratch;
  }
  /// Stores a word of this layer, and clears that of the layer after the next.
  __device__ __forceinline__ void publish(int at, Word w, unsigned epoch) const {
    store_word(words(epoch) + at, w);
    store_word(words(epoch + 2) + at, {~std::uint64_t{0}, ~std::uint64_t{0}});
  }
  /// v of 8 lanes, kStride apart, rounded: complete in the first.
  template <int kStride>
  __device__ __forceinline__ static Word pack(float v) {
    constexpr unsigned kAll = 0xFFFFFFFFU;
    const std::uint32_t pair = pack_bf16(v, __shfl_down_sync(kAll, v, kStride));
    const std::uint32_t second = __shfl_down_sync(kAll, pair, 2 * kStride);
    const std::uint32_t third = __shfl_down_sync(kAll, pair, 4 * kStride);
    const std::uint32_t fourth = __shfl_down_sync(kAll, pair, 6 * kStride);
    return {joined(pair, second), joined(third, fourth)};
  }

  // --- products ------------------------------------------------------------------------------
  /// Where the sum of a row of a tile is, so that neither 4 sequences of one half nor 2 sequences
  /// share a bank.
  __device__ __forceinline__ static int swizzled(int sequence, int row) {
    return row ^ sequence / 2 % 2 * kBufferRows;
  }
  __device__ __forceinline__ static float sum_of(const float (&c)[kSums][4], int e) {
    return (c[0][e] + c[1][e]) + (c[2][e] + c[3][e]);
  }
  /// Sums of this warp's part of half of a tile, to shared memory.
  __device__ __forceinline__ void store(const float (&c)[kSums][4], int which, int half) {
    float (&to)[kRows][kTileRows] = s.sets[turn].partials[which][warp];
    const int row = half * kBufferRows + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      *reinterpret_cast<float2*>(&to[8 * j + lane / 4][swizzled(lane / 4, row)]) =
          make_float2(sum_of(c, 2 * j), sum_of(c, 2 * j + 1));
  }
  __device__ __forceinline__ float finished(int which) const {
    float parts[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      parts[w] = s.sets[turn].partials[which][w][sequence][swizzled(sequence, tile_row)];
    return mamba_stack::sum_of(parts);
  }

  /// Steps of a stage whose weights wait in registers: of whole buffers, for the others stay in the
  /// ring.
  static constexpr int kHeldSteps = kMostSteps / Z::part(kIn) * Z::part(kIn);
  template <int kStage>
  using Held = mamba_stack::Held<Z, kStage, kHeldSteps>;

  /// Where depths k .. k + 7 of a sequence are in an operand: as lanes take them.
  __device__ __forceinline__ static int operand_word(int n, int k) {
    return (k / kStep * 2 + n / 8) * 32 + n % 8 * 4 + k % kStep / 8;
  }
  /// This lane's words of kCount steps of an operand, as gather() needs them.
  [[nodiscard]] __device__ __forceinline__ const Word* lane_words(const Word* operand) const {
    return operand + warp * 64 + lane;
  }
  __device__ __forceinline__ static constexpr int word_of(int j) {
    return j % 2 * 32 + j / 2 * (kWarps * 64);
  }
  template <int kCount>
  __device__ __forceinline__ static constexpr int group_of(int j) {
    return j % 2 + j / 2 * 4 / kCount * 2;
  }
  [[nodiscard]] __device__ __forceinline__ bool wanted(int j) const {
    return j % 2 * 8 + lane / 4 < batch;
  }
  template <int kStage>
  static constexpr int kAtOnce =
      Z::steps(kStage) / Z::ceil_div(Z::steps(kStage), kMostSteps);  // steps

  /// All products of a stage, whose first weights are held. take(x, i) brings the operand of
  /// kAtOnce steps from step i on; join(t) is a barrier of the warps, behind tile t; finish(t) gets
  /// tiles t and t + 1.
  template <int kStage, class Take, class Join, class Finish>
  __device__ __forceinline__ void products(const Held<kStage>& held, Take take, Join join,
                                           Finish finish) {
    constexpr int kSteps = Z::steps(kStage);
    constexpr int kTiles = Z::tiles(kStage);
    constexpr int kCount = kAtOnce<kStage>;
    constexpr int kPart = Z::part(kStage);
    constexpr int kLive = kSteps == kPart ? 1 : 2;  // halves of a tile, whose sums are not whole
    static_assert(kSteps % kCount == 0 && (kTiles == 1 || kSteps == kCount) && kCount % kPart == 0);
    Operand x[kCount];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float c[kLive][kSums][4] = {};
#pragma unroll
      for (int first = 0; first < kSteps; first += kPart) {
        if (t == 0 && first % kCount == 0) {
          Word words[2 * kCount];
          take(words, first);
#pragma unroll
          for (int i = 0; i < kCount; ++i)
            x[i] = Operand::of(values(words[2 * i]), values(words[2 * i + 1]), ring.none);
        }
#pragma unroll
        for (int h = 0; h < Z::halves(kStage, t); ++h) {
          float (&sums)[kSums][4] = c[h % kLive];
#pragma unroll
          for (int i = first; i < first + kPart; ++i) {
            const uint4 w = ring.take(held, t, h, i);
            multiply(sums, i, w, x[i % kCount]);
            ring.release();
          }
          if (first + kPart < kSteps) continue;
          if (Shared<Z>::kSets == 1 && t % 2 == 0 && h == 0) sync();
          store(sums, t % 2, h);
          clear(sums);
        }
      }
      if (t % 2 == 0 && t + 1 < kTiles) continue;
      join(t);
      finish(t / 2 * 2);
      turn = (turn + 1) % Shared<Z>::kSets;
    }
  }

  // --- r -> u, z -----------------------------------------------------------------------------
  // The factor 1 / rms of a row is that of its products, which therefore need not wait for it: what
  // is rounded is r weight.

  static constexpr int kSquares = Z::ceil_div(Z::kBlocks * 4, kThreads);  // words of a thread

  /// The operand, and the blocks' sums of squares of 4 sequences.
  template <int kCount>
  __device__ __forceinline__ void take_r(Word (&x)[kCount], Word (&squares)[kSquares],
                                         unsigned epoch) const {
    const Word* const from = lane_words(words(epoch) + To::r);
    const Word* const square_words = words(epoch) + To::squares + thread;
    Word all[kCount + kSquares];
    static_assert(4 + kSquares <= kGroups);
    gather(
        all, [](int j) { return j < kCount ? group_of<kCount>(j) : 4 + j - kCount; },
        [&](int j) {
          return j < kCount ? from + word_of(j) : square_words + (j - kCount) * kThreads;
        },
        [&](int j) {
          return j < kCount ? wanted(j) : thread + (j - kCount) * kThreads < Z::kBlocks * 4;
        },
        [](int j, const Word& w) { return j < kCount ? complete(w) : all_complete(w); });
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = all[j];
#pragma unroll
    for (int j = 0; j < kSquares; ++j) squares[j] = all[kCount + j];
  }
  /// Sums over every fourth lane.
  __device__ __forceinline__ static void add_lanes(float (&sums)[4]) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] += __shfl_xor_sync(0xFFFFFFFFU, sums[e], offset);
  }
  __device__ __forceinline__ void add_squares(const Word (&v)[kSquares]) const {
    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < kSquares; ++j) {
      sums[0] += __uint_as_float(lower(v[j].low));
      sums[1] += __uint_as_float(upper(v[j].low));
      sums[2] += __uint_as_float(lower(v[j].high));
      sums[3] += __uint_as_float(upper(v[j].high));
    }
    add_lanes(sums);
    if (lane < 4)
      *reinterpret_cast<float4*>(&s.squares[warp][4 * lane]) =
          make_float4(sums[0], sums[1], sums[2], sums[3]);
  }
  /// 1 / rms of this thread's sequence.
  __device__ __forceinline__ float rstd() const {
    float parts[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) parts[w] = s.squares[w][sequence];
    return rsqrtf(fmaf(mamba_stack::sum_of(parts), 1.0F / Z::kInputs, p.eps));
  }
  [[nodiscard]] __device__ __forceinline__ std::int64_t window_of(int own) const {
    return (sequence * std::int64_t{Z::kChannels} + first_channel + own) * kWidth;
  }
  __device__ __forceinline__ void finish_in(Window& w, const Layer& l, int own) const {
    const float factor = rstd();
    const float newest = rounded(finished(0) * factor);
    const float z = rounded(finished(1) * factor);
    s.u[sequence][own] = from_float<bf16>(w.convolve(newest));
    s.gate[sequence][own] = z * selective::fast_sigmoid(z);
    if (sequence < batch) *reinterpret_cast<float4*>(l.conv_state + window_of(own)) = w.values;
  }
  __device__ __forceinline__ void load(Window& w, const Layer& l, int own) const {
    if (sequence < batch) w.load(l, first_channel + own, window_of(own));
  }
  /// before_last() comes before the last tiles.
  template <class BeforeLast>
  __device__ __forceinline__ void in_proj(const Layer& l, unsigned epoch, BeforeLast before_last) {
    Window window{};
    load(window, l, tile_row);
    if (kPairs == 1) before_last();
    Word squares[kSquares];
    Held<kIn> held;
    ring.hold(held);
    products<kIn>(
        held,
        [&](auto& x, int) {
          take_r(x, squares, epoch);
          set_streaming<Z>(s.common, true);
        },
        [&](int t) {
          if (t == 1) add_squares(squares);
          sync();
        },
        [&](int t) {
          const int own = t / 2 * kTileRows + tile_row;
          finish_in(window, l, own);
          if (own + kTileRows >= kChannels) return;
          load(window, l, own + kTileRows);
          if (t / 2 == kPairs - 2) before_last();
        });
    set_streaming<Z>(s.common, false);
    meet(s.common);
  }

  // --- u -> x_dbl ------------------------------------------------------------------------------
  // Every block multiplies its own channels; the sums over the blocks are those of the block that
  // has a row.

  static constexpr int kXTiles = Z::kXDblRows / kTileRows;
  static constexpr int kMyTiles = Z::ceil_div(kXTiles, kWarps);

  /// kVec fragments' rows of this lane: neighbours in depth.
  struct Depth {
    uint2 v[kVec];
  };
  __device__ __forceinline__ static Depth load_depth(const bf16* row, int lane) {
    Depth d;
    if constexpr (kVec == 2) {
      const uint4 all = *reinterpret_cast<const uint4*>(row + lane % 4 * 8);
      d.v[0] = make_uint2(all.x, all.y);
      d.v[kVec - 1] = make_uint2(all.z, all.w);
    } else {
      d.v[0] = *reinterpret_cast<const uint2*>(row + lane % 4 * 4);
    }
    return d;
  }
  struct XWeights {
    Depth upper[kMyTiles], lower[kMyTiles];
  };
  __device__ __forceinline__ void load(XWeights& w, const Layer& l) const {
#pragma unroll
    for (int i = 0; i < kMyTiles; ++i) {
      const int tile = warp + i * kWarps;
      if (tile >= kXTiles) break;
      const bf16* const row = l.weights[kXDbl] +
                              std::int64_t{tile * kTileRows + lane / 4} * Z::kChannels +
                              first_channel;
      w.upper[i] = load_depth(row, lane);
      w.lower[i] = load_depth(row + std::int64_t{8} * Z::kChannels, lane);
    }
  }
  /// Of a block's part of a row: word q has sequences 4 q to 4 q + 3.
  static constexpr int kQuads = kRows / 4;
  __device__ __forceinline__ static int part_word(int row, int quad, int from) {
    return (row * Z::kBlocks + from) * kQuads + quad;
  }
  __device__ __forceinline__ void x_proj(const XWeights& w, unsigned epoch) const {
    if (warp >= kXTiles) return;
    Depth u[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)  // a lane gets sums of columns 2 q and 2 q + 1 of both
      u[half] = load_depth(s.u[lane / 8 * 4 + 2 * half + lane / 4 % 2], lane);
#pragma unroll
    for (int i = 0; i < kMyTiles; ++i) {
      const int tile = warp + i * kWarps;
      if (tile >= kXTiles) break;
      float c[2][4] = {};
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const std::uint32_t a[4] = {w.upper[i].v[k].x, w.lower[i].v[k].x, w.upper[i].v[k].y,
                                    w.lower[i].v[k].y};
#pragma unroll
        for (int half = 0; half < 2; ++half)
          multiply_add(c[half], a, u[half].v[k].x, u[half].v[k].y);
      }
      const int quad = lane % 4;
      if (4 * quad >= batch) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j)
        store_word(
            words(0) + To::partials + part_word(tile * kTileRows + lane / 4 + 8 * j, quad, block),
            {joined(tagged(c[0][2 * j], epoch), tagged(c[0][2 * j + 1], epoch)),
             joined(tagged(c[1][2 * j], epoch), tagged(c[1][2 * j + 1], epoch))});
    }
  }
  /// Adds four values over four lanes, kStride apart: lane j of them gets the sum of v[j].
  template <int kStride>
  __device__ __forceinline__ float sum_of_four(const float (&v)[4]) const {
    constexpr unsigned kAll = 0xFFFFFFFFU;
    const bool late = (lane & 2 * kStride) != 0;
    const bool odd = (lane & kStride) != 0;
    const float even_sum =
        (late ? v[2] : v[0]) + __shfl_xor_sync(kAll, late ? v[0] : v[2], 2 * kStride);
    const float odd_sum =
        (late ? v[3] : v[1]) + __shfl_xor_sync(kAll, late ? v[1] : v[3], 2 * kStride);
    return (odd ? odd_sum : even_sum) + __shfl_xor_sync(kAll, odd ? even_sum : odd_sum, kStride);
  }
  /// Sums over the lanes: of sequence lane / 8 of four.
  __device__ __forceinline__ float warp_sums(const float (&v)[4]) const {
    float sum = sum_of_four<8>(v);
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFU, sum, offset);
    return sum;
  }
  /// The four of warp_sums(), rounded, in every lane.
  __device__ __forceinline__ std::uint64_t packed(float sum) const {
    constexpr unsigned kAll = 0xFFFFFFFFU;
    const float neighbour = __shfl_xor_sync(kAll, sum, 8);
    const std::uint32_t pair =
        (lane & 8) != 0 ? pack_bf16(neighbour, sum) : pack_bf16(sum, neighbour);
    const std::uint32_t other = __shfl_xor_sync(kAll, pair, 16);
    return (lane & 16) != 0 ? joined(other, pair) : joined(pair, other);
  }
  /// A warp has a row for four sequences. The warps that have none wait for the others, whom they
  /// would slow down by asking for x_dbl.
  __device__ __forceinline__ void reduce_x_dbl(unsigned epoch) const {
    static_assert(Z::kXDblRows * kQuads <= kWarps * Z::kBlocks);
    const int mine = warp * Z::kBlocks + block;
    if (mine < Z::kXDblRows * kQuads) reduce_x_dbl(mine / kQuads, mine % kQuads, epoch);
    sync();
  }
  __device__ __forceinline__ void reduce_x_dbl(int row, int quad, unsigned epoch) const {
    constexpr int kCount = Z::kBlocks / 32;
    static_assert(Z::kBlocks % 32 == 0 && kCount <= kGroups);
    __nanosleep(kPartsPause);
    Word v[kCount];
    const Word* const from = words(0) + To::partials;
    gather(
        v, [](int j) { return j; },
        [&](int j) { return from + part_word(row, quad, lane + 32 * j); },
        [&](int) { return 4 * quad < batch; },
        [&](int, const Word& w) { return of_layer(w, epoch); });
    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      sums[0] += untagged(lower(v[j].low));
      sums[1] += untagged(upper(v[j].low));
      sums[2] += untagged(lower(v[j].high));
      sums[3] += untagged(upper(v[j].high));
    }
    const std::uint64_t word = packed(warp_sums(sums));
    // As publish(), half a word, all copies at once.
    const bool clears = lane >= To::kCopies;
    if (lane >= 2 * To::kCopies) return;
    Word* const to = words(epoch + (clears ? 2 : 0)) + To::x_dbl +
                     2 * (lane % To::kCopies * Z::kXDblRows + row) + quad / 2;
    store_half(quad % 2 == 0 ? &to->low : &to->high, clears ? ~std::uint64_t{0} : word);
  }
  __device__ __forceinline__ void take_x_dbl(unsigned epoch) const {
    __nanosleep(kPause);
    constexpr int kCount = Z::ceil_div(2 * Z::kXDblRows, kThreads);
    Word v[kCount];
    const Word* const from =
        words(epoch) + To::x_dbl + block % To::kCopies * 2 * Z::kXDblRows + thread;
    static_assert(kCount <= kGroups);
    gather(
        v, [](int j) { return j; }, [&](int j) { return from + j * kThreads; },
        [&](int j) { return thread + j * kThreads < 2 * Z::kXDblRows; },
        [](int, const Word& w) { return complete(w); });
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int i = thread + j * kThreads;
      if (i >= 2 * Z::kXDblRows) break;
      const std::uint32_t pairs[4] = {lower(v[j].low), upper(v[j].low), lower(v[j].high),
                                      upper(v[j].high)};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        reinterpret_cast<std::uint16_t&>(scratch().x_dbl[i % 2 * 8 + e][i / 2]) =
            static_cast<std::uint16_t>(pairs[e / 2] >> (e % 2 * 16));
    }
    sync();
  }

  // --- x_dbl -> v ------------------------------------------------------------------------------

  /// Of a tile of channels, for half of the sequences.
  struct DtWeights {
    uint2 upper[Z::kRank / 16], lower[Z::kRank / 16];
    float bias[2];
  };
  static constexpr int kDtWarps = 2 * kPairs;
  __device__ __forceinline__ void load(DtWeights& w, const Layer& l) const {
    if (warp >= kDtWarps) return;
    const int c = first_channel + warp / 2 * kTileRows + lane / 4;
    const bf16* const from = l.dt_weight + std::int64_t{c} * Z::kRank + lane % 4 * 4;
#pragma unroll
    for (int k = 0; k < Z::kRank / 16; ++k) {
      w.upper[k] = *reinterpret_cast<const uint2*>(from + 16 * k);
      w.lower[k] = *reinterpret_cast<const uint2*>(from + 8 * Z::kRank + 16 * k);
    }
    w.bias[0] = l.dt_bias[c];
    w.bias[1] = l.dt_bias[c + 8];
  }
  __device__ __forceinline__ void project_dt(const DtWeights& w) const {
    if (warp < kDtWarps) {
      const bf16* const x = scratch().x_dbl[warp % 2 * 8 + lane / 4] + lane % 4 * 4;
      float c[2][4] = {};
#pragma unroll
      for (int k = 0; k < Z::kRank / 16; ++k) {
        const std::uint32_t a[4] = {w.upper[k].x, w.lower[k].x, w.upper[k].y, w.lower[k].y};
        const uint2 b = *reinterpret_cast<const uint2*>(x + 16 * k);
        multiply_add(c[k % 2], a, b.x, b.y);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
        scratch().delta[warp % 2 * 8 + lane % 4 * 2 + e % 2]
                       [warp / 2 * kTileRows + lane / 4 + e / 2 * 8] =
            selective::softplus(rounded(c[0][e] + c[1][e]) + w.bias[e / 2]);
    }
    sync();
  }

  // kLanes lanes have a channel of a sequence; a warp 8 channels of one.
  static constexpr int kItems = kThreads / kLanes;  // at a time
  static constexpr int kRounds = kRows * kChannels / kItems;

  /// Parameters of the channel that a lane has.
  struct ScanLane {
    float4 A;
    float D;
  };
  [[nodiscard]] __device__ __forceinline__ int channel() const {
    return thread / kLanes % kChannels;
  }
  [[nodiscard]] __device__ __forceinline__ int sequence_of(int round) const {
    return thread / kLanes / kChannels + round * (kItems / kChannels);
  }
  [[nodiscard]] __device__ __forceinline__ std::int64_t state_of(int n) const {
    return (n * std::int64_t{Z::kChannels} + first_channel + channel()) * kDState +
           thread % kLanes * kStates;
  }
  __device__ __forceinline__ void load(ScanLane& a, const Layer& l) const {
    const int c = first_channel + channel();
    a.A = reinterpret_cast<const float4*>(l.A_log)[c * kLanes + thread % kLanes];
    a.D = l.D[c];
  }
  /// Moves a channel of a sequence on by its token; this lane's part of the output.
  __device__ __forceinline__ float advanced(const ScanLane& a, float4& h, int n) const {
    const int own = channel();
    const bf16* const x_dbl = scratch().x_dbl[n] + thread % kLanes * kStates;
    const uint2 B = *reinterpret_cast<const uint2*>(x_dbl + Z::kRank);
    const uint2 C = *reinterpret_cast<const uint2*>(x_dbl + Z::kRank + kDState);
    return advance(h, a.A, scratch().delta[n][own], to_float(s.u[n][own]),
                   make_float4(low(B.x), high(B.x), low(B.y), high(B.y)),
                   make_float4(low(C.x), high(C.x), low(C.y), high(C.y)));
  }
  /// Outputs of kLanes rounds, of which lane j finishes round first + j.
  __device__ __forceinline__ void publish_gated(const ScanLane& a, const float (&y)[kLanes], int n,
                                                unsigned epoch) const {
    const int own = channel();
    const float v = fmaf(a.D, to_float(s.u[n][own]), sum_of_four<1>(y)) * s.gate[n][own];
    const Word word = pack<kLanes>(v);
    if (lane < kLanes && n < batch)
      publish(To::v + operand_word(n, first_channel + own), word, epoch);
  }
  /// States of a lane, which leave the ring to weights while others are waited for.
  struct States {
    float4 h[kRounds];
  };
  __device__ __forceinline__ void take(States& states) {
    ring.wait();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      states.h[r] = reinterpret_cast<const float4*>(ring.buffer())[r * kThreads + thread];
      ring.seen |= __float_as_uint(states.h[r].x);
    }
    ring.next();
    ring.release();
  }
  __device__ __forceinline__ void scan(const Layer& l, const ScanLane& a, States& states,
                                       unsigned epoch) const {
    static_assert(kRounds % kLanes == 0 && kLanes == 4);
    float4(&h)[kRounds] = states.h;
#pragma unroll
    for (int r = 0; r < kRounds; r += kLanes) {
      float y[kLanes];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) y[j] = advanced(a, h[r + j], sequence_of(r + j));
      publish_gated(a, y, sequence_of(r + lane % kLanes), epoch);
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int n = sequence_of(r);
      if (n >= batch) break;
      *reinterpret_cast<float4*>(l.lrnn_state + state_of(n)) = h[r];
    }
  }

  // --- v -> r ------------------------------------------------------------------------------------

  /// r = x + residual of an output: to the others, and as it is stored.
  __device__ __forceinline__ void add_residual(float x, float norm_weight, unsigned epoch) {
    const bool exists = sequence < batch && tile_row < kOutputs;
    const float r = exists ? x + residual : 0.0F;
    const Word word = pack<1>(r * norm_weight);
    if (exists && tile_row % 8 == 0)
      publish(To::r + operand_word(sequence, first_output + tile_row), word, epoch);
    float square = r * r;
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2)
      square += __shfl_xor_sync(0xFFFFFFFFU, square, offset);
    if (tile_row == 0) {
      const int at = block * kRows + sequence;
      store_number(reinterpret_cast<float*>(words(epoch) + To::squares) + at,
                   __float_as_uint(square));
      store_number(reinterpret_cast<float*>(words(epoch + 2) + To::squares) + at, kAbsent);
    }
    residual = p.narrow_residual ? rounded(r) : r;
  }
  [[nodiscard]] __device__ __forceinline__ std::int64_t output() const {
    return sequence * std::int64_t{Z::kInputs} + first_output + tile_row;
  }
  [[nodiscard]] __device__ __forceinline__ float norm_weight(const Layer& l) const {
    return tile_row < kOutputs ? l.norm_weight[first_output + tile_row] : 0.0F;
  }
  __device__ __forceinline__ void enter() {
    float x = 0.0F;
    if (sequence < batch && tile_row < kOutputs) {
      if (p.residual != nullptr)
        residual = p.narrow_residual ? to_float(static_cast<const bf16*>(p.residual)[output()])
                                     : static_cast<const float*>(p.residual)[output()];
      x = to_float(p.x[output()]);
    }
    add_residual(x, norm_weight(s.common.layers[0]), p.epoch);
  }
  __device__ __forceinline__ void leave(float x) const {
    if (sequence >= batch || tile_row >= kOutputs) return;
    p.y[output()] = from_float<bf16>(x);
    if (p.narrow_residual)
      static_cast<bf16*>(p.residual_out)[output()] = from_float<bf16>(residual);
    else
      static_cast<float*>(p.residual_out)[output()] = residual;
  }
  /// The sum of this thread's output over all of the depth.
  __device__ __forceinline__ float finished_out(int rank, unsigned epoch) const {
    if constexpr (Z::kCluster == 1) return finished(0);
    static_assert(Z::kCluster == 1 || (Z::kCluster == 2 && kOutputs == kTileRows));
    send(&s.others[sequence][tile_row], s.mailbox, rank ^ 1, finished(rank ^ 1));
    const float mine = finished(rank);
    s.mailbox.wait(static_cast<int>((epoch - p.epoch) % 2));
    return mine + s.others[sequence][tile_row];
  }
  __device__ __forceinline__ void out_proj(const Held<kOut>& held, const Layer* next,
                                           unsigned epoch) {
    const float weight = next != nullptr ? norm_weight(*next) : 0.0F;
    const int rank = block % Z::kCluster;
    const Word* const from =
        lane_words(words(epoch) + To::v) + rank * operand_word(0, Z::depth(kOut));
    if (Z::kCluster > 1 && thread == 0) s.mailbox.expect(sizeof s.others);
    products<kOut>(
        held,
        [&](auto& x, int step) {
          gather(
              x, [](int j) { return group_of<2 * kAtOnce<kOut>>(j); },
              [&](int j) { return from + word_of(j + 2 * step); }, [&](int j) { return wanted(j); },
              [](int, const Word& w) { return complete(w); });
          if (step == 0) set_streaming<Z>(s.common, true);
        },
        [&](int) {
          set_streaming<Z>(s.common, false);
          ordered();  // the warps' barrier as well
        },
        [&](int) {
          const float x = rounded(finished_out(rank, epoch));
          if (next == nullptr)
            leave(x);
          else
            add_residual(x, weight, epoch + 1);
        });
  }

  __device__ __forceinline__ void run() {
    enter();
#pragma unroll 1
    for (int i = 0; i < p.layer_count; ++i) {
      const Layer& l = s.common.layers[i];
      const unsigned epoch = p.epoch + static_cast<unsigned>(i);
      XWeights x_weights{};
      in_proj(l, epoch, [&] { load(x_weights, l); });
      x_proj(x_weights, epoch);
      // Not before: x_proj would wait for these loads as well as for its own.
      ScanLane scan_lane{};
      load(scan_lane, l);
      DtWeights dt_weights{};
      load(dt_weights, l);
      // While others are waited for: what is taken leaves the ring to the next layer.
      States states;
      take(states);
      reduce_x_dbl(epoch);
      rates(scan_lane.A);
      Held<kOut> held;
      ring.hold(held);
      take_x_dbl(epoch);
      project_dt(dt_weights);
      scan(l, scan_lane, states, epoch);
      out_proj(held, i + 1 < p.layer_count ? &s.common.layers[i + 1] : nullptr, epoch);
    }
  }
};

#endif

template <class Z>
__global__ __launch_bounds__(kAllThreads, 1) void rows_kernel(const __grid_constant__ Args p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  auto& s = *reinterpret_cast<Shared<Z>*>(shared);
  char* const ring = shared + kRingOffset<Z>;
  if (Z::kCluster > 1 && threadIdx.x == 0) s.mailbox.init();
  s.common.prepare(p);
  if constexpr (Z::kCluster > 1) cluster_meet();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kWarps)
    Copier<Z>{p, {s.common, shared_address(ring), p.slots, lane}}.run();
  else if (warp > kWarps)
    prefetch_layers<true>(s.common, p.layer_count,
                          [&](const Layer& l) { prefetch_small<Z>(l, p.batch, lane); });
  else
    Computer<Z>{p, s, {s.common, ring, p.slots, p.none, lane, warp}}.run();
#endif
}

// --- host --------------------------------------------------------------------------------------

template <class Z>
bool step(Context& ctx, const MambaStackStep& a) {
  // To be more than a layer ahead costs more than it gains.
  constexpr int kSlots = Z::lesser(kMaxSlots, kLayerBuffers<Z>);
  return step_layers<Z>(ctx, a, rows_kernel<Z>, kRingOffset<Z>, kSlots, 0, [&] {
    Tensor words = ctx.empty(Shape{4 * Exchange<Z>::kWords}, DType::float32);
    ctx.runtime().fill_bytes(words, 0xFF);  // all absent, and of no layer
    return words;
  });
}

}  // namespace

bool step_rows(Context& ctx, const MambaStackStep& a) {
  if (a.x.dim(0) > kRows) return false;
  switch (a.x.dim(1)) {
    case 256:
      return step<Sizes<256, 32, kBytesExchanging>>(ctx, a);
    case 768:
      return step<Sizes<768, 96, kBytesExchanging>>(ctx, a);
    case 1024:
      return step<Sizes<1024, 128, kBytesExchanging>>(ctx, a);
    case 1536:
      return step<Sizes<1536, 96, kBytesExchanging, kBytesStreaming>>(ctx, a);
    case 2048:
      return step<Sizes<2048, 128, kBytesExchanging, kBytesStreaming, 2>>(ctx, a);
    default:
      return false;
  }
}

}  // namespace mamba_stack
}  // namespace lrnn::cuda
