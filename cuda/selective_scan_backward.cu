// Backward. Ownership: common/selective_scan.cuh.
//
// A block walks the chunks of its segment from the right. A chunk is replayed from its saved state,
// which leaves a state every kSubTile steps in shared memory; from there the states and multipliers
// of kSubTile steps are recomputed into registers and the adjoint g runs through them:
//   g_t = C_t dy_t + a_{t+1} g_{t+1},   dy already multiplied by the gate.
// dB and dC are sums over channels: shuffles add the channels of a warp (OrderedLayout,
// HalvedLayout; for 17 to 32 states tensor cores those of a quad of lanes, common/quad_sum.cuh),
// shared memory the warps of a block, while the next steps are worked on, and a second kernel the
// tiles of channels, all in fixed order.
//
// Why not tensor cores: a product of mma.m16n8k8 in TF32 keeps a scheduler of an H200 from
// multiply-adds for 6 cycles, the shuffles and selections fill slots that those leave, and they are
// exact. B8 L2048 D1536 N16 took 0.66 ms with them in bfloat16, 0.79 in float.
//
// Bound by multiply-adds, shared memory and latency together, with three warps per scheduler, at
// N64 two. B8 L2048 D1536 on an H200: bfloat16 N16 0.595 ms, 48 % of the limit of 20 instructions
// per state and 30 per channel; a warp issues 125 instructions per step of its 128 states, in 70 %
// of the cycles, L1 and shared memory are busy for 69 %. N64 2.30 ms: 210 instructions per step of
// 256 states in 62 %, shared memory 65 %. Float 0.613 and 2.33 ms; of the first the sub-tiles are
// 71 % of the instructions and 57 % of the time, replay 13 and 15 %, what a window begins and ends
// with 16 and 28 %. More warps (8 lanes of 2 states, 6 per scheduler) issued in no more than 71 %
// of the cycles; a warp of its own for copies and for the parts of dB and dC gained nothing.
#include "common/quad_sum.cuh"
#include "common/selective_scan.cuh"
#include "common/split_barrier.cuh"

namespace lrnn::cuda {
namespace selective {
namespace {

/// Layout of up to 16 states, where shuffles add the channels of a warp. Lanes hold their four
/// states in the order i ^ x, each with its own x, so that none selects what it sends: the first
/// half of its numbers stays, the second one goes. B and C lie in shared memory in all orders.
/// Lanes i and i ^ 1 have the same channel, i and i ^ 2 the same states and order: shared memory
/// serves half a warp at once.
struct OrderedLayout : Layout<4, 4, 32> {
  static constexpr int kOrders = 4;

  static __device__ int part_of(int thread) { return thread % 2 + thread % 32 / 16 * 2; }
  static __device__ int channel_of(int thread) { return thread / 32 * 8 + thread % 16 / 2; }
  static __device__ int order_of(int thread) { return (thread >> 1 & 2) + (thread >> 3 & 1); }
};
template <class P>
constexpr bool kOrdered = std::is_base_of_v<OrderedLayout, P>;

/// The same for 64 states, as far as B and C need no copies: half of the lanes hold their eight
/// states in the order i ^ 4. Lanes i and i ^ 1 have the same channel, i and i ^ 2 the same states.
struct HalvedLayout : Layout<8, 8, 16> {
  static __device__ int part_of(int thread) { return thread % 2 + thread % 32 / 8 * 2; }
  static __device__ int channel_of(int thread) { return thread / 32 * 4 + thread % 8 / 2; }
  static __device__ int order_of(int thread) { return thread & 4; }
};
template <class P>
constexpr bool kHalved = std::is_base_of_v<HalvedLayout, P>;

/// How the backward pass splits a chunk: kSteps per staged window, kSubTile steps whose states are
/// in registers and whose sums over states are added at once, kAdded steps per addition of the
/// parts of dB and dC (a turn), kBlocks blocks per multiprocessor to leave registers for,
/// kWindowsHeld windows in shared memory.
template <class L, int kSteps_, int kSubTile_, int kAdded_, int kBlocks_, int kWindowsHeld_>
struct Plan : L {
  using Base = L;
  static constexpr int kSteps = kSteps_;
  static constexpr int kSubTile = kSubTile_;
  static constexpr int kAdded = kAdded_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kWindowsHeld = kWindowsHeld_;
  static constexpr int kSums = 2 * L::kN;           // dB and dC of one step
  static constexpr bool kQuads = L::kPerWarp >= 4;  // whether a quad holds four channels
  static constexpr int kParts = kQuads ? L::kChannels / 4 : L::kWarps;  // of each sum of a block
  // Strides that spread over the banks what a warp writes at once.
  static constexpr int kSumsRow = kSums + 4;
  static constexpr int kSumsPad = 16;
  static constexpr int kSumsPart = kAdded * kSumsRow + kSumsPad;
  // With two sets of parts, one is added while the other is written.
  static constexpr int kSumsHeld = kQuads ? 2 : 1;
  static_assert(kSteps % kAdded == 0 && kAdded % kSubTile == 0 && L::kLanes >= kSubTile &&
                kSubTile % kQuadTurns == 0);
};

/// What is prepared of the channels, four steps of a channel side by side: a thread reads those of
/// its channel at once, and lanes that finish one step each meet different banks.
template <class P>
using PerStep = float[P::kSteps / 4][P::kChannels][4];

/// Whether what is prepared of dt and z takes their place in the window, which loses nothing then.
template <class T, class P>
constexpr bool kInPlace = kOrdered<P> && std::is_same_v<T, float>;

/// As PerStep, unless it takes the place of an operand.
template <class T, class P>
using Apart = float[kInPlace<T, P> ? 1 : P::kSteps / 4][kInPlace<T, P> ? 1 : P::kChannels][4];

/// The vectors of a tile of kRows x kWidth that the calling thread copies, `kTurnRows` rows apart.
template <class T, int kRows, int kWidth, int kThreads>
struct TileVectors {
  static constexpr bool kExist = kWidth % kWide<T> == 0;
  static constexpr int kVec = kExist ? kWide<T> : 1;
  static constexpr int kPerRow = kWidth / kVec;
  static constexpr int kTurnRows = kThreads / kPerRow;
  static constexpr int kTurns = kTurnRows < kRows ? kRows / kTurnRows : 1;
  static_assert(!kExist || (kThreads % kPerRow == 0 && (kTurns == 1 || kRows % kTurnRows == 0)));

  int row = static_cast<int>(threadIdx.x) / kPerRow;
  int column = static_cast<int>(threadIdx.x) % kPerRow * kVec;

  /// Calls f(place in the tile, row, rows behind `row`).
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) const {
    if (kTurnRows > kRows && row >= kRows) return;
#pragma unroll
    for (int k = 0; k < kTurns; ++k)
      f((static_cast<int>(threadIdx.x) + k * kThreads) * kVec, row + k * kTurnRows, k * kTurnRows);
  }
  /// Where `row` of a tile begins, whose first row is `first`. Rows and strides are int here.
  template <class U>
  __device__ __forceinline__ U* in(const DeviceRows<U>& rows, int first, int first_column) const {
    return rows.data +
           (std::int64_t{first + row} * static_cast<int>(rows.stride) + (first_column + column));
  }
  /// Rows from `rows` and columns from `columns` on are zero.
  __device__ __forceinline__ void load(T* tile, const DeviceRows<const T>& from, int first,
                                       int rows, int first_column, int columns) const {
    const T* const corner = in(from, first, first_column);
    const bool inside = first_column + column < columns;
    for_each([&](int i, int r, int behind) {
      copy_16_bytes_async(tile + i, corner + behind * static_cast<int>(from.stride),
                          inside && r < rows);
    });
  }
};

/// What is loaded of a window and replaced by the gradients.
template <class T, class P>
struct Window {
  alignas(16) T u[P::kSteps][P::kChannels];   // then du
  alignas(16) T dt[P::kSteps][P::kChannels];  // then ddt
  alignas(16) T z[P::kSteps][P::kChannels];   // then dz
};

/// With two windows in shared memory, one is loaded while the other is worked on.
template <class T, class P>
constexpr int kWindowsHeld = std::is_same_v<T, float> ? 1 : P::kWindowsHeld;

/// How the parts of dB and dC of a turn lie in shared memory.
template <class P>
struct SumsLayout {
  static constexpr int kParts = kOrdered<P> ? P::kWarps : P::kParts;
  static constexpr int kRow = kOrdered<P> ? P::kSums : P::kSumsRow;
  static constexpr int kPart = kOrdered<P> ? P::kAdded * kRow : P::kSumsPart;
  static constexpr int kSize = kParts * kPart - (kOrdered<P> ? 0 : P::kSumsPad);
};

/// Place of column 0 of a row among columns in shared memory, to be combined by exclusive or: the
/// lanes that finish steps side by side meet different banks.
template <class T, class P>
__device__ __forceinline__ constexpr int spread(int row) {
  return kInPlace<T, P> ? row % 4 * 8 : 0;
}

/// Whether the states that enter the last sub-tile of a chunk stay in registers: with two windows
/// there is no shared memory for them.
template <class T, class P>
constexpr bool kCarried = kOrdered<P> && P::kSteps == kChunk && kWindowsHeld<T, P> == 2;

template <class T, class P, bool kGeneral>
struct BackwardShared {
  Window<T, P> window[kWindowsHeld<T, P>];
  alignas(16) T dy[P::kSteps][P::kChannels];
  alignas(16) T raw_B[P::kSteps][P::kN];
  alignas(16) T raw_C[P::kSteps][P::kN];
  alignas(16) PerStep<P> delta;
  alignas(16) PerStep<P> input;  // delta u; general: u
  alignas(16) PerStep<P> dy_gated;
  alignas(16) Apart<T, P> slope;    // of delta over dt; or in place of dt
  alignas(16) Apart<T, P> dz_of_y;  // dz divided by y before the gate; or in place of z
  static constexpr int kKept = kChunk / P::kSubTile - (kCarried<T, P> ? 1 : 0);
  alignas(16) float states[kKept][P::kThreads][P::kStates];  // that enter the sub-tiles
  alignas(16) float sums[P::kSumsHeld][SumsLayout<P>::kSize];
  SplitBarrier added;
  std::int64_t first_states;  // row of the states of channel 0 that enter the sequence
  // B and C in all orders, or in float, unless T is.
  static constexpr int kWidened = kOrdered<P> ? P::kSteps * OrderedLayout::kOrders * P::kN
                                  : std::is_same_v<T, float> ? 1
                                                             : P::kSteps * P::kN;
  alignas(kWidened > 1 ? 16 : 4) float B[kWidened];
  alignas(kWidened > 1 ? 16 : 4) float C[kWidened];
  float alpha[kGeneral ? P::kSteps : 1][kGeneral ? P::kChannels : 1];
  float dtau[kGeneral ? P::kSteps : 1][kGeneral ? P::kChannels : 1];
};

template <class T>
struct BackwardArgs {
  Operands<T> in;
  DeviceRows<const T> dy;
  const float* chunk_states;
  bool wide_saved = false;  // chunk_states allows vectors of the states of a thread
  Starts starts{};          // of gradients, from the right
  DeviceRows<T> du, ddt, dz;
  float* dstate_in;
  // A launch covers part of the blocks and their rows: [tiles, rows, sums of a step] and
  // [tiles, rows].
  int first_block = 0;
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  float* dBC = nullptr;
  float* dtau = nullptr;      // event mode
  float* dA_log = nullptr;    // [B, S, E, N]
  float* dvectors = nullptr;  // [B, S, 3, E]: dt_bias, D, dtA_bias

  BackwardArgs(const SelectiveScanBackward& a, const Sizes& sizes)
      : in(a.in, sizes),
        dy(device_rows<T>(a.dy)),
        chunk_states(a.chunk_states.data<float>()),
        du(device_rows<T>(a.du)),
        ddt(device_rows<T>(a.ddt)),
        dz(a.dz ? device_rows<T>(a.dz) : DeviceRows<T>{nullptr, 0}),
        dstate_in(data_or_null<float>(a.dstate_in)) {}
};

/// As read_shared() and write_shared(), for two floats too.
template <int kCount>
__device__ __forceinline__ void read_few(const float* p, float (&v)[kCount]) {
  if constexpr (kCount == 2) {
    const float2 q = *reinterpret_cast<const float2*>(p);
    v[0] = q.x;
    v[1] = q.y;
  } else {
    read_shared<kCount>(p, v);
  }
}
template <int kCount>
__device__ __forceinline__ void write_few(float* p, const float (&v)[kCount]) {
  if constexpr (kCount == 2)
    *reinterpret_cast<float2*>(p) = make_float2(v[0], v[1]);
  else
    write_shared<kCount>(p, v);
}
/// To global memory, by one instruction: the compiler would take one for each number.
template <int kCount>
__device__ __forceinline__ void store_few(float* p, const float (&v)[kCount]) {
  if constexpr (kCount == 2)
    __stcg(reinterpret_cast<float2*>(p), make_float2(v[0], v[1]));
  else
    __stcg(reinterpret_cast<float4*>(p), make_float4(v[0], v[1], v[2], v[3]));
}
/// As write_states().
template <class L>
__device__ __forceinline__ void write_few_states(float* base, std::int64_t row, const Place<L>& at,
                                                 int dstate, const float (&h)[L::kStates]) {
  if constexpr (L::kStates % 4 == 0) {
    write_states<L>(base, row, at, dstate, h);
  } else {
    if (!at.active) return;
#pragma unroll
    for (int i = 0; i < L::kStates; ++i) {
      const int n = at.part * L::kStates + i;
      if (n < dstate) base[row * dstate + n] = h[i];
    }
  }
}

__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
/// fast_sigmoid() without the cases of subnormal numbers.
__device__ __forceinline__ float gate_of(float z) {
  return reciprocal(1.0F + exp2_approx(-kLog2e * z));
}

/// softplus(x), as in common/selective_scan.cuh, for x in bfloat16 as in the forward pass, and its
/// derivative.
template <class T>
__device__ __forceinline__ float softplus_slope(float x, float& slope) {
  const float e = exp2_approx(-kLog2e * fabsf(x));
  if constexpr (!std::is_same_v<T, float>) {
    slope = (x < 0.0F ? e : 1.0F) * reciprocal(1.0F + e);
    return softplus_of_step<T>(x);
  }
  const float s = e * reciprocal(2.0F + e);
  const float w = s * s;
  float p = fmaf(w, 0.281577784F, 0.279651577F);
  p = fmaf(p, w, 0.400245952F);
  p = fmaf(p, w, 0.666663216F);
  p = fmaf(p, w, 2.0F);
  slope = (x < 0.0F ? e : 1.0F) * reciprocal(1.0F + e);
  return fmaf(p, s, fmaxf(x, 0.0F));
}

/// d/dA of expm1(delta A) / A = delta^2 psi(x), x = delta A, psi(x) = ((x - 1) e^x + 1) / x^2,
/// which is the sum over k of x^k / (k! (k + 2)).
__device__ float zoh_factor_dA(float delta, float A) {
  const float x = delta * A;
  float psi = 0.0F;
  if (fabsf(x) < 0.5F) {
    float term = 1.0F;
    for (int k = 0; k < 10; ++k) {
      psi += term / static_cast<float>(k + 2);
      term *= x / static_cast<float>(k + 1);
    }
  } else {
    psi = ((x - 1.0F) * expf(x) + 1.0F) / (x * x);
  }
  return delta * delta * psi;
}

/// Adds the gradients that da and dk mean for alpha, delta and A; returns that of A.
__device__ __forceinline__ float chain_rule(Disc disc, float da, float dk, float a, float alpha,
                                            float delta, float A, float& dalpha, float& ddelta) {
  if (disc == Disc::Bilinear) {
    const float ra = 1.0F / (1.0F - 0.5F * alpha * A);
    const float rk = 1.0F / (1.0F - 0.5F * delta * A);
    dalpha = fmaf(da * A, ra * ra, dalpha);
    ddelta = fmaf(dk * rk, rk, ddelta);
    return da * alpha * ra * ra + 0.5F * dk * delta * delta * rk * rk;
  }
  dalpha = fmaf(da * a, A, dalpha);
  float dA = da * a * alpha;
  if (disc == Disc::Mamba) ddelta += dk;
  if (disc == Disc::Zoh) {
    ddelta = fmaf(dk, expf(delta * A), ddelta);
    dA = fmaf(dk, zoh_factor_dA(delta, A), dA);
  }
  return dA;
}

/// The work of one block.
template <class T, class P, bool kGeneral>
struct Backward {
  using L = typename P::Base;
  using Shared = BackwardShared<T, P, kGeneral>;
  static constexpr int kThreads = P::kThreads;
  static constexpr int kSteps = P::kSteps;
  static constexpr int kStates = P::kStates;

  const BackwardArgs<T>& p;
  const Place<L>& at;
  Shared& s;
  Window<T, P>* window;   // in work
  std::int64_t partials;  // row of position 0 among the partial sums of the launch
  float* partial_sums;    // what the thread writes of its row
  unsigned turn = 0;      // of adding dB and dC over the block
  int turn_step = 0;      // position of the first step of the last turn
  float A[kStates];       // times log2(e) unless general
  float g[kStates];       // a_{t+1} g_{t+1}
  float dA[kStates] = {};
  float dD = 0.0F;
  float dbias = 0.0F;
  float drate = 0.0F;
  float D;
  float rate = 0.0F;
  // Of a sub-tile, the lanes of a channel finish one step each: its place beside the first step, in
  // a tile of channels and in what is per step.
  static constexpr int kCopies = P::kLanes / P::kSubTile;  // lanes with the same step
  int finished;
  int finished_step;
  int own;   // where the states of the thread begin in a row of B or C
  int kept;  // place of the sum that the lane keeps
  // Of the channel of the calling thread while a window is prepared.
  float prepared_bias = 0.0F;
  float prepared_rate = 0.0F;

  __device__ Backward(const BackwardArgs<T>& args, const Place<L>& place, Shared& shared)
      : p(args),
        at(place),
        s(shared),
        window(shared.window),
        partials(place.tile * args.rows + (place.first_row - args.first_row)) {
    const auto thread = static_cast<int>(threadIdx.x);
    partial_sums = p.dBC + (partials * P::kSums + thread * kAddedAtOnce);
    const int step = at.part / kCopies;
    finished = step * P::kChannels + (at.local ^ spread<T, P>(step));
    finished_step = step / 4 * P::kChannels * 4 + at.local * 4 + step % 4;
    kept = thread / 32 * SumsLayout<P>::kPart + at.part * 8 + (thread & 2) * 2 + own_order();
    asm volatile("" : "+r"(kept));  // not computed again
    own = kOrdered<P> ? place_of(at.part, own_order()) : at.part * kStates + own_order();
    const Operands<T>& in = p.in;
    read_A<L>(in.A_log, at, in.sizes.dstate, kGeneral ? 1.0F : kLog2e, A);
    reorder(A);
    D = in.D != nullptr && at.active ? in.D[at.channel] : 0.0F;
    if (kGeneral && in.tau != nullptr) rate = at.active ? softplus(in.dtA_bias[at.channel]) : 0.0F;
    if (const int channel = at.tile * P::kChannels + prepared(); channel < in.sizes.channels) {
      prepared_bias = in.dt_bias[channel];
      if (kGeneral && in.tau != nullptr) prepared_rate = softplus(in.dtA_bias[channel]);
    }
  }

  __device__ int rows_from(int first) const { return min(at.length, at.stop) - first; }

  using ChannelVectors = TileVectors<T, kSteps, P::kChannels, kThreads>;
  using StateVectors = TileVectors<T, kSteps, P::kN, kThreads>;

  __device__ bool wide_channels() const { return ChannelVectors::kExist && p.in.wide_channels; }
  /// Row of a position where rows are int.
  __device__ int row_of(int position) const { return static_cast<int>(at.first_row) + position; }

  template <class Vectors, int kWidth>
  __device__ __forceinline__ void load(T* tile, const DeviceRows<const T>& from, int first,
                                       int first_column, int columns, bool wide) {
    if (wide)
      Vectors{}.load(tile, from, row_of(first), rows_from(first), first_column, columns);
    else
      load_tile<kSteps, kWidth, kThreads>(tile, from, at.first_row + first, rows_from(first),
                                          first_column, columns, false);
  }
  __device__ __forceinline__ void load_channels(T* tile, const DeviceRows<const T>& from, int first,
                                                bool wide) {
    load<ChannelVectors, P::kChannels>(tile, from, first, at.tile * P::kChannels,
                                       p.in.sizes.channels, wide);
  }
  __device__ __forceinline__ void load_states(T* tile, const DeviceRows<const T>& from, int first,
                                              bool wide) {
    load<StateVectors, P::kN>(tile, from, first, 0, p.in.sizes.dstate, wide);
  }

  /// By one thread, before all others.
  __device__ void begin() {
    s.added.init(kThreads);
    s.first_states =
        std::int64_t{at.batch} * p.in.sizes.chunks * p.in.sizes.channels + at.tile * P::kChannels;
  }

  static constexpr int kHeld = kWindowsHeld<T, P>;
  /// Whether the next window is loaded while the gradients of the last one are stored.
  static constexpr bool kIncoming = kInPlace<T, P> && kSteps == kChunk;

  /// Where it is loaded to: nobody needs the states then.
  __device__ __forceinline__ Window<T, P>& incoming() const {
    static_assert(!kIncoming || sizeof(s.states) >= sizeof(Window<T, P>));
    return *reinterpret_cast<Window<T, P>*>(s.states[0]);
  }

  /// Begins to load a window. `replay`: only what the states need.
  __device__ __forceinline__ void request(Window<T, P>& to, int first, bool replay) {
    const auto of_channels = [&](bool wide) {
      load_channels(to.dt[0], p.in.dt, first, wide);
      load_channels(to.u[0], p.in.u, first, wide);
      if (replay) return;
      load_channels(s.dy[0], p.dy, first, wide);
      if (p.in.z.data != nullptr) load_channels(to.z[0], p.in.z, first, wide);
    };
    const auto of_states = [&](bool wide) {
      load_states(s.raw_B[0], p.in.B, first, wide);
      if (!replay) load_states(s.raw_C[0], p.in.C, first, wide);
    };
    // One branch for all of them.
    if (wide_channels())
      of_channels(true);
    else
      of_channels(false);
    if (StateVectors::kExist && p.in.wide_states)
      of_states(true);
    else
      of_states(false);
    commit_copies();
  }
  /// The window that enter() will ask for first.
  __device__ __forceinline__ void request_first(int first, bool replay) {
    if constexpr (kHeld > 1) request(s.window[1], first, replay);
    if constexpr (kIncoming) request(incoming(), first, replay);
  }
  /// Makes window `first` the one in work and asks for `next`, unless it precedes the segment.
  template <bool kReplay>
  __device__ __forceinline__ void enter(int first, int next, bool next_replays) {
    if constexpr (kHeld == 1 && !kIncoming) {
      __syncthreads();  // what was in work is not needed any more
      request(*window, first, kReplay);
    }
    wait_for_copies();
    __syncthreads();
    Window<T, P>* const last = window;
    if constexpr (kHeld > 1) window = window == s.window ? s.window + 1 : s.window;
    prepare<kReplay>(first);
    __syncthreads();
    if constexpr (kHeld > 1) {
      if (next >= at.begin) request(*last, next, next_replays);
    }
  }

  // A window is prepared by four steps of a channel, in kTurns turns.
  static constexpr int kFours = kSteps / 4 * P::kChannels;
  static constexpr int kTurns = kFours > kThreads ? kFours / kThreads : 1;
  static constexpr int kTurnFours = kThreads / P::kChannels;
  static_assert(kThreads % P::kChannels == 0 && (kFours < kThreads || kFours % kThreads == 0));
  static __device__ int prepared() { return static_cast<int>(threadIdx.x) % P::kChannels; }

  /// Fills what is per step, alpha, B and C. All of a thread is read before it writes, so that its
  /// chains of special functions overlap.
  template <bool kReplay>
  __device__ __forceinline__ void prepare(int first) {
    prepare_states<kReplay>();
    if (const auto thread = static_cast<int>(threadIdx.x); kFours >= kThreads || thread < kFours)
      prepare_fours<kReplay>(first, thread / P::kChannels);
  }
  template <bool kReplay>
  __device__ __forceinline__ void prepare_states() {
    if constexpr (kOrdered<P>) {
      write_orders();
    } else if constexpr (!std::is_same_v<T, float>) {
      widen_tile<kSteps * P::kN, kThreads>(s.raw_B[0], s.B);
      if constexpr (!kReplay) widen_tile<kSteps * P::kN, kThreads>(s.raw_C[0], s.C);
    }
  }
  /// Own states of B and C at step j.
  __device__ __forceinline__ const float* own_B(int j) const {
    if constexpr (std::is_same_v<T, float> && !kOrdered<P>)
      return s.raw_B[0] + (j * kRow + own);
    else
      return s.B + (j * kRow + own);
  }
  __device__ __forceinline__ const float* own_C(int j) const {
    if constexpr (std::is_same_v<T, float> && !kOrdered<P>)
      return s.raw_C[0] + (j * kRow + (own ^ kFlipped));
    else
      return s.C + (j * kRow + (own ^ kFlipped));
  }
  static constexpr int kRow = kOrdered<P> ? OrderedLayout::kOrders * P::kN : P::kN;  // of B and C
  static constexpr int kFlipped = kOrdered<P> ? P::kN : 0;  // places of C that change sides
  /// Where four states begin in a row of all orders: what half a warp reads meets different banks.
  static __device__ __forceinline__ int place_of(int part, int order) {
    return order * P::kN + (part ^ (order & 2)) * 4;
  }
  static __device__ __forceinline__ int own_order() {
    const auto thread = static_cast<int>(threadIdx.x);
    if constexpr (kOrdered<P>) return OrderedLayout::order_of(thread);
    return kHalved<P> ? HalvedLayout::order_of(thread) : 0;
  }
  /// Own states of a row of B or C, which begin at p.
  static __device__ __forceinline__ void read_own(const float* p, float (&v)[kStates]) {
    if constexpr (kHalved<P>) {
      float half[4];
      read_shared<4>(p, half);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = half[i];
      read_shared<4>(p + (4 - 2 * own_order()), half);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[4 + i] = half[i];
    } else {
      read_few<kStates>(p, v);
    }
  }
  /// From or to the order of the lane.
  static __device__ __forceinline__ void reorder(float (&v)[kStates]) {
    if constexpr (kOrdered<P> || kHalved<P>) {
#pragma unroll
      for (int bit = kHalved<P> ? 4 : 1; bit < kStates; bit *= 2) {
        const bool swap = (own_order() & bit) != 0;
        float w[kStates];
#pragma unroll
        for (int i = 0; i < kStates; ++i) w[i] = swap ? v[i ^ bit] : v[i];
#pragma unroll
        for (int i = 0; i < kStates; ++i) v[i] = w[i];
      }
    }
  }
  /// B and C in all orders. Half of the threads write B while the others write C, which lies the
  /// other way round: they meet different banks.
  __device__ __forceinline__ void write_orders() {
    constexpr int kAtOnce = kThreads / (2 * P::kLanes);  // rows
    static_assert(kSteps % kAtOnce == 0 && P::kLanes == 4);
    const auto thread = static_cast<int>(threadIdx.x);
    const bool of_C = (thread & 4) != 0;
    const int part = thread % 4;
    const T* const from = (of_C ? s.raw_C[0] : s.raw_B[0]) + (thread / 8 * P::kN + part * 4);
    float* const to = (of_C ? s.C : s.B) + thread / 8 * kRow;
#pragma unroll
    for (int row = 0; row < kSteps; row += kAtOnce) {
      float v[4];
      load_vec<T, 4>(from + row * P::kN, v);
#pragma unroll
      for (int x = 0; x < OrderedLayout::kOrders; ++x)
        write_shared<4>(to + (row * kRow + (place_of(part, x) ^ (of_C ? kFlipped : 0))),
                        {v[x], v[1 ^ x], v[2 ^ x], v[3 ^ x]});
    }
  }
  template <bool kReplay>
  __device__ __forceinline__ void prepare_fours(int first, int four) {
    const bool gated = p.in.z.data != nullptr;
    const int c = prepared();
    const Window<T, P>& from = kIncoming ? incoming() : *window;
    float dt[kTurns][4];
    float u[kTurns][4] = {};
    float dy[kTurns][4];
    float z[kTurns][4];
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * (four + k * kTurnFours) + i;
        dt[k][i] = to_float(from.dt[j][c]);
        u[k][i] = to_float(from.u[j][c]);
        if constexpr (!kReplay) {
          dy[k][i] = to_float(s.dy[j][c]);
          z[k][i] = to_float(from.z[j][c]);  // anything, if there is no gate
        }
      }
    }
    if constexpr (kInPlace<T, P> && !kIncoming) __syncwarp();  // one warp reads and replaces a row
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      const int at_four = four + k * kTurnFours;
      if constexpr (!kReplay) {
        if (gated) {
          float dz_of_y[4];
          apply_gates(dy[k], z[k], dz_of_y);
          write_prepared(window->z, s.dz_of_y, at_four, dz_of_y);
        }
        write_shared<4>(s.dy_gated[at_four][c], dy[k]);
      }
      float delta[4];
      float slope[4];
      float input[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        delta[i] = softplus_slope<T>(dt[k][i] + prepared_bias, slope[i]);
        input[i] = kGeneral ? u[k][i] : delta[i] * u[k][i];
        if constexpr (kGeneral) s.alpha[4 * at_four + i][c] = delta[i];
      }
      write_shared<4>(s.delta[at_four][c], delta);
      write_shared<4>(s.input[at_four][c], input);
      if constexpr (!kReplay) write_prepared(window->dt, s.slope, at_four, slope);
      if constexpr (kInPlace<T, P>) write_tile(window->u, at_four, u[k]);
    }
    const int rows = rows_from(first);
    if (rows < kSteps || (kGeneral && p.in.tau != nullptr)) correct_fours(first, four, rows);
  }
  using Tile = T[kSteps][P::kChannels];
  /// Four steps of the channel of the calling thread.
  static __device__ __forceinline__ void write_tile(Tile& tile, int four, const float (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      tile[4 * four + i][prepared() ^ spread<T, P>(i)] = from_float<T>(v[i]);
  }
  static __device__ __forceinline__ void write_prepared(Tile& tile, Apart<T, P>& apart, int four,
                                                        const float (&v)[4]) {
    if constexpr (kInPlace<T, P>)
      write_tile(tile, four, v);
    else
      write_shared<4>(apart[four][prepared()], v);
  }
  /// dy becomes that before the gate.
  static __device__ __forceinline__ void apply_gates(float (&dy)[4], const float (&z)[4],
                                                     float (&dz_of_y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float gate = gate_of(z[i]);
      const float through = dy[i] * gate;
      dz_of_y[i] = through * fmaf(z[i], 1.0F - gate, 1.0F);
      dy[i] = through * z[i];
    }
  }
  /// What depends on the position: padding, and alpha in event mode.
  __device__ void correct_fours(int first, int four, int rows) {
    const int c = prepared();
#pragma unroll 1
    for (int k = 0; k < 4 * kTurns; ++k) {
      const int j = 4 * (four + k / 4 * kTurnFours) + k % 4;
      if (j >= rows) {
        s.delta[j / 4][c][j % 4] = 0.0F;
        if constexpr (kInPlace<T, P>)
          window->dt[j][c ^ spread<T, P>(j)] = from_float<T>(0.0F);
        else
          s.slope[j / 4][c][j % 4] = 0.0F;
      }
      if constexpr (kGeneral) {
        if (j >= rows)
          s.alpha[j][c] = 0.0F;
        else if (p.in.tau != nullptr)
          s.alpha[j][c] = p.in.tau[at.first_row + first + j] * prepared_rate;
      }
    }
  }
  __device__ __forceinline__ float multiplier(int j, int i, float delta) const {
    if constexpr (kGeneral)
      return GeneralRule{p.in.discretization}.multiplier(s.alpha[j][at.local], A[i]);
    else
      return decay(delta, A[i]);
  }
  /// k u B.
  __device__ __forceinline__ float drive(float delta, float input, int i, float B) const {
    if constexpr (kGeneral)
      return GeneralRule{p.in.discretization}.factor(delta, A[i]) * input * B;
    else
      return input * B;
  }

  /// Of the own channel at the steps of a sub-tile that begins at j.
  __device__ __forceinline__ void read_steps(const PerStep<P>& from, int j,
                                             float (&v)[P::kSubTile]) const {
#pragma unroll
    for (int i = 0; i < P::kSubTile; i += 4) {
      float four[4];
      read_shared<4>(from[j / 4 + i / 4][at.local], four);
#pragma unroll
      for (int k = 0; k < 4; ++k) v[i + k] = four[k];
    }
  }
  /// The multipliers of a sub-tile that begins at j, and delta, on which they depend.
  struct Multipliers {
    float delta[P::kSubTile];
    float a[P::kSubTile][kStates];
  };
  __device__ __forceinline__ void compute(Multipliers& m, int j) const {
    read_steps(s.delta, j, m.delta);
#pragma unroll
    for (int i = 0; i < P::kSubTile; ++i)
#pragma unroll
      for (int n = 0; n < kStates; ++n) m.a[i][n] = multiplier(j + i, n, m.delta[i]);
  }

  /// What a sub-tile of the replay reads.
  struct Replayed {
    Multipliers m;
    float input[P::kSubTile];
    float B[P::kSubTile][kStates];
  };
  __device__ __forceinline__ void read(Replayed& r, int k) const {
    const int j0 = k * P::kSubTile;
    compute(r.m, j0);
    read_steps(s.input, j0, r.input);
#pragma unroll
    for (int i = 0; i < P::kSubTile; ++i) read_own(own_B(j0 + i), r.B[i]);
  }
  /// Runs the states through a sub-tile and keeps them as those that enter sub-tile `next`.
  __device__ __forceinline__ void run(float (&h)[kStates], const Replayed& r, int next,
                                      bool keeps = true) {
#pragma unroll
    for (int i = 0; i < P::kSubTile; ++i)
#pragma unroll
      for (int n = 0; n < kStates; ++n)
        h[n] = fmaf(r.m.a[i][n], h[n], drive(r.m.delta[i], r.input[i], n, r.B[i][n]));
    if (keeps) write_few<kStates>(s.states[next][threadIdx.x], h);
  }
  /// Runs the states through the first `sub_tiles` of a window and keeps those that enter them and
  /// what follows. Sub-tile `index` of the chunk is the first of the window. A sub-tile is read
  /// while the one before is run: loads do not pass stores.
  __device__ __forceinline__ void replay(float (&h)[kStates], int index, int sub_tiles) {
    write_few<kStates>(s.states[index][threadIdx.x], h);
    Replayed even;
    Replayed odd;
    read(even, 0);
    int k = 0;
#pragma unroll 1
    for (; k + 2 < sub_tiles; k += 2) {
      read(odd, k + 1);
      run(h, even, index + k + 1);
      read(even, k + 2);
      run(h, odd, index + k + 2);
    }
    const bool both = k + 1 < sub_tiles;
    if (both) read(odd, k + 1);
    run(h, even, index + k + 1, both || !kCarried<T, P>);
    if (both) run(h, odd, index + k + 2, !kCarried<T, P>);
  }

  /// Sums over the states of a channel, for the steps of a sub-tile.
  struct StateSums {
    float y[P::kSubTile];                      // C h
    float du[P::kSubTile];                     // g k B; without k unless general
    float dalpha[P::kSubTile];                 // unless general: of delta, divided by ln 2
    float ddelta[kGeneral ? P::kSubTile : 1];  // through k
  };

  /// dB and dC of kQuadTurns steps, added over the channels of a quad.
  struct QuadSums {
    float v[2 * kStates / 4][4];
  };

  /// What a step back reads: B, states and multipliers of the step.
  struct Step {
    float delta, input, dy;
    const float (&B)[kStates];
    const float (&h_before)[kStates];
    const float (&h_after)[kStates];
    const float (&a)[kStates];
  };

  /// Step j of the window.
  __device__ __forceinline__ void retreat(int j, int slot, const Step& d, StateSums& sums,
                                          QuadSums& quad) {
    float C[kStates];
    read_own(own_C(j), C);
    float shared_sums[2 * kStates];  // dB and dC of this channel
    float y = 0.0F;
    float du = 0.0F;
    float dalpha = 0.0F;
    float ddelta = 0.0F;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      const float gn = fmaf(C[n], d.dy, g[n]);
      y = fmaf(C[n], d.h_after[n], y);
      shared_sums[kStates + n] = d.dy * d.h_after[n];
      g[n] = d.a[n] * gn;
      if constexpr (kGeneral) {
        const float alpha = s.alpha[j][at.local];
        const float k = GeneralRule{p.in.discretization}.factor(d.delta, A[n]);
        shared_sums[n] = gn * k * d.input;
        du = fmaf(gn * k, d.B[n], du);
        dA[n] += chain_rule(p.in.discretization, gn * d.h_before[n], gn * d.input * d.B[n], d.a[n],
                            alpha, d.delta, A[n], dalpha, ddelta);
      } else {
        shared_sums[n] = gn * d.input;
        du = fmaf(gn, d.B[n], du);
        const float r = g[n] * d.h_before[n];
        dalpha = fmaf(r, A[n], dalpha);
        dA[n] = fmaf(r, d.delta, dA[n]);
      }
    }
    sums.y[slot] = y;
    sums.du[slot] = du;
    sums.dalpha[slot] = dalpha;
    if constexpr (kGeneral) sums.ddelta[slot] = ddelta;
    add_channels(j, slot % kQuadTurns, shared_sums, quad);
  }

  /// Adds dB and dC of step j over the channels of a quad; the last of kQuadTurns turns writes.
  __device__ __forceinline__ void add_channels(int j, int slot, float (&v)[2 * kStates],
                                               QuadSums& quad) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if constexpr (kOrdered<P>) {
      quad.v[0][slot] = add_orders(v);
    } else if constexpr (kHalved<P>) {
      static_assert(P::kSubTile == kQuadTurns);
      add_halves(v, quad.v[slot]);
      if (slot != 0) return;
      float* const out = sums_of(turn) + warp * P::kSumsPart + j % P::kAdded * P::kSumsRow +
                         (at.part * 2 * kStates + (lane & 2) * 4 + own_order());
#pragma unroll
      for (int i = 0; i < kQuadTurns; ++i) write_shared<4>(out + i * P::kSumsRow, quad.v[i]);
    } else if constexpr (P::kQuads) {
      // Results in bfloat16 drop more than one product in TF32 does.
      constexpr bool kExact = std::is_same_v<T, float>;
      const int part = warp * (P::kPerWarp / 4) + lane % P::kPerWarp / 4;
      float* const out = sums_of(turn) + part * P::kSumsPart +
                         (j % P::kAdded + lane % 4) * P::kSumsRow + at.part * 2 * kStates;
#pragma unroll
      for (int i = 0; i < 2 * kStates / 4; ++i) {
        if (slot == kQuadTurns - 1)
          for (float& sum : quad.v[i]) sum = 0.0F;
        const float four[4] = {v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
        add_quad<kExact>(quad.v[i], four, slot);
        if (slot == 0) write_shared<4>(out + 4 * i, quad.v[i]);
      }
    } else {
      constexpr int kOut = 2 * kStates / P::kPerWarp;
      const int id = lane % P::kPerWarp;
      transpose_add<2 * kStates, P::kPerWarp, 1>(v, id);
      float* const out =
          sums_of(turn) + warp * P::kSumsPart + j % P::kAdded * P::kSumsRow + at.part * 2 * kStates;
#pragma unroll
      for (int i = 0; i < kOut; ++i) out[id * kOut + i] = v[i];
    }
  }

  /// Adds dB and dC over the channels of a warp: a lane keeps four sums, of dB or of dC.
  static __device__ __forceinline__ void add_halves(float (&v)[2 * kStates], float (&sums)[4]) {
    const auto from = [](float x, int apart) { return __shfl_xor_sync(0xFFFFFFFFU, x, apart); };
    const bool of_C = (threadIdx.x & 2) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] += from(v[i + 4], 4);
      v[kStates + i] += from(v[kStates + i + 4], 4);
      sums[i] = (of_C ? v[kStates + i] : v[i]) + from(of_C ? v[i] : v[kStates + i], 2);
    }
  }
  /// Adds dB and dC over the channels of a warp: a lane keeps one sum.
  static __device__ __forceinline__ float add_orders(float (&v)[2 * kStates]) {
    const auto from = [](float x, int apart) { return __shfl_xor_sync(0xFFFFFFFFU, x, apart); };
#pragma unroll
    for (int sum = 0; sum < 8; sum += 4) {  // dB, dC
      v[sum] += from(v[sum + 2], 4);
      v[sum + 1] += from(v[sum + 3], 4);
      v[sum] += from(v[sum + 1], 8);
    }
    const bool upper = (threadIdx.x & 2) != 0;
    return (upper ? v[4] : v[0]) + from(upper ? v[0] : v[4], 2);
  }
  /// Of the steps from j on in a turn, together: loads do not pass stores.
  __device__ __forceinline__ void write_orders(int j, const float (&sums)[kQuadTurns]) {
    float* const out = sums_of(turn) + (j * P::kSums + kept);
#pragma unroll
    for (int i = 0; i < kQuadTurns; ++i) out[i * P::kSums] = sums[i];
  }

  __device__ float* sums_of(unsigned of_turn) const { return s.sums[of_turn % P::kSumsHeld]; }

  /// Before the sums of a turn are written: the last ones are complete, and their place is free.
  __device__ __forceinline__ void begin_turn() {
    if (P::kSumsHeld == 1 || turn == 0) return;
    s.added.wait(turn - 1);
    add_parts(turn - 1);
  }
  /// The parts of dB and dC of kAdded steps from t on have been written.
  __device__ __forceinline__ void end_turn(int t) {
    turn_step = t;
    if constexpr (P::kSumsHeld == 1) {
      __syncthreads();
      add_parts(turn);
      __syncthreads();
    } else {
      s.added.arrive();
    }
    ++turn;
  }
  /// Row of a position among the partial sums of the launch.
  __device__ __forceinline__ std::int64_t partial_row(int position) const {
    return partials + position;
  }
  static constexpr int kAddedAtOnce = P::kAdded * P::kSums < 4 * kThreads ? 2 : 4;

  /// Adds the parts of dB and dC of a turn and writes them.
  __device__ __forceinline__ void add_parts(unsigned of_turn) {
    constexpr int kVec = kAddedAtOnce;
    constexpr int kParts = SumsLayout<P>::kParts;
    constexpr int kPerRow = P::kSums / kVec;
    float* const out = partial_sums + std::int64_t{turn_step} * P::kSums;
    const int last = at.stop - turn_step;
    const auto thread = static_cast<int>(threadIdx.x);
    for_items<P::kAdded * kPerRow, kThreads>([&](int i) {
      const int step = i / kPerRow;
      const float* const from = sums_of(of_turn) + step * SumsLayout<P>::kRow + i % kPerRow * kVec;
      float v[kParts][kVec];
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        read_few<kVec>(from + part * SumsLayout<P>::kPart, v[part]);
#pragma unroll
      for (int apart = 1; apart < kParts; apart *= 2)  // in pairs: short chains
#pragma unroll
        for (int part = 0; part + apart < kParts; part += 2 * apart)
#pragma unroll
          for (int k = 0; k < kVec; ++k) v[part][k] += v[part + apart][k];
      if (step < last) store_few<kVec>(out + (i - thread) * kVec, v[0]);
    });
  }

  /// transpose_add() over the lanes of a channel.
  template <int kCount>
  static __device__ __forceinline__ void add_states(float (&v)[kCount], int part) {
    if constexpr (kOrdered<P>) {
      transpose_add<kCount, 2, 16>(v, part / 2);
      transpose_add<(kCount + 1) / 2, 2, 1>(v, part % 2);
    } else if constexpr (kHalved<P>) {
      transpose_add<kCount, 4, 8>(v, part / 2);
      transpose_add<1, 2, 1>(v, part % 2);
    } else {
      transpose_add<kCount, P::kLanes, P::kPerWarp>(v, part);
    }
  }
  /// Leaves a lane the sums over all states for the step that it finishes, in front.
  __device__ __forceinline__ void add_lanes(StateSums& sums) const {
    add_states(sums.y, at.part);
    add_states(sums.du, at.part);
    add_states(sums.dalpha, at.part);
    if constexpr (kGeneral) add_states(sums.ddelta, at.part);
  }
  /// Gradients of the channel inputs of the sub-tile at j. All lanes with a step find and write the
  /// same: a branch would cut the code around it.
  __device__ __forceinline__ void finish_steps(int first, int j, const StateSums& sums) {
    const auto of_step = [&](const PerStep<P>& v) { return v[j / 4][0][finished_step]; };
    const float u = to_float(window->u[j][finished]);
    const float dy = of_step(s.dy_gated);
    float du;
    float ddelta;
    if constexpr (kGeneral) {
      du = fmaf(D, dy, sums.du[0]);
      ddelta = sums.ddelta[0];
      float dtau = 0.0F;
      if (p.in.tau == nullptr) {
        ddelta += sums.dalpha[0];
      } else if (const int t = first + j + at.part / kCopies; t < at.length && t < at.stop) {
        dtau = sums.dalpha[0] * rate;
        drate = fmaf(sums.dalpha[0], p.in.tau[at.first_row + t], drate);
      }
      s.dtau[j][finished] = dtau;
    } else {
      du = fmaf(of_step(s.delta), sums.du[0], D * dy);
      ddelta = fmaf(u, sums.du[0], kLn2 * sums.dalpha[0]);
    }
    float slope;
    float dz_of_y;
    if constexpr (kInPlace<T, P>) {
      slope = to_float(window->dt[j][finished]);
      dz_of_y = to_float(window->z[j][finished]);
    } else {
      slope = of_step(s.slope);
      dz_of_y = of_step(s.dz_of_y);
    }
    const float ddt = ddelta * slope;
    if constexpr (kCopies > 1) __syncwarp();  // other lanes read what is now written
    // Without a gate nobody reads dz.
    window->z[j][finished] = from_float<T>(dz_of_y * fmaf(D, u, sums.y[0]));
    window->u[j][finished] = from_float<T>(du);
    window->dt[j][finished] = from_float<T>(ddt);
    dD = fmaf(dy, u, dD);
    dbias += ddt;
  }

  static constexpr int kPerTurn = P::kAdded / P::kSubTile;

  /// The sub-tiles of a window from the right.
  __device__ __forceinline__ void sub_tiles(int first, int index, float (&entering)[kStates]) {
#pragma unroll 1
    for (int k = kSteps / P::kSubTile - kPerTurn; k >= 0; k -= kPerTurn) {
      StateSums sums;
#pragma unroll
      for (int i = kPerTurn - 1; i >= 0; --i)
        sub_tile(first, k + i, index + k + i, i, entering, sums);
      finish_steps(first, k * P::kSubTile, sums);
      end_turn(first + k * P::kSubTile);
    }
  }

  /// Sub-tile k of the window that begins at `first`; `index` counts in the chunk. `sums`: of
  /// sub-tile k + 1, which is finished here unless k begins a turn, so that its shuffles do not
  /// wait; then of this one. `entering`: the states that enter, if carried; then of sub-tile k - 1.
  __device__ __forceinline__ void sub_tile(int first, int k, int index, int in_turn,
                                           float (&entering)[kStates], StateSums& sums) {
    const int j0 = k * P::kSubTile;
    const bool begins = in_turn == kPerTurn - 1;
    float h[P::kSubTile + 1][kStates];
    if constexpr (kCarried<T, P>) {
#pragma unroll
      for (int n = 0; n < kStates; ++n) h[0][n] = entering[n];
      read_few<kStates>(s.states[max(index - 1, 0)][threadIdx.x], entering);
    } else {
      read_few<kStates>(s.states[index][threadIdx.x], h[0]);
    }
    Multipliers m;
    compute(m, j0);
    float B[P::kSubTile][kStates];
    float input[P::kSubTile];
    read_steps(s.input, j0, input);
#pragma unroll
    for (int i = 0; i < P::kSubTile; ++i) {
      read_own(own_B(j0 + i), B[i]);
#pragma unroll
      for (int n = 0; n < kStates; ++n)
        h[i + 1][n] = fmaf(m.a[i][n], h[i][n], drive(m.delta[i], input[i], n, B[i][n]));
    }
    if (!begins) finish_steps(first, j0 + P::kSubTile, sums);
    float dy[P::kSubTile];
    read_steps(s.dy_gated, j0, dy);
    QuadSums quad;
#pragma unroll
    for (int i = P::kSubTile - 1; i >= 0; --i) {
      // Just before parts are written: loads and special functions do not pass a barrier.
      if (!kOrdered<P> && begins && i == (P::kQuads ? 0 : P::kSubTile - 1)) begin_turn();
      retreat(j0 + i, i, {m.delta[i], input[i], dy[i], B[i], h[i], h[i + 1], m.a[i]}, sums, quad);
    }
    if constexpr (kOrdered<P>) {
      if (begins) begin_turn();
      write_orders(in_turn * P::kSubTile, quad.v[0]);
    }
    add_lanes(sums);
  }

  /// The gradients of a window, 16 bytes at a time: all are read before they are written.
  __device__ __forceinline__ void store_wide(int first, int rows, int valid) {
    const ChannelVectors v;
    const int column = at.tile * P::kChannels;
    if (column + v.column >= p.in.sizes.channels) return;
    const bool gated = p.in.z.data != nullptr;
    T* const du = v.in(p.du, row_of(first), column);
    T* const ddt = v.in(p.ddt, row_of(first), column);
    T* const dz = gated ? v.in(p.dz, row_of(first), column) : nullptr;
    v.for_each([&](int i, int r, int behind) {
      if (r >= rows) return;
      const auto bits = [&](const T* tile) {
        return r < valid ? *reinterpret_cast<const uint4*>(tile + (i ^ spread<T, P>(v.row)))
                         : make_uint4(0, 0, 0, 0);
      };
      const auto store = [&](T* corner, std::int64_t stride, uint4 q) {
        *reinterpret_cast<uint4*>(corner + behind * static_cast<int>(stride)) = q;
      };
      const uint4 u_bits = bits(window->u[0]);
      const uint4 dt_bits = bits(window->dt[0]);
      const uint4 z_bits = bits(window->z[0]);
      store(du, p.du.stride, u_bits);
      store(ddt, p.ddt.stride, dt_bits);
      if (gated) store(dz, p.dz.stride, z_bits);
    });
  }
  __device__ void store_channels(const Tile& tile, const DeviceRows<T>& to, int first) {
    const int rows = at.stop - first;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kSteps * P::kChannels; i += kThreads) {
      const int r = i / P::kChannels;
      const int c = i % P::kChannels;
      const int channel = at.tile * P::kChannels + c;
      if (r >= rows || channel >= p.in.sizes.channels) continue;
      to.row(at.first_row + first + r)[channel] =
          first + r < at.length ? tile[r][c ^ spread<T, P>(r)] : from_float<T>(0.0F);
    }
  }

  __device__ void write_window(int first) {
    __syncthreads();
    if constexpr (kIncoming)
      if (first > at.begin) request(incoming(), first - kSteps, false);
    const int rows = at.stop - first;
    if (wide_channels()) {
      store_wide(first, rows, at.length - first);
    } else {
      store_channels(window->u, p.du, first);
      store_channels(window->dt, p.ddt, first);
      if (p.in.z.data != nullptr) store_channels(window->z, p.dz, first);
    }
    if constexpr (kGeneral) {
      const auto j = static_cast<int>(threadIdx.x);
      if (p.dtau != nullptr && j < kSteps && j < rows) {
        float sum = 0.0F;
        for (const float v : s.dtau[j]) sum += v;
        p.dtau[partial_row(first + j)] = sum;
      }
    }
  }

  /// Asks for the chunk that ends at `end`, before the one in work.
  __device__ void prefetch(int end) const {
    if (end <= at.begin) return;
    const std::int64_t row = at.first_row + end - kChunk;
    const int c = at.tile * P::kChannels;
    const int channels = p.in.sizes.channels;
    prefetch_tile<kChunk, P::kChannels, kThreads>(p.in.u, row, c, channels);
    prefetch_tile<kChunk, P::kChannels, kThreads>(p.in.dt, row, c, channels);
    prefetch_tile<kChunk, P::kChannels, kThreads>(p.dy, row, c, channels);
    if (p.in.z.data != nullptr)
      prefetch_tile<kChunk, P::kChannels, kThreads>(p.in.z, row, c, channels);
  }

  /// Windows of the chunk that hold positions of the segment.
  __device__ int windows_of(int begin) const {
    return (min(at.stop - begin, kChunk) + kSteps - 1) / kSteps;
  }

  /// The states that enter a chunk, not yet reordered; asks for those of the one before.
  __device__ __forceinline__ void read_saved(int begin, float (&h)[kStates]) const {
    const Sizes& z = p.in.sizes;
    // Nothing of the address is worth a register from one chunk to the next.
    auto thread = static_cast<int>(threadIdx.x);
    asm volatile("" : "+r"(thread));
    Place<L> own = at;
    own.part = L::part_of(thread);
    const std::int64_t row =
        s.first_states + (std::int64_t{begin / kChunk} * z.channels + L::channel_of(thread));
    if (p.wide_saved) {
      const float* const saved = p.chunk_states + (row * P::kN + own.part * kStates);
#pragma unroll
      for (float& v : h) v = 0.0F;
      if (!at.active) return;
      load_vec<float, kStates>(saved, h);
      if (begin > at.begin) prefetch_to_l2(saved - std::int64_t{z.channels} * P::kN);
    } else {
      read_states<L>(p.chunk_states, row, own, z.dstate, h);
    }
  }

  __device__ void chunk(int begin) {
    if constexpr (kHeld == 1 && !kIncoming) prefetch(begin);
    float h[kStates];
    read_saved(begin, h);
    constexpr int kSubTiles = kSteps / P::kSubTile;
    if constexpr (kSteps == kChunk) {
      enter<false>(begin, begin - kChunk, false);
      reorder(h);  // loaded by now
      replay(h, 0, kSubTiles - 1);
      sub_tiles(begin, 0, h);
      write_window(begin);
    } else {
      reorder(h);
      const int windows = windows_of(begin);
#pragma unroll 1
      for (int w = 0; w < windows - 1; ++w) {
        enter<true>(begin + w * kSteps, begin + (w + 1) * kSteps, w + 2 < windows);
        replay(h, w * kSubTiles, kSubTiles);
      }
#pragma unroll 1
      for (int w = windows - 1; w >= 0; --w) {
        const int first = begin + w * kSteps;
        enter<false>(first, w > 0 ? first - kSteps : begin - kChunk, w == 0);
        if (w == windows - 1) replay(h, w * kSubTiles, kSubTiles - 1);
        sub_tiles(first, w * kSubTiles, h);
        write_window(first);
      }
    }
  }

  __device__ void finish() {
    const Sizes& z = p.in.sizes;
    begin_turn();
#pragma unroll
    for (int n = 0; n < kStates; ++n)  // A = -exp(A_log): dA_log = dA A
      dA[n] *= kGeneral ? A[n] : kLn2 * A[n];
    reorder(dA);
    reorder(g);
    write_few_states<L>(p.dA_log, at.state_row(z), at, z.dstate, dA);
    if (p.dstate_in != nullptr && at.segment == 0)
      write_few_states<L>(p.dstate_in, std::int64_t{at.batch} * z.channels + at.channel, at,
                          z.dstate, g);
    const float counted = at.part % kCopies == 0 ? 1.0F : 0.0F;  // of lanes with the same steps one
    float v[3][1] = {{counted * dbias}, {counted * dD}, {counted * drate}};
    for (float (&sum)[1] : v) add_states(sum, at.part);
    if (at.part != 0 || !at.active) return;
    if (kGeneral && p.in.tau != nullptr) v[2][0] *= fast_sigmoid(p.in.dtA_bias[at.channel]);
    float* const out = p.dvectors +
                       (std::int64_t{at.batch} * z.segments + at.segment) * 3 * z.channels +
                       at.channel;
    for (int i = 0; i < 3; ++i) out[i * z.channels] = v[i][0];
  }
};

template <class T, class P, bool kGeneral>
__global__ __launch_bounds__(P::kThreads,
                             P::kBlocks) void selective_scan_backward_kernel(BackwardArgs<T> p) {
  using Block = Backward<T, P, kGeneral>;
  extern __shared__ __align__(16) unsigned char bytes[];
  const Sizes& sizes = p.in.sizes;
  const Place<typename P::Base> at(sizes, p.in.lengths, sizes.segments, p.first_block);
  Block block(p, at, *reinterpret_cast<typename Block::Shared*>(bytes));
  p.starts.template read<typename P::Base>(sizes, at, sizes.segments - 1 - at.segment, -1, block.g);
  block.reorder(block.g);
  const int last = (at.stop - 1) / kChunk * kChunk;
  if (threadIdx.x == 0) block.begin();
  __syncthreads();
  block.request_first(last, block.windows_of(last) > 1);
  for (int begin = last; begin >= at.begin; begin -= kChunk) block.chunk(begin);
  block.finish();
}

constexpr int kSumThreads = 256;

/// Second stage of dB, dC and dtau: one thread per four sums of a step adds the tiles in order.
/// Bound by HBM.
template <class T>
struct TileSumArgs {
  const float* dBC;
  const float* dtau;
  std::int64_t tiles, rows, dstate;
  DeviceRows<T> dB, dC;
  float* dtau_out;
};
template <class T, class P>
__global__ __launch_bounds__(kSumThreads) void selective_scan_add_tiles_kernel(TileSumArgs<T> p) {
  constexpr int kPerRow = P::kSums / 4;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const std::int64_t count = p.rows * kPerRow;
  if (i < count) {
    float sum[4] = {};
#pragma unroll 8
    for (std::int64_t tile = 0; tile < p.tiles; ++tile) {
      float v[4];
      read_shared<4>(p.dBC + (tile * count + i) * 4, v);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += v[k];
    }
    const std::int64_t row = i / kPerRow;
    const int first = static_cast<int>(i % kPerRow) * 4;
    T* const dB = p.dB.row(row);
    T* const dC = p.dC.row(row);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int of_part = (first + k) % (2 * P::kStates);
      const int n = (first + k) / (2 * P::kStates) * P::kStates + of_part % P::kStates;
      T* const out = of_part < P::kStates ? dB : dC;
      if (n < p.dstate) out[n] = from_float<T>(sum[k]);
    }
  }
  if (p.dtau_out == nullptr || i >= p.rows) return;
  float sum = 0.0F;
  for (std::int64_t tile = 0; tile < p.tiles; ++tile) sum += p.dtau[tile * p.rows + i];
  p.dtau_out[i] = sum;
}

/// Parameter gradients: one thread per element adds sequences and segments in order.
struct ParameterSumArgs {
  const float* dA_log;    // [parts, E, N]
  const float* dvectors;  // [parts, 3, E]
  std::int64_t parts, channels, dstate;
  float* dA_log_out;
  float* vectors_out[3];  // may be null
};
__global__ __launch_bounds__(kSumThreads) void selective_scan_add_parts_kernel(ParameterSumArgs p) {
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const std::int64_t states = p.channels * p.dstate;
  if (i < states) {
    float sum = 0.0F;
    for (std::int64_t part = 0; part < p.parts; ++part) sum += p.dA_log[part * states + i];
    p.dA_log_out[i] += sum;
    return;
  }
  i -= states;
  if (i >= 3 * p.channels) return;
  float* const out = p.vectors_out[i / p.channels];
  if (out == nullptr) return;
  float sum = 0.0F;
  for (std::int64_t part = 0; part < p.parts; ++part) sum += p.dvectors[part * 3 * p.channels + i];
  out[i % p.channels] += sum;
}

unsigned sum_blocks(std::int64_t threads) {
  return static_cast<unsigned>((threads + kSumThreads - 1) / kSumThreads);
}

/// The second stage for the rows of a launch.
template <class T, class P>
void add_tiles(Context& ctx, const SelectiveScanBackward& a, const BackwardArgs<T>& p) {
  const auto rows_from = [&](auto rows) {
    rows.data += p.first_row * rows.stride;
    return rows;
  };
  const TileSumArgs<T> tiles{
      p.dBC,
      p.dtau,
      p.in.sizes.tiles,
      p.rows,
      p.in.sizes.dstate,
      rows_from(device_rows<T>(a.dB)),
      rows_from(device_rows<T>(a.dC)),
      p.dtau != nullptr ? a.dintegration_timesteps.data<float>() + p.first_row : nullptr};
  selective_scan_add_tiles_kernel<T, P>
      <<<sum_blocks(p.rows * P::kSums / 4), kSumThreads, 0, ctx.stream().handle>>>(tiles);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
void add_parameters(Context& ctx, const SelectiveScanBackward& a, const BackwardArgs<T>& p) {
  const Sizes& z = p.in.sizes;
  const ParameterSumArgs parts{p.dA_log,
                               p.dvectors,
                               std::int64_t{z.batch} * z.segments,
                               z.channels,
                               z.dstate,
                               a.dA_log.data<float>(),
                               {a.ddt_bias.data<float>(), data_or_null<float>(a.dD),
                                p.in.tau != nullptr ? data_or_null<float>(a.ddtA_bias) : nullptr}};
  selective_scan_add_parts_kernel<<<sum_blocks(std::int64_t{z.channels} * (z.dstate + 3)),
                                    kSumThreads, 0, ctx.stream().handle>>>(parts);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, class P, bool kGeneral>
void launch_kernel(Context& ctx, const BackwardArgs<T>& p, unsigned blocks) {
  const auto kernel = selective_scan_backward_kernel<T, P, kGeneral>;
  constexpr std::size_t kBytes = sizeof(BackwardShared<T, P, kGeneral>);
  static_assert(kGeneral || kBytes * P::kBlocks <= (228 - P::kBlocks) * 1024);
  allow_shared(kernel, kBytes);
  kernel<<<blocks, P::kThreads, kBytes, ctx.stream().handle>>>(p);
  LRNN_CUDA_CHECK_LAUNCH();
}

/// How many launches the blocks are spread over, one after the other: so many that the partial sums
/// of one are not the largest thing in memory, so few that each fills a GPU. One where time is not
/// cut: launches of whole sequences end raggedly. A unit is a segment of a sequence.
struct Launches {
  std::int64_t units;
  std::int64_t count;

  static std::int64_t wanted(const Sizes& z, int sums) {
    constexpr std::int64_t kMostBytes = std::int64_t{320} << 20;
    const std::int64_t bytes = std::int64_t{z.tiles} * z.batch * z.seqlen * sums * 4;
    return std::max<std::int64_t>(1, (bytes + kMostBytes - 1) / kMostBytes);
  }
  Launches(const Sizes& z, int sums) : units(std::int64_t{z.batch} * z.segments) {
    constexpr std::int64_t kFull = 384;  // blocks
    const std::int64_t most = z.segments == 1 ? 1 : std::min(units, units * z.tiles / kFull);
    count = std::clamp<std::int64_t>(most, 1, wanted(z, sums));
  }
  [[nodiscard]] std::int64_t first_unit(std::int64_t launch) const {
    return units * launch / count;
  }
  [[nodiscard]] static std::int64_t first_row(const Sizes& z, std::int64_t unit) {
    return unit / z.segments * z.seqlen + unit % z.segments * z.segment_length;
  }
};

template <class T, class P, bool kGeneral>
void launch_backward(Context& ctx, const SelectiveScanBackward& a) {
  Sizes sizes(a.in, P::kChannels, P::kChannels / 8);
  // Shorter segments give every launch blocks enough.
  if (const std::int64_t wanted = Launches::wanted(sizes, P::kSums);
      wanted > 1 && sizes.segments > 1)
    sizes.cut(wanted * sizes.segments);
  const Launches launches(sizes, P::kSums);
  BackwardArgs<T> p(a, sizes);
  // Rows and strides are int then.
  const bool int_rows = std::int64_t{sizes.batch} * sizes.seqlen < (std::int64_t{1} << 30);
  const auto wide = [&](const auto& rows) {
    return Operands<T>::wide(rows, sizes.channels) && rows.stride < (1 << 24);
  };
  p.in.wide_channels = int_rows && wide(p.in.u) && wide(p.in.dt) && wide(p.in.z) && wide(p.dy) &&
                       wide(p.du) && wide(p.ddt) && wide(p.dz);
  p.in.wide_states =
      int_rows && p.in.wide_states && p.in.B.stride < (1 << 24) && p.in.C.stride < (1 << 24);
  p.wide_saved = sizes.dstate == P::kN && allows_vectors(p.chunk_states, P::kN, P::kN, P::kStates);

  std::int64_t most_rows = 0;
  for (std::int64_t i = 0; i < launches.count; ++i)
    most_rows = std::max(most_rows, Launches::first_row(sizes, launches.first_unit(i + 1)) -
                                        Launches::first_row(sizes, launches.first_unit(i)));
  Tensor dBC = ctx.empty({sizes.tiles, most_rows, P::kSums}, DType::float32);
  Tensor dA_log = ctx.empty(sizes.carry_shape(), DType::float32);
  Tensor dvectors = ctx.empty({sizes.batch, sizes.segments, 3, sizes.channels}, DType::float32);
  Tensor dtau;
  if (a.in.integration_timesteps && a.dintegration_timesteps)
    dtau = ctx.empty({sizes.tiles, most_rows}, DType::float32);
  p.dBC = dBC.view().template data<float>();
  p.dA_log = dA_log.view().template data<float>();
  p.dvectors = dvectors.view().template data<float>();
  p.dtau = dtau ? dtau.view().template data<float>() : nullptr;
  const SegmentEnds ends =
      segment_ends<T, kGeneral>(ctx, p.in, p.dy, data_or_null<float>(a.dstate_out));
  p.starts = ends.starts();
  for (std::int64_t i = 0; i < launches.count; ++i) {
    const std::int64_t first = launches.first_unit(i);
    const std::int64_t end = launches.first_unit(i + 1);
    p.first_block = static_cast<int>(first * sizes.tiles);
    p.first_row = Launches::first_row(sizes, first);
    p.rows = Launches::first_row(sizes, end) - p.first_row;
    launch_kernel<T, P, kGeneral>(ctx, p, static_cast<unsigned>((end - first) * sizes.tiles));
    add_tiles<T, P>(ctx, a, p);
  }
  add_parameters(ctx, a, p);
}

/// Shared memory that a block may ask for.
int shared_limit() {
  int device = 0;
  int bytes = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

/// Calls f.operator()<P>(). The general rule has fewer layouts: more lanes hold no state.
template <class T, bool kGeneral, class F>
void visit_plan(std::int64_t dstate, F&& f) {
  // Shorter windows give the same sums.
  const int limit = shared_limit();
  if (dstate <= 16) {
    using L = OrderedLayout;
    if (limit < 96 * 1024) return f.template operator()<Plan<L, 16, 4, 8, 1, 1>>();
    return f.template operator()<Plan<L, 32, 4, 8, 3, 2>>();
  }
  if constexpr (kGeneral) {
    if (dstate <= 64) return f.template operator()<Plan<Layout<16, 4, 16>, 16, 4, 4, 2, 1>>();
  } else {
    if (dstate <= 32) return f.template operator()<Plan<Layout<8, 4, 16>, 32, 4, 8, 3, 2>>();
    if (dstate <= 64) {
      if (limit < 112 * 1024) return f.template operator()<Plan<HalvedLayout, 16, 4, 8, 2, 1>>();
      return f.template operator()<Plan<HalvedLayout, 32, 4, 8, 2, 2>>();
    }
    if (dstate <= 128) return f.template operator()<Plan<Layout<32, 4, 8>, 16, 4, 4, 2, 1>>();
  }
  return f.template operator()<Plan<Layout<32, 8, 4>, 8, 4, 4, 2, 1>>();
}

}  // namespace
}  // namespace selective

void selective_scan_backward(Context& ctx, const SelectiveScanBackward& a) {
  constexpr const char* op = "selective_scan_backward";
  const std::int64_t dstate = a.in.A_log.dim(1);
  selective::check_limits(op, a.in);
  visit_float(op, a.in.u.dtype(), [&]<class T>() {
    selective::visit_rule(selective::is_general(a.in), [&]<bool kGeneral>() {
      selective::visit_plan<T, kGeneral>(
          dstate, [&]<class P>() { selective::launch_backward<T, P, kGeneral>(ctx, a); });
    });
  });
}

}  // namespace lrnn::cuda
