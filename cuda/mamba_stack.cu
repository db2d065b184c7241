// A stack of Mamba blocks, one token of a few sequences, in one cooperative launch.
//
// A block owns 1 / kBlocks of the channels of E (their rows of in_proj, convolution, scan) and of
// the rows of x_proj and out_proj, the same in every layer. A layer has four stages, between which
// every block needs what all the others have made: r (the residual sum), u, [q | B | C] and v.
// There is no barrier: every value goes to L2 beside the number of its layer, in one store, and
// whoever needs it asks for it until it has that number. One warp of a block does nothing but copy
// the weights, which it reads through a ring of buffers, as far ahead of the others as the ring
// reaches, and one prefetches small operands. The other kWarps multiply on tensor cores, the few
// sequences as the left operand and rows of the weights as its columns, each a part of the depth;
// they take the first weights of a stage before they ask for its input, those of out_proj before
// they ask for x_dbl: the ring holds less than a layer, and goes on with the next.
//
// A sum is cut by its depth alone: 32 of every 256 go to each warp. So the bits depend neither on
// the device nor on the number of sequences.
//
// One sequence on an H200, recorded: 48 layers of d_model 2048 in 0.67 ms, weights at 3.8 TB/s,
// bound by HBM but for the exchanges that last longer than it takes to fill the ring. 24 layers of
// d_model 768 in 0.13 ms, bound by latency: an exchange takes about 1500 cycles, four of which are
// more than half of a layer. Clusters that make x_dbl for themselves would save one, but 128 blocks
// fit into clusters of two only.
#include "common/mamba_stack.cuh"
#include "common/mamba_stack_sm90.cuh"
#include "common/reduce.cuh"

namespace lrnn::cuda {
namespace mamba_stack {
namespace {

constexpr int kBlocks = 128;
constexpr int kBytesInFlight = 50000;  // of a block; more sequences exchange more, and want less
// For each row of x_proj that a block has, before one that has none asks for x_dbl.
[[maybe_unused]] constexpr unsigned kIdlePause = 500;  // ns
// Weights of dt that the lanes of a channel read at a time.
[[maybe_unused]] constexpr int kRankGroup = 4 * kLanes;

/// A value and the number of the layer that it belongs to.
using Word = std::uint64_t;

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
  alignas(128) bf16 operand[kRows][Z::kChannels + kPad];
  bf16 normal[kRows][Z::kInputs + kPad];
  alignas(16) float partials[2][2][kWarps][kRows][kTileRows];
  float x_dbl[kRows][Z::kXDblRows];
  float u[kRows][Z::own(kIn)];
  float gate[kRows][Z::own(kIn)];
  float residual[kRows][Z::own(kOut)];
  alignas(16) float squares[kRows][kWarps];
  Common common;
};
template <class Z, int kRows>
constexpr int kRingOffset = (static_cast<int>(sizeof(Shared<Z, kRows>)) + 127) / 128 * 128;

#if __CUDA_ARCH__ >= 900

constexpr int kMostAhead = 8;   // pairs of words that a thread asks for at a time
constexpr int kMostKept = 8;    // steps of an operand that stay in registers
constexpr int kHeldSteps = 16;  // of a stage, whose weights wait in registers

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

// --- the warps that copy and prefetch ----------------------------------------------------------

template <class Z>
__device__ __forceinline__ void copy_layers(const Args& p, RingWriter<Z, false> ring) {
  const Layer* const layers = ring.common.layers;
#pragma unroll 1
  for (int i = 0; i < p.layer_count; ++i) {
    ring.template copy_stage<kIn>(layers[i]);
    ring.template copy_stage<kXDbl>(layers[i]);
    ring.template copy_stage<kOut>(layers[i]);
  }
}
/// The small operands of a layer, and its states.
template <class Z>
__device__ __forceinline__ void prefetch_small(const Layer& l, int batch, int lane) {
  constexpr int kOwn = Z::own(kIn);
  prefetch_bytes(l.norm_weight, Z::kInputs * 4, lane);
  prefetch_channels<Z>(l, batch, lane);
  for (int n = 0; n < batch; ++n)
    prefetch_bytes(
        l.lrnn_state + (std::int64_t{n} * Z::kChannels + std::int64_t{blockIdx.x} * kOwn) * kDState,
        kOwn * kDState * 4, lane);
}

// --- the warps that compute --------------------------------------------------------------------

/// Parameters and states of a channel of a sequence that a lane has.
template <class Z>
struct ScanLane {
  static constexpr int kGroups = Z::kRank / kRankGroup;
  static_assert(Z::kRank % kRankGroup == 0 && Z::kXDblRows % Z::own(kXDbl) == 0);

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
  RingReader<Z> ring;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int batch = kRows == 1 ? 1 : p.batch;
  const int first_channel = static_cast<int>(blockIdx.x) * kChannels;
  const int first_output = static_cast<int>(blockIdx.x) * kOutputs;
  int turn = 0;  // of the two sets of partial sums

  [[nodiscard]] __device__ __forceinline__ Word* words() const {
    return static_cast<Word*>(p.words);
  }

  // --- products ------------------------------------------------------------------------------
  // A product has room for twice the sequences, so both products of a step take the same left
  // operand: its upper half the depths of the first, its lower half those of the second, which is
  // why an operand has the inner two of 4 pairs in the other order. Of the sums of a product the
  // other half is nothing.

  /// c += the products of step `step` with weights w.
  __device__ __forceinline__ static void multiply(float (&c)[kSums][4], int step, uint4 w,
                                                  uint4 x) {
    const std::uint32_t a[4] = {x.x, x.y, x.z, x.w};
    multiply_add(c[step % 2 * 2], a, w.x, w.y);
    multiply_add(c[step % 2 * 2 + 1], a, w.z, w.w);
  }
  __device__ __forceinline__ static float sum_of(const float (&c)[kSums][4], int e) {
    return (c[0][e] + c[1][e + 2]) + (c[2][e] + c[3][e + 2]);
  }
  /// Pair i of a sequence, to its place in an operand.
  __device__ __forceinline__ static void put(bf16* operand, int i, std::uint32_t pair) {
    const int place = i / 4 * 4 + i % 2 * 2 + i / 2 % 2;
    *reinterpret_cast<std::uint32_t*>(operand + 2 * place) = pair;
  }
  /// Sums of this warp's part of half of a tile, to shared memory.
  __device__ __forceinline__ void store(const float (&c)[kSums][4], int which, int half) {
    if (lane / 4 >= kRows) return;
    *reinterpret_cast<float2*>(
        &s.partials[turn][which][warp][lane / 4][half * kBufferRows + lane % 4 * 2]) =
        make_float2(sum_of(c, 0), sum_of(c, 1));
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
    return mamba_stack::sum_of(parts);
  }
  template <int kStage>
  using Held = mamba_stack::Held<Z, kStage, kHeldSteps>;

  /// All products of a stage, of whose weights the first are held. take() brings their operand;
  /// finish(t) gets tiles t and t + 1.
  template <int kStage, class Take, class Finish>
  __device__ __forceinline__ void products(const Held<kStage>& held, const bf16* operand, Take take,
                                           Finish finish) {
    constexpr int kSteps = Z::steps(kStage);
    constexpr int kTiles = Z::tiles(kStage);
    constexpr int kPart = Z::part(kStage);
    constexpr int kLive = kSteps <= kPart ? 1 : 2;  // halves of a tile, whose sums are not whole
    take();
    const bf16* const x =
        operand + lane / 4 * (Z::depth(kStage) + kPad) + lane % 4 * 8 + warp * kStep;
    const auto row = [&](int step) {
      return lane / 4 < batch ? *reinterpret_cast<const uint4*>(x + step * kUnit) : uint4{};
    };
    constexpr bool kKeeps = kPart <= kMostKept;
    uint4 rows[kKeeps ? kPart : 1];  // of the part of the depth that all tiles or halves take
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float c[kLive][kSums][4] = {};
#pragma unroll
      for (int first = 0; first < kSteps; first += kPart) {
        if (kKeeps && (t == 0 || kPart < kSteps))
#pragma unroll
          for (int i = 0; i < Z::lesser(kPart, kSteps - first); ++i)
            rows[kKeeps ? i : 0] = row(first + i);
#pragma unroll
        for (int h = 0; h < Z::halves(kStage, t); ++h) {
          float (&sums)[kSums][4] = c[h % kLive];
#pragma unroll
          for (int i = first; i < Z::lesser(kSteps, first + kPart); ++i) {
            const uint4 w = ring.take(held, t, h, i);
            multiply(sums, i, w, kKeeps ? rows[kKeeps ? i - first : 0] : row(i));
            ring.release();
          }
          if (first + kPart < kSteps) continue;
          store(sums, t % 2, h);
          clear(sums);
        }
      }
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
            return exists ? words() + To::r + n * Z::kInputs + 2 * pair : nullptr;
          },
          [&](int j, std::uint32_t one, std::uint32_t two) {
            const float2 r = make_float2(__uint_as_float(one), __uint_as_float(two));
            const float2 w = weights[first + j / kRows];
            const int n = j % kRows;
            put(s.normal[n], thread + (first + j / kRows) * kThreads,
                pack_bf16(r.x * w.x, r.y * w.y));
            squares[n] = fmaf(r.y, r.y, fmaf(r.x, r.x, squares[n]));
          });
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      squares[n] = warp_sum(squares[n]);
      if (lane == 0) s.squares[n][warp] = squares[n];
    }
    meet(s.common);
  }
  /// 1 / rms of this thread's sequence.
  __device__ __forceinline__ float rstd() const {
    float parts[kWarps];
    load_vec<float, 4>(s.squares[sequence()], *reinterpret_cast<float (*)[4]>(parts));
    load_vec<float, 4>(s.squares[sequence()] + 4, *reinterpret_cast<float (*)[4]>(parts + 4));
    return rsqrtf(fmaf(mamba_stack::sum_of(parts), 1.0F / Z::kInputs, p.eps));
  }
  [[nodiscard]] __device__ __forceinline__ std::int64_t window_of(int own) const {
    return (sequence() * std::int64_t{Z::kChannels} + first_channel + own) * kWidth;
  }
  [[nodiscard]] __device__ __forceinline__ bool finishes(int own, int count) const {
    return own < count && sequence() < batch;
  }
  __device__ __forceinline__ void load(Window& w, const Layer& l, int own) const {
    if (which() != 0 || !finishes(own, kChannels)) return;
    w.load(l, first_channel + own, window_of(own));
  }
  /// Channels `own` and the next one of a sequence.
  __device__ __forceinline__ void publish_pair(int to, int n, int own, float mine, float next,
                                               unsigned epoch) const {
    publish(words() + to + (n * Z::kChannels + first_channel + own) / 2, pack_bf16(mine, next),
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
    if (exists) u = w.convolve(v);
    const float next = __shfl_down_sync(kRows == 1 ? 0xFFFFU : 0xFFFFFFFFU, u, 1);
    if (!exists) return;
    if (own % 2 == 0) publish_pair(To::u, sequence(), own, u, next, epoch);
    s.u[sequence()][own] = u;
    *reinterpret_cast<float4*>(l.conv_state + window_of(own)) = w.values;
  }
  __device__ __forceinline__ void in_proj(const Layer& l, unsigned epoch) {
    Window window{};
    load(window, l, tile_row());
    Held<kIn> held;
    ring.hold(held);
    products<kIn>(
        held, s.normal[0], [&] { take_r(l, epoch); },
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
    __nanosleep(kPause);
#pragma unroll
    for (int first = 0; first < kPerThread; first += kAhead)
      gather<kAhead * kRows>(
          epoch,
          [&](int j) -> const Word* {
            const int pair = thread + (first + j / kRows) * kThreads;
            const int n = j % kRows;
            const bool exists = pair < kPairs && n < batch;
            return exists ? words() + offset + n * (Z::kChannels / 2) + 2 * pair : nullptr;
          },
          [&](int j, std::uint32_t one, std::uint32_t two) {
            const int pair = 2 * (thread + (first + j / kRows) * kThreads);
            put(s.operand[j % kRows], pair, one);
            put(s.operand[j % kRows], pair + 1, two);
          });
    sync();
  }
  __device__ __forceinline__ void x_proj(const Layer&, unsigned epoch) {
    constexpr int kOwn = Z::own(kXDbl);
    const int first = static_cast<int>(blockIdx.x) * kOwn;
    if (first >= Z::kXDblRows) return;
    Held<kXDbl> held;
    ring.hold(held);
    products<kXDbl>(
        held, s.operand[0], [&] { take_operand(To::u, epoch); },
        [&](int t) {
          const int own = (t + which()) * kTileRows + tile_row();
          if (!finishes(own, kOwn)) return;
          publish(words() + To::x_dbl + sequence() * Z::kXDblRows + first + own,
                  __float_as_uint(rounded(finished())), epoch);
        });
  }
  /// r = x + residual: to the others, and as it is stored.
  __device__ __forceinline__ void add_residual(int own, int n, float x, float before,
                                               unsigned epoch) const {
    const float r = x + before;
    publish(words() + To::r + n * Z::kInputs + first_output + own, __float_as_uint(r), epoch);
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
  __device__ __forceinline__ void out_proj(const Held<kOut>& held, bool last, unsigned epoch) {
    products<kOut>(
        held, s.operand[0], [&] { take_operand(To::v, epoch); },
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
  /// Moves a channel on by its token; the gated output.
  __device__ __forceinline__ float gated(ScanLane<Z>& a, int i) const {
    const int n = i < batch * kChannels ? i / kChannels : 0;
    const int own = i % kChannels;
    const float* const x_dbl = s.x_dbl[n];
    const float u = s.u[n][own];
    const float gate = s.gate[n][own];
    const float* const lane_x_dbl = x_dbl + thread % kLanes * kStates;
    const float4 B = *reinterpret_cast<const float4*>(lane_x_dbl + Z::kRank);
    const float4 C = *reinterpret_cast<const float4*>(lane_x_dbl + Z::kRank + kDState);
    const float delta = selective::softplus(project_dt(a, x_dbl) + a.dt_bias);
    const float y = advance(a.h, a.A, delta, u, B, C);
    return rounded(fmaf(a.D, u, lane_sum(y)) * gate);
  }
  __device__ __forceinline__ void take_x_dbl(unsigned epoch) const {
    constexpr int kPairs = Z::kXDblRows / 2;
    static_assert(kPairs <= kThreads);
    constexpr int kOwn = Z::own(kXDbl);
    __nanosleep(kPause * kOwn);
    if (static_cast<int>(blockIdx.x) * kOwn >= Z::kXDblRows) __nanosleep(kIdlePause * kOwn);
    gather<kRows>(
        epoch,
        [&](int n) -> const Word* {
          const bool exists = thread < kPairs && n < batch;
          return exists ? words() + To::x_dbl + n * Z::kXDblRows + 2 * thread : nullptr;
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
      const float v = gated(a, i);
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
      const Layer& l = s.common.layers[i];
      const unsigned epoch = p.epoch + static_cast<unsigned>(i);
      in_proj(l, epoch);
      ScanLane<Z> scan_lane{};
      load(scan_lane, l, thread / kLanes);
      x_proj(l, epoch);
      Held<kOut> held;
      ring.hold(held);
      scan(l, scan_lane, epoch);
      out_proj(held, i + 1 == p.layer_count, epoch);
    }
  }
};

#endif

template <class Z, int kRows>
__global__ __launch_bounds__(kAllThreads, 1) void stack_kernel(const __grid_constant__ Args p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  auto& s = *reinterpret_cast<Shared<Z, kRows>*>(shared);
  char* const ring = shared + kRingOffset<Z, kRows>;
  s.common.prepare(p);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kWarps)
    copy_layers<Z>(p, {s.common, shared_address(ring), p.slots, lane});
  else if (warp > kWarps)
    prefetch_layers<false>(s.common, p.layer_count,
                           [&](const Layer& l) { prefetch_small<Z>(l, p.batch, lane); });
  else
    Computer<Z, kRows>{p, s, {s.common, ring, p.slots, p.none, lane, warp}}.run();
#endif
}

// --- host --------------------------------------------------------------------------------------

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

template <class Z, int kRows>
bool step(Context& ctx, const MambaStackStep& a) {
  // Cleared: no layer has number 0.
  return step_layers<Z>(ctx, a, stack_kernel<Z, kRows>, kRingOffset<Z, kRows>, kMaxSlots, 1, [&] {
    return ctx.zeros(Shape{2 * std::int64_t{Exchange<Z, kRows>::kWords}}, DType::float32);
  });
}

template <class Z>
bool step_few(Context& ctx, const MambaStackStep& a) {
  switch (a.x.dim(0)) {
    case 1:
      return step<Z, 1>(ctx, a);
    case 2:
      return step<Z, 2>(ctx, a);
    default:
      return step_rows(ctx, a);
  }
}

bool step_together(Context& ctx, const MambaStackStep& a) {
  if (!usual(a) || !aligned(a)) return false;
  switch (a.x.dim(1)) {
    case 256:
      return step_few<Sizes<256, kBlocks, kBytesInFlight>>(ctx, a);
    case 768:
      return step_few<Sizes<768, kBlocks, kBytesInFlight>>(ctx, a);
    case 1024:
      return step_few<Sizes<1024, kBlocks, kBytesInFlight>>(ctx, a);
    case 1536:
      return step_few<Sizes<1536, kBlocks, kBytesInFlight>>(ctx, a);
    case 2048:
      return step_few<Sizes<2048, kBlocks, kBytesInFlight>>(ctx, a);
    default:
      return false;
  }
}

}  // namespace
}  // namespace mamba_stack

void mamba_stack_step(Context& ctx, const MambaStackStep& a) {
  if (mamba_stack::step_together(ctx, a)) return;
#ifdef LRNN_WITH_SM90A
  if (linear_sm90::mamba_stack_step(ctx, a)) return;
#endif
  lrnn::detail::mamba_stack_by_parts(ctx, a);
}

}  // namespace lrnn::cuda
