// Forward, step, and the carries of both passes. Ownership: common/selective_scan.cuh.
// Forward is bound by issue slots and shared memory reads, next the exponentials; step by HBM.
#include "common/selective_scan.cuh"

namespace lrnn::cuda {
namespace selective {
namespace {

/// Operands of one tile of steps, as they come from memory.
template <class T, class L, int kSteps>
struct RawTile {
  alignas(16) T u[kSteps][L::kChannels];
  alignas(16) T dt[kSteps][L::kChannels];
  alignas(16) T z[kSteps][L::kChannels];  // replaced by y
  alignas(16) T B[kSteps][L::kN];
  alignas(16) T C[kSteps][L::kN];
};

template <class T, class L, int kSteps, bool kGeneral>
struct ForwardShared {
  RawTile<T, L, kSteps> raw[2];
  alignas(16) float2 drive[kSteps][L::kChannels];  // delta and delta u; general: delta and u
  alignas(16) float alpha[kGeneral ? kSteps : 1][L::kChannels];
  alignas(16) float B[kSteps][L::kN];
  alignas(16) float C[kSteps][L::kN];
};

/// Steps per tile: as many as 64 KB of shared memory hold, which every GPU has.
template <class T, class L, bool kGeneral>
constexpr int steps_per_tile() {
  constexpr std::size_t kLimit = 64 * 1024;
  if (sizeof(ForwardShared<T, L, 64, kGeneral>) <= kLimit) return 64;
  if (sizeof(ForwardShared<T, L, 32, kGeneral>) <= kLimit) return 32;
  if (sizeof(ForwardShared<T, L, 16, kGeneral>) <= kLimit) return 16;
  return 8;
}

template <class T>
struct ForwardArgs {
  Operands<T> in;
  const float* starts;  // [B, S, E, N]; state_in if there is one segment; null: 0
  DeviceRows<T> y;
  float* state_out;
  float* chunk_states;
  float* ends;      // step 1
  float* products;  // step 1
};

/// One tile of steps of a block: staging, the recurrence, the output.
template <class T, class L, bool kGeneral, bool kEnds>
struct Forward {
  static constexpr int kSteps = steps_per_tile<T, L, kGeneral>();
  static constexpr int kGroup = L::kLanes < 8 ? L::kLanes : 8;  // steps whose y are added at once
  using Shared = ForwardShared<T, L, kSteps, kGeneral>;
  using Raw = RawTile<T, L, kSteps>;

  const ForwardArgs<T>& p;
  const Place<L>& at;
  Shared& s;
  float A[L::kStates];  // times log2(e) unless general
  float h[L::kStates];
  float product[kGeneral && kEnds ? L::kStates : 1];
  float delta_sum = 0.0F;
  float D;
  // Channel of the calling thread while a tile is prepared.
  int column;
  float bias;
  float rate = 0.0F;

  __device__ Forward(const ForwardArgs<T>& args, const Place<L>& place, Shared& shared)
      : p(args), at(place), s(shared) {
    const Operands<T>& in = p.in;
    read_A<L>(in.A_log, at, in.sizes.dstate, kGeneral ? 1.0F : kLog2e, A);
    D = in.D != nullptr && at.active ? in.D[at.channel] : 0.0F;
    column = static_cast<int>(threadIdx.x) % L::kChannels;
    const int channel = at.tile * L::kChannels + column;
    const bool exists = channel < in.sizes.channels;
    bias = exists ? in.dt_bias[channel] : 0.0F;
    if (kGeneral && in.tau != nullptr) rate = exists ? softplus(in.dtA_bias[channel]) : 0.0F;
    for (float& v : product) v = 1.0F;
  }

  __device__ void load(Raw& raw, int first) const {
    constexpr int kThreads = L::kThreads;
    const Operands<T>& in = p.in;
    const std::int64_t row = at.first_row + first;
    const int rows = min(at.length, at.stop) - first;
    const int c = at.tile * L::kChannels;
    const int channels = in.sizes.channels;
    const int dstate = in.sizes.dstate;
    load_tile<kSteps, L::kChannels, kThreads>(raw.u[0], in.u, row, rows, c, channels,
                                              in.wide_channels);
    load_tile<kSteps, L::kChannels, kThreads>(raw.dt[0], in.dt, row, rows, c, channels,
                                              in.wide_channels);
    load_tile<kSteps, L::kN, kThreads>(raw.B[0], in.B, row, rows, 0, dstate, in.wide_states);
    if constexpr (kEnds) return;
    load_tile<kSteps, L::kN, kThreads>(raw.C[0], in.C, row, rows, 0, dstate, in.wide_states);
    if (in.z.data != nullptr)
      load_tile<kSteps, L::kChannels, kThreads>(raw.z[0], in.z, row, rows, c, channels,
                                                in.wide_channels);
  }

  __device__ void prepare(const Raw& raw, int first) const {
    static_assert(L::kThreads % L::kChannels == 0);
    constexpr int kAtOnce = L::kThreads / L::kChannels;
#pragma unroll 4
    for (int k = 0; k < (kSteps + kAtOnce - 1) / kAtOnce; ++k) {
      const int j = static_cast<int>(threadIdx.x) / L::kChannels + k * kAtOnce;
      if (kSteps % kAtOnce != 0 && j >= kSteps) break;
      const int t = first + j;
      const bool valid = t < at.length && t < at.stop;
      const float delta = valid ? softplus(to_float(raw.dt[j][column]) + bias) : 0.0F;
      const float u = to_float(raw.u[j][column]);
      if constexpr (kGeneral) {
        float alpha = delta;
        if (p.in.tau != nullptr) alpha = valid ? p.in.tau[at.first_row + t] * rate : 0.0F;
        s.alpha[j][column] = alpha;
        s.drive[j][column] = {delta, u};
      } else {
        s.drive[j][column] = {delta, delta * u};
      }
    }
    widen_tile<kSteps * L::kN, L::kThreads>(raw.B[0], s.B[0]);
    if constexpr (!kEnds) widen_tile<kSteps * L::kN, L::kThreads>(raw.C[0], s.C[0]);
  }

  /// One step; returns the part of sum C h of this thread.
  __device__ __forceinline__ float advance(int j) {
    const float2 d = s.drive[j][at.local];
    float B[L::kStates];
    float C[L::kStates];
    read_shared<L::kStates>(s.B[j] + at.part * L::kStates, B);
    if constexpr (!kEnds) read_shared<L::kStates>(s.C[j] + at.part * L::kStates, C);
    if constexpr (kEnds && !kGeneral) delta_sum += d.x;
    float y = 0.0F;
#pragma unroll
    for (int i = 0; i < L::kStates; ++i) {
      if constexpr (kGeneral) {
        const GeneralRule rule{p.in.discretization};
        const float a = rule.multiplier(s.alpha[j][at.local], A[i]);
        if constexpr (kEnds) product[i] *= a;
        h[i] = fmaf(a, h[i], rule.factor(d.x, A[i]) * d.y * B[i]);
      } else {
        h[i] = fmaf(exp2_approx(d.x * A[i]), h[i], d.y * B[i]);
      }
      if constexpr (!kEnds) y = i == 0 ? C[i] * h[i] : fmaf(C[i], h[i], y);
    }
    return y;
  }

  __device__ __forceinline__ void run(Raw& raw) {
    for (int first = 0; first < kSteps; first += kGroup) {
      float y[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) y[j] = advance(first + j);
      if constexpr (!kEnds) {
        constexpr int kCopies = L::kLanes / kGroup;  // lanes with the same sum
        transpose_add<kGroup, L::kLanes, L::kPerWarp>(y, at.part);
        const int j = first + at.part / kCopies;
        if (at.part % kCopies == 0) {
          float v = fmaf(D, to_float(raw.u[j][at.local]), y[0]);
          if (p.in.z.data != nullptr) {
            const float z = to_float(raw.z[j][at.local]);
            v *= z * fast_sigmoid(z);
          }
          raw.z[j][at.local] = from_float<T>(v);
        }
      }
    }
  }

  __device__ void write_ends() {
    const std::int64_t row = at.state_row(p.in.sizes);
    write_states<L>(p.ends, row, at, p.in.sizes.dstate, h);
    float m[L::kStates];
#pragma unroll
    for (int i = 0; i < L::kStates; ++i)
      m[i] = kGeneral ? product[kGeneral ? i : 0] : exp2_approx(delta_sum * A[i]);
    write_states<L>(p.products, row, at, p.in.sizes.dstate, m);
  }
};

// kEnds: step 1, which writes nothing but the end of the segment. Else step 3.
template <class T, class L, bool kGeneral, bool kEnds>
__global__ __launch_bounds__(L::kThreads) void selective_scan_forward_kernel(ForwardArgs<T> p) {
  using Tile = Forward<T, L, kGeneral, kEnds>;
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(bytes);
  const Sizes& sizes = p.in.sizes;
  // Nothing follows the last segment, so step 1 skips it.
  const Place<L> at(sizes, p.in.lengths, kEnds ? sizes.segments - 1 : sizes.segments);
  Tile tile(p, at, shared);
  read_states<L>(kEnds ? nullptr : p.starts, at.state_row(sizes), at, sizes.dstate, tile.h);

  int buffer = 0;
  tile.load(shared.raw[0], at.begin);
  commit_copies();
  for (int first = at.begin; first < at.stop; first += Tile::kSteps, buffer ^= 1) {
    auto& raw = shared.raw[buffer];
    wait_for_copies();
    __syncthreads();
    if (first + Tile::kSteps < at.stop) tile.load(shared.raw[buffer ^ 1], first + Tile::kSteps);
    commit_copies();
    tile.prepare(raw, first);
    if (!kEnds && p.chunk_states != nullptr && first % kChunk == 0)
      write_states<L>(
          p.chunk_states,
          (std::int64_t{at.batch} * sizes.chunks + first / kChunk) * sizes.channels + at.channel,
          at, sizes.dstate, tile.h);
    __syncthreads();
    tile.run(raw);
    if constexpr (!kEnds) {
      __syncthreads();
      store_tile<Tile::kSteps, L::kChannels, L::kThreads>(
          raw.z[0], p.y, at.first_row + first, at.stop - first, at.length - first,
          at.tile * L::kChannels, sizes.channels, p.in.wide_channels);
    }
  }
  if constexpr (kEnds)
    tile.write_ends();
  else if (p.state_out != nullptr && at.segment == sizes.segments - 1)
    write_states<L>(p.state_out, std::int64_t{at.batch} * sizes.channels + at.channel, at,
                    sizes.dstate, tile.h);
}

template <class T, class L, bool kGeneral>
void launch_forward(Context& ctx, const SelectiveScanForward& a) {
  const Sizes sizes(a.in, L::kChannels, L::kWarps);
  ForwardArgs<T> p{Operands<T>(a.in, sizes),
                   data_or_null<float>(a.in.state_in),
                   device_rows<T>(a.y),
                   data_or_null<float>(a.state_out),
                   data_or_null<float>(a.chunk_states),
                   nullptr,
                   nullptr};
  p.in.wide_channels = p.in.wide_channels && Operands<T>::wide(p.y, sizes.channels);
  const cudaStream_t stream = ctx.stream().handle;
  Tensor ends;
  Tensor products;
  if (sizes.segments > 1) {
    ends = ctx.empty(sizes.carry_shape(), DType::float32);
    products = ctx.empty(sizes.carry_shape(), DType::float32);
    p.ends = ends.view().template data<float>();
    p.products = products.view().template data<float>();
    const auto kernel = selective_scan_forward_kernel<T, L, kGeneral, true>;
    constexpr std::size_t kBytes = sizeof(typename Forward<T, L, kGeneral, true>::Shared);
    allow_shared(kernel, kBytes);
    kernel<<<sizes.blocks(sizes.segments - 1), L::kThreads, kBytes, stream>>>(p);
    LRNN_CUDA_CHECK_LAUNCH();
    launch_carry(ctx, {sizes, false, p.products, p.starts, p.ends});
    p.starts = p.ends;
  }
  const auto kernel = selective_scan_forward_kernel<T, L, kGeneral, false>;
  constexpr std::size_t kBytes = sizeof(typename Forward<T, L, kGeneral, false>::Shared);
  allow_shared(kernel, kBytes);
  kernel<<<sizes.blocks(sizes.segments), L::kThreads, kBytes, stream>>>(p);
  LRNN_CUDA_CHECK_LAUNCH();
}

/// Calls f.operator()<L>(). The general rule has fewer layouts: more lanes hold no state.
template <bool kGeneral, class F>
void visit_layout(std::int64_t dstate, F&& f) {
  if (dstate <= 16) return f.template operator()<Layout<4, 4, 32>>();
  if constexpr (!kGeneral) {
    if (dstate <= 32) return f.template operator()<Layout<8, 4, 32>>();
  }
  if (dstate <= 64) return f.template operator()<Layout<8, 8, 32>>();
  if constexpr (!kGeneral) {
    if (dstate <= 128) return f.template operator()<Layout<16, 8, 16>>();
  }
  return f.template operator()<Layout<32, 8, 8>>();
}

constexpr int kCarryThreads = 256;

// One thread owns one state of one channel of one sequence and walks the segments. Bound by
// latency.
__global__ __launch_bounds__(kCarryThreads) void selective_scan_carry_kernel(CarryArgs p) {
  const std::int64_t per_segment = std::int64_t{p.sizes.channels} * p.sizes.dstate;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kCarryThreads + threadIdx.x;
  if (i >= p.sizes.batch * per_segment) return;
  const std::int64_t batch = i / per_segment;
  const int segments = p.sizes.segments;
  const std::int64_t base = batch * segments * per_segment + i % per_segment;
  float carry = p.start == nullptr ? 0.0F : p.start[i];
  for (int k = 0; k < segments; ++k) {
    const int segment = p.reverse ? segments - 1 - k : k;
    const std::int64_t at = base + segment * per_segment;
    const bool last = k == segments - 1;  // step 1 skipped it: nothing follows
    const float end = last ? 0.0F : p.ends[at];
    const float product = last ? 0.0F : p.products[at];
    p.ends[at] = carry;
    carry = fmaf(product, carry, end);
  }
}

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
      const float a = kGeneral ? rule.multiplier(alpha, A) : exp2_approx(alpha * A);
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

}  // namespace

void launch_carry(Context& ctx, const CarryArgs& p) {
  const std::int64_t threads = std::int64_t{p.sizes.batch} * p.sizes.channels * p.sizes.dstate;
  selective_scan_carry_kernel<<<static_cast<unsigned>((threads + kCarryThreads - 1) /
                                                      kCarryThreads),
                                kCarryThreads, 0, ctx.stream().handle>>>(p);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace selective

void selective_scan_forward(Context& ctx, const SelectiveScanForward& a) {
  constexpr const char* op = "selective_scan_forward";
  const std::int64_t dstate = a.in.A_log.dim(1);
  selective::check_limits(op, a.in);
  visit_float(op, a.in.u.dtype(), [&]<class T>() {
    selective::visit_rule(selective::is_general(a.in), [&]<bool kGeneral>() {
      selective::visit_layout<kGeneral>(
          dstate, [&]<class L>() { selective::launch_forward<T, L, kGeneral>(ctx, a); });
    });
  });
}

/// States of a thread for many sequences: B and C of them are one access.
template <class T>
constexpr int kManyStates = kWide<T>;

void selective_scan_step(Context& ctx, const SelectiveScanStep& a) {
  visit_float("selective_scan_step", a.in.u.dtype(), [&]<class T>() {
    const std::int64_t dstate = a.in.A_log.dim(1);
    const auto aligned = [&](int n) {
      const auto allows = [&]<class U>(const U* p, std::int64_t stride) {
        return allows_vectors(p, dstate, stride, n);
      };
      return allows(a.state.data<float>(), dstate) && allows(a.in.A_log.data<float>(), dstate) &&
             allows(a.in.B.data<T>(), detail::row_stride(a.in.B)) &&
             allows(a.in.C.data<T>(), detail::row_stride(a.in.C));
    };
    constexpr std::int64_t kSeveralSequences = 8;
    constexpr std::int64_t kManySequences = 64;
    if (a.in.u.dim(0) >= kManySequences && !a.dt_low && aligned(kManyStates<T>))
      selective::launch_step<T, kManyStates<T>, 2>(ctx, a);
    else if (aligned(4) && a.in.u.dim(0) >= kSeveralSequences)
      selective::launch_step<T, 4, 2>(ctx, a);
    else if (aligned(4))
      selective::launch_step<T, 4, 1>(ctx, a);
    else
      selective::launch_step<T, 1, 1>(ctx, a);
  });
}

}  // namespace lrnn::cuda
