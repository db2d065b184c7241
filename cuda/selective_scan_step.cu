// One token of the selective scan: the states of every sequence read, moved on and written.
//
// Two kernels. The general one takes anything; its block owns some channels of one or two
// sequences, one or several lanes a channel. The tiled one takes eight and more sequences of 16
// states: a block owns 64 channels of up to 32 sequences, four lanes a channel, and projects dt on
// tensor cores, so that the weight is read once for all of them. It moves four sequences on at a
// time, while the states of the next four are on their way; each lane prepares and finishes one.
// As many of 32, 64 or 128 states go to selective_scan_step_wide.cu.
//
// Few sequences are bound by latency, many by HBM, the states in and out: within a recorded step of
// 128 sequences on an H200, 4096 channels (67 MB) take about 21 us, 1536 channels (25 MB) about 7.
#include "common/capability.cuh"
#include "common/mma.cuh"
#include "common/selective_scan.cuh"
#include "common/selective_scan_step_wide.cuh"
#include "ops/selective_scan_parts.hpp"

namespace lrnn::cuda {
namespace selective {
namespace {

constexpr int kStepThreads = 128;

template <class T>
struct StepArgs {
  Operands<T> in;
  DeviceRows<T> y;
  float* state;
  int lanes;  // of a channel, a power of two
  int log2_lanes;
  // The projection of dt, if the step does it.
  DeviceRows<const T> dt_low{nullptr, 0};
  const T* dt_weight = nullptr;  // null: in.dt
  int rank = 0;

  /// The sum over the lanes of a channel, in every one of them.
  __device__ __forceinline__ float sum_lanes(float v) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
      v += __shfl_xor_sync(0xFFFFFFFFU, v, offset);
    return v;
  }
};

/// <x, w> of `count` elements over the lanes of a channel, kN at a time. The first kHeld groups of
/// w stay in registers from construction.
template <class T, int kN>
struct LaneDot {
  static constexpr int kHeld = kN > 1 ? 2 : 1;
  const T* w;
  int count, first, step;
  Packed<T, kN> held[kHeld];

  __device__ __forceinline__ LaneDot(const T* w, int count, int lane, int lanes)
      : w(w), count(count), first(lane * kN), step(lanes * kN) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      held[i] = {};
      if (w != nullptr && first + i * step < count) held[i].load(w + first + i * step);
    }
  }
  /// The part of this lane.
  __device__ __forceinline__ float operator()(const T* x) const {
    Packed<T, kN> a[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      a[i] = {};
      if (first + i * step < count) a[i].load(x + first + i * step);
    }
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) add(sum, a[i], held[i]);
    for (int k = first + kHeld * step; k < count; k += step) {
      Packed<T, kN> b;
      a[0].load(x + k);
      b.load(w + k);
      add(sum, a[0], b);
    }
    return sum;
  }

 private:
  __device__ __forceinline__ static void add(float& sum, const Packed<T, kN>& a,
                                             const Packed<T, kN>& b) {
#pragma unroll
    for (int j = 0; j < kN; ++j) sum = fmaf(a.get(j), b.get(j), sum);
  }
};

/// A of kVec states of a channel, times log2(e) unless general.
template <int kVec>
struct StepRates {
  float A[kVec];

  __device__ __forceinline__ void load(const float* A_log, bool general) {
    load_vec<float, kVec>(A_log, A);
#pragma unroll
    for (float& v : A) v = -expf(v) * (general ? 1.0F : kLog2e);
  }
};

/// kVec states of a channel and what drives and reads them.
template <class T, int kVec>
struct StepStates {
  float h[kVec];
  Packed<T, kVec> B, C;

  __device__ __forceinline__ void load(const float* state, const T* b, const T* c) {
    load_vec<float, kVec>(state, h);
    B.load(b);
    C.load(c);
  }
  /// Moves the states on and adds C h to y.
  template <bool kGeneral>
  __device__ __forceinline__ void advance(const StepRates<kVec>& rates, const GeneralRule& rule,
                                          float alpha, float delta, float u, float& y) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float A = rates.A[k];
      const float factor = kGeneral ? rule.factor(delta, A) : delta;
      const float a = kGeneral ? rule.multiplier(alpha, A) : decay(alpha, A);
      h[k] = fmaf(a, h[k], factor * u * B.get(k));
      y = fmaf(C.get(k), h[k], y);
    }
  }
};

/// What one token of a channel has beside its states.
template <class T>
struct StepToken {
  float u, z, dt;

  __device__ __forceinline__ void load(const StepArgs<T>& p, std::int64_t row,
                                       std::int64_t channel) {
    const Operands<T>& in = p.in;
    u = to_float(in.u.row(row)[channel]);
    z = in.z.data != nullptr ? to_float(in.z.row(row)[channel]) : 0.0F;
    dt = p.dt_weight == nullptr ? to_float(in.dt.row(row)[channel]) : 0.0F;
  }
  /// y with skip and gate.
  __device__ __forceinline__ float finish(float y, float D, bool gated) const {
    y = fmaf(D, u, y);
    return gated ? y * (z * fast_sigmoid(z)) : y;
  }
};

// A block owns kStepThreads / lanes channels and walks the sequences kRows at a time, in the usual
// case once. `lanes` neighbouring lanes own a channel and walk its states kVec at a time.
// Parameters are read while the kernel before still runs, all else at once behind it. Bound by
// latency, or for many sequences by HBM: the state in and out. kRank: elements at a time of the
// projection of dt.
template <class T, int kVec, int kRank, int kRows, bool kGeneral>
__global__ __launch_bounds__(kStepThreads) void selective_scan_step_kernel(StepArgs<T> p) {
  let_next_kernel_start();
  const Operands<T>& in = p.in;
  const int dstate = in.sizes.dstate;
  const std::int64_t batch = in.sizes.batch;
  const int lane = static_cast<int>(threadIdx.x) & (p.lanes - 1);
  const int place =
      (static_cast<int>(blockIdx.x) * kStepThreads + static_cast<int>(threadIdx.x)) >> p.log2_lanes;
  // Lanes of no channel join the shuffles with values of another.
  const int channel = min(place, in.sizes.channels - 1);
  const int n = lane * kVec;
  const bool owns = n < dstate;
  const std::int64_t state_stride = std::int64_t{in.sizes.channels} * dstate;
  float* const state = p.state + std::int64_t{channel} * dstate;
  const float* const A_log = in.A_log + std::int64_t{channel} * dstate;
  const std::int64_t first = std::int64_t{blockIdx.y} * kRows;
  const std::int64_t step = std::int64_t{gridDim.y} * kRows;
  StepRates<kVec> A{};
  if (owns) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (first + r < batch) prefetch_to_l2(state + (first + r) * state_stride + n);
    A.load(A_log + n, kGeneral);
  }
  const LaneDot<T, kRank> project(
      p.dt_weight != nullptr ? p.dt_weight + std::int64_t{channel} * p.rank : nullptr, p.rank, lane,
      p.lanes);
  const float dt_bias = in.dt_bias[channel];
  const float D = in.D != nullptr ? in.D[channel] : 0.0F;
  const float rate = kGeneral && in.tau != nullptr ? softplus(in.dtA_bias[channel]) : 0.0F;
  const GeneralRule rule{in.discretization};
  wait_for_previous_kernel();
  for (std::int64_t group = first; group < batch; group += step) {
    StepStates<T, kVec> states[kRows] = {};
    StepToken<T> tokens[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t row = group + r;
      if (row >= batch) break;
      if (owns)
        states[r].load(state + row * state_stride + n, in.B.row(row) + n, in.C.row(row) + n);
      tokens[r].load(p, row, channel);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t row = group + r;
      if (row >= batch) break;
      // A projected dt is rounded as if it had been stored.
      float dt = tokens[r].dt;
      if (p.dt_weight != nullptr)
        dt = to_float(from_float<T>(p.sum_lanes(project(p.dt_low.row(row)))));
      const float delta = softplus(dt + dt_bias);
      const float alpha = kGeneral && in.tau != nullptr ? in.tau[row] * rate : delta;
      float y = 0.0F;
      const auto advance = [&](const StepRates<kVec>& rates, int at) {
        states[r].template advance<kGeneral>(rates, rule, alpha, delta, tokens[r].u, y);
        if (place == channel) store_vec<float, kVec>(state + row * state_stride + at, states[r].h);
      };
      if (owns) advance(A, n);
      for (int at = n + p.lanes * kVec; at < dstate; at += p.lanes * kVec) {
        StepRates<kVec> rates;
        rates.load(A_log + at, kGeneral);
        states[r].load(state + row * state_stride + at, in.B.row(row) + at, in.C.row(row) + at);
        advance(rates, at);
      }
      y = p.sum_lanes(y);
      if (place == channel && lane == 0)
        p.y.row(row)[channel] = from_float<T>(tokens[r].finish(y, D, in.z.data != nullptr));
    }
  }
}

// kRows > 1 for many sequences: all blocks are resident at once, and the loads of several sequences
// together hide the latency of memory.
template <class T, int kVec, int kRows>
void launch_step(Context& ctx, const SelectiveScanStep& a) {
  const Sizes sizes(a.in, 1, 1);
  int log2_lanes = 0;
  while (log2_lanes < 5 && (kVec << log2_lanes) < sizes.dstate) ++log2_lanes;
  StepArgs<T> p{.in = Operands<T>(a.in, sizes),
                .y = device_rows<T>(a.y),
                .state = a.state.data<float>(),
                .lanes = 1 << log2_lanes,
                .log2_lanes = log2_lanes};
  bool wide_rank = false;
  if (a.dt_low) {
    p.dt_low = device_rows<T>(a.dt_low);
    p.dt_weight = a.dt_weight.data<T>();
    p.rank = static_cast<int>(a.dt_low.dim(2));
    wide_rank = Operands<T>::wide(p.dt_low, p.rank) &&
                allows_vectors(p.dt_weight, p.rank, p.rank, kWide<T>);
  }
  constexpr std::int64_t kMostGroups = 65535;  // of the second dimension of a grid
  const std::int64_t groups = (std::int64_t{sizes.batch} + kRows - 1) / kRows;
  const int per_block = kStepThreads >> log2_lanes;
  const dim3 blocks(static_cast<unsigned>((sizes.channels + per_block - 1) / per_block),
                    static_cast<unsigned>(std::min(groups, kMostGroups)));
  visit_rule(is_general(a.in), [&]<bool kGeneral>() {
    const auto launch = [&]<int kRank>() {
      launch_overlapped(selective_scan_step_kernel<T, kVec, kRank, kRows, kGeneral>, blocks,
                        kStepThreads, 0, ctx.stream().handle, p);
    };
    if constexpr (kVec == 4)
      if (wide_rank) return launch.template operator()<kWide<T>>();
    launch.template operator()<1>();
  });
}

/// Sizes of the tiled kernel: four lanes hold the 16 states of a channel, a warp eight channels.
namespace tiled {

constexpr int kThreads = 256;
constexpr int kLanes = 4;
constexpr int kStates = 4;                    // of a lane
constexpr int kN = kLanes * kStates;          // of a channel
constexpr int kPerWarp = 32 / kLanes;         // channels
constexpr int kChannels = kThreads / kLanes;  // of a block
constexpr int kQuads = 8;                     // of sequences of a block, most
constexpr int kRows = 4 * kQuads;
constexpr int kAhead = 4;         // quads that are asked for before they are loaded
constexpr int kRankStep = 16;     // of a product on tensor cores
constexpr int kProductRows = 16;  // of it

/// What a warp knows of its channels; a lane of the channel that is lane / 4. kWhole: all channels
/// of a block and all sequences of a quad exist.
template <bool kWhole>
struct Place {
  int part;            // which states
  int local, channel;  // in the warp, of all
  bool exists;
  int first, count;  // sequences of the block

  template <class T>
  __device__ __forceinline__ Place(const StepArgs<T>& p, int per_block) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    part = lane % kLanes;
    local = lane / kLanes;
    const int wanted = static_cast<int>(blockIdx.x) * kChannels +
                       static_cast<int>(threadIdx.x) / 32 * kPerWarp + local;
    exists = kWhole || wanted < p.in.sizes.channels;
    channel = kWhole ? wanted : min(wanted, p.in.sizes.channels - 1);
    first = static_cast<int>(blockIdx.y) * per_block;
    count = min(per_block, p.in.sizes.batch - first);
  }
  /// A sequence of the block; the last stands for those behind it.
  [[nodiscard]] __device__ __forceinline__ int row(int i) const {
    return first + (kWhole ? i : min(i, count - 1));
  }
};

/// dt of kRows sequences by the channels of a warp, as if it had been stored: x is A, the weight of
/// the channels B. The order of a sum is free, so a lane takes four neighbouring elements of both.
template <class T, int kSteps>
struct Projection {
  Packed<T, 4> weight[kSteps > 0 ? kSteps : 1];

  template <class Place>
  __device__ __forceinline__ void load_weight(const StepArgs<T>& p, const Place& at) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      weight[s] = {};
      if (s * kRankStep < p.rank)
        weight[s].load_constant(p.dt_weight + std::int64_t{at.channel} * p.rank + s * kRankStep +
                                4 * at.part);
    }
  }
  /// To [kRows][kPerWarp] of shared memory of the warp.
  template <class Place>
  __device__ __forceinline__ void run(const StepArgs<T>& p, const Place& at, float* to) const {
#pragma unroll 1
    for (int first = 0; first < at.count; first += kProductRows)
      project(p, at, first, to + first * kPerWarp);
    __syncwarp();
  }

 private:
  /// kProductRows sequences from number `first` of the block on.
  template <class Place>
  __device__ __forceinline__ void project(const StepArgs<T>& p, const Place& at, int first,
                                          float* to) const {
    Packed<T, 4> x[kSteps][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.first + min(first + at.local + 8 * half, at.count - 1);
      const T* const from = p.dt_low.row(row) + 4 * at.part;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        x[s][half] = {};
        if (s * kRankStep < p.rank) x[s][half].load(from + s * kRankStep);
      }
    }
    float sum[4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const std::uint32_t rows[4] = {x[s][0].words[0], x[s][1].words[0], x[s][0].words[1],
                                     x[s][1].words[1]};
      multiply_add(sum, rows, weight[s].words[0], weight[s].words[1]);
    }
    float* const mine = to + at.local * kPerWarp + 2 * at.part;
    *reinterpret_cast<float2*>(mine) = make_float2(sum[0], sum[1]);
    *reinterpret_cast<float2*>(mine + 8 * kPerWarp) = make_float2(sum[2], sum[3]);
  }
};

/// What a lane reads of a sequence for its states, one sequence after the other; the last one
/// stands for those behind it.
template <class T, bool kWhole>
struct Cursor {
  const float* state;
  const T* B;
  const T* C;
  std::int64_t state_stride, B_stride, C_stride;
  int left;

  __device__ __forceinline__ Cursor(const StepArgs<T>& p, const Place<kWhole>& at,
                                    const float* states)
      : state(states),
        B(p.in.B.row(at.first) + at.part * kStates),
        C(p.in.C.row(at.first) + at.part * kStates),
        state_stride(std::int64_t{p.in.sizes.channels} * kN),
        B_stride(p.in.B.stride),
        C_stride(p.in.C.stride),
        left(at.count) {}
  __device__ __forceinline__ void advance() {
    --left;
    const bool another = kWhole || left > 0;
    state += another ? state_stride : 0;
    B += another ? B_stride : 0;
    C += another ? C_stride : 0;
  }
};

/// What a lane loads of four sequences: of all its states, and of one of them, which it prepares
/// and finishes, the elements of the channel.
template <class T>
struct Quad {
  Packed<float, kStates> h[4];
  Packed<T, kStates> B[4], C[4];
  StepToken<T> token;

  template <bool kWhole>
  __device__ __forceinline__ void load(const StepArgs<T>& p, const Place<kWhole>& at,
                                       Cursor<T, kWhole>& from, int quad) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      h[j].load_once(from.state);
      B[j].load(from.B);
      C[j].load(from.C);
      from.advance();
    }
    token.load(p, at.row(4 * quad + at.part), at.channel);
  }
  /// Moves the states of the first `count` sequences on, writes them from `to` on, and returns C h
  /// of the lane's own. delta and drive are those of its own.
  template <bool kWhole>
  __device__ __forceinline__ float advance(const StepRates<kStates>& rates, float own_delta,
                                           float own_drive, int part, int count, float* to,
                                           std::int64_t stride) const {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float delta = __shfl_sync(0xFFFFFFFFU, own_delta, j, kLanes);
      const float drive = __shfl_sync(0xFFFFFFFFU, own_drive, j, kLanes);
      float v[kStates];
      y[j] = 0.0F;
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        v[k] = fmaf(decay(delta, rates.A[k]), h[j].get(k), drive * B[j].get(k));
        y[j] = fmaf(C[j].get(k), v[k], y[j]);
      }
      if (kWhole || j < count)
        __stcs(reinterpret_cast<float4*>(to), make_float4(v[0], v[1], v[2], v[3]));
      to += stride;
    }
    transpose_add<4, kLanes, 1>(y, part);
    return y[0];
  }
};

/// kSteps: of the projection of dt; 0 if dt is given. kMostQuads: one for few sequences, which take
/// fewer registers, so that the kernel behind this one is resident beside it.
template <class T, int kSteps, int kMostQuads, bool kWhole>
__global__ __launch_bounds__(kThreads, kMostQuads == 1 ? 3 : 2) void step_kernel(StepArgs<T> p,
                                                                                 int per_block) {
  __shared__ float projected[kSteps > 0 ? kThreads / 32 : 1][kRows * kPerWarp];
  let_next_kernel_start();
  const Place<kWhole> at(p, per_block);
  const std::int64_t stride = std::int64_t{p.in.sizes.channels} * kN;
  float* state = p.state + at.first * stride + std::int64_t{at.channel} * kN + at.part * kStates;
  // A line has the states of two channels.
  const float* const line =
      at.local % 2 == 0 ? state + (at.part * stride - at.part * kStates) : nullptr;
  const auto ask = [&](int q) {
    if (line != nullptr && 4 * q + at.part < at.count)
      selective::prefetch_to_l2(line + 4 * q * stride);
  };
#pragma unroll
  for (int q = 0; q < kAhead; ++q) ask(q);
  Projection<T, kSteps> projection;
  projection.load_weight(p, at);
  StepRates<kStates> A;
  A.load(p.in.A_log + std::int64_t{at.channel} * kN + at.part * kStates, false);
  const float dt_bias = p.in.dt_bias[at.channel];
  const float D = p.in.D != nullptr ? p.in.D[at.channel] : 0.0F;
  wait_for_previous_kernel();
  Quad<T> quads[kMostQuads == 1 ? 1 : 2];
  Cursor<T, kWhole> from(p, at, state);
  quads[0].load(p, at, from, 0);
  float* const dt_of_warp = projected[kSteps > 0 ? threadIdx.x / 32 : 0];
  if constexpr (kSteps > 0) projection.run(p, at, dt_of_warp);
  const auto advance = [&](const Quad<T>& now, int q) {
    const StepToken<T>& token = now.token;
    float dt = token.dt;
    if constexpr (kSteps > 0)
      dt = to_float(from_float<T>(dt_of_warp[(4 * q + at.part) * kPerWarp + at.local]));
    const float delta = softplus(dt + dt_bias);
    const float y = now.template advance<kWhole>(A, delta, delta * token.u, at.part,
                                                 at.exists ? at.count - 4 * q : 0, state, stride);
    state += 4 * stride;
    if (kWhole || (at.exists && 4 * q + at.part < at.count))
      p.y.row(at.row(4 * q + at.part))[at.channel] =
          from_float<T>(token.finish(y, D, p.in.z.data != nullptr));
  };
  if constexpr (kMostQuads == 1) return advance(quads[0], 0);
  const int count = (at.count + 3) / 4;
#pragma unroll 1
  for (int q = 0; q < count; q += 2) {
    ask(q + kAhead);
    ask(q + kAhead + 1);
    if (q + 1 < count) quads[1].load(p, at, from, q + 1);
    advance(quads[0], q);
    if (q + 1 == count) break;
    if (q + 2 < count) quads[0].load(p, at, from, q + 2);
    advance(quads[1], q + 1);
  }
}

/// Whether the operands suit: 16 states of Mamba's rule without event mode, vectors of four.
template <class T>
bool applies(const SelectiveScanStep& a) {
  constexpr std::int64_t kMostSequences = std::int64_t{4} * 65535;  // of a grid
  if (is_general(a.in) || a.in.A_log.dim(1) != kN || a.in.u.dim(0) > kMostSequences) return false;
  const auto allows = [&]<class U>(const U* p, std::int64_t stride) {
    return allows_vectors(p, kN, stride, kStates);
  };
  return allows(a.state.data<float>(), kN) && allows(a.in.A_log.data<float>(), kN) &&
         allows(a.in.B.data<T>(), detail::row_stride(a.in.B)) &&
         allows(a.in.C.data<T>(), detail::row_stride(a.in.C));
}

constexpr int kMostSteps = 8;

/// Whether it projects dt.
template <class T>
bool projects(const SelectiveScanStep& a) {
  if constexpr (sizeof(T) != 2) return false;
  const std::int64_t rank = a.dt_weight.dim(1);
  return has_mma() && rank % kRankStep == 0 && rank <= kMostSteps * kRankStep &&
         allows_vectors(a.dt_low.data<T>(), rank, detail::row_stride(a.dt_low), 4) &&
         allows_vectors(a.dt_weight.data<T>(), rank, rank, 4);
}

/// Sequences of a block: few enough that the blocks fill a device, whole quads.
int sequences_per_block(int batch, int tiles) {
  constexpr int kBlocks = 264;  // two for each multiprocessor of an H200
  const int groups = std::max(kBlocks / tiles, 1);
  return std::clamp(((batch + groups - 1) / groups + 3) / 4 * 4, 4, kRows);
}

template <class T>
void launch(Context& ctx, const SelectiveScanStep& a) {
  const Sizes sizes(a.in, kChannels, kThreads / 32);
  StepArgs<T> p{.in = Operands<T>(a.in, sizes),
                .y = device_rows<T>(a.y),
                .state = a.state.data<float>(),
                .lanes = kLanes,
                .log2_lanes = 2};
  if (a.dt_low) {
    p.dt_low = device_rows<T>(a.dt_low);
    p.dt_weight = a.dt_weight.data<T>();
    p.rank = static_cast<int>(a.dt_weight.dim(1));
  }
  const int per_block = sequences_per_block(sizes.batch, sizes.tiles);
  const dim3 blocks(static_cast<unsigned>(sizes.tiles),
                    static_cast<unsigned>((sizes.batch + per_block - 1) / per_block));
  const bool whole = sizes.batch % 4 == 0 && sizes.channels % kChannels == 0;
  const auto run = [&]<int kSteps>() {
    const auto kernel = per_block == 4 ? step_kernel<T, kSteps, 1, false>
                        : whole        ? step_kernel<T, kSteps, kQuads, true>
                                       : step_kernel<T, kSteps, kQuads, false>;
    launch_overlapped(kernel, blocks, kThreads, 0, ctx.stream().handle, p, per_block);
  };
  if (p.rank == 0) return run.template operator()<0>();
  if constexpr (sizeof(T) == 2) {
    if (p.rank <= kMostSteps / 2 * kRankStep) return run.template operator()<kMostSteps / 2>();
    run.template operator()<kMostSteps>();
  }
}

}  // namespace tiled

}  // namespace
}  // namespace selective

/// States of a thread for many sequences: B and C of them are one access.
template <class T>
constexpr int kManyStates = kWide<T>;

void selective_scan_step(Context& ctx, const SelectiveScanStep& a) {
  constexpr std::int64_t kSeveralSequences = 8;
  // Most sequences for which the general kernel projects: each reads the weight of its own accord.
  constexpr std::int64_t kFewSequences = 16;
  const std::int64_t batch = a.in.u.dim(0);
  if (selective::step_wide(ctx, a)) return;
  visit_float("selective_scan_step", a.in.u.dtype(), [&]<class T>() {
    if (batch >= kSeveralSequences && selective::tiled::applies<T>(a) &&
        (!a.dt_low || selective::tiled::projects<T>(a)))
      return selective::tiled::launch<T>(ctx, a);
    if (a.dt_low && batch > kFewSequences)
      return lrnn::detail::selective_scan_step_after_projection(ctx, a);
    const std::int64_t dstate = a.in.A_log.dim(1);
    const auto aligned = [&](int n) {
      const auto allows = [&]<class U>(const U* p, std::int64_t stride) {
        return allows_vectors(p, dstate, stride, n);
      };
      return allows(a.state.data<float>(), dstate) && allows(a.in.A_log.data<float>(), dstate) &&
             allows(a.in.B.data<T>(), detail::row_stride(a.in.B)) &&
             allows(a.in.C.data<T>(), detail::row_stride(a.in.C));
    };
    constexpr std::int64_t kManySequences = 64;
    if (batch >= kManySequences && !a.dt_low && aligned(kManyStates<T>))
      selective::launch_step<T, kManyStates<T>, 2>(ctx, a);
    else if (aligned(4) && batch >= kSeveralSequences)
      selective::launch_step<T, 4, 2>(ctx, a);
    else if (aligned(4))
      selective::launch_step<T, 4, 1>(ctx, a);
    else
      selective::launch_step<T, 1, 1>(ctx, a);
  });
}

}  // namespace lrnn::cuda
