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
};

// `lanes` neighbouring lanes own a channel and walk its states kVec at a time.
template <class T, int kVec>
__global__ __launch_bounds__(kStepThreads) void selective_scan_step_kernel(StepArgs<T> p) {
  const Operands<T>& in = p.in;
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const std::int64_t i =
      (static_cast<std::int64_t>(blockIdx.x) * kStepThreads + threadIdx.x) / p.lanes;
  const bool exists =
      i < std::int64_t{in.sizes.batch} * in.sizes.channels;  // the others join the shuffles
  const std::int64_t batch = exists ? i / in.sizes.channels : 0;
  const std::int64_t channel = exists ? i % in.sizes.channels : 0;
  const int dstate = in.sizes.dstate;
  const float u = to_float(in.u.row(batch)[channel]);
  const float delta = softplus(to_float(in.dt.row(batch)[channel]) + in.dt_bias[channel]);
  const float alpha = in.tau != nullptr ? in.tau[batch] * softplus(in.dtA_bias[channel]) : delta;
  const GeneralRule rule{in.discretization};
  float y = 0.0F;
  for (int n = lane * kVec; exists && n < dstate; n += p.lanes * kVec) {
    float* const state = p.state + i * dstate + n;
    float h[kVec];
    float A_log[kVec];
    load_vec<float, kVec>(state, h);
    load_vec<float, kVec>(in.A_log + channel * dstate + n, A_log);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float A = -expf(A_log[k]);
      const float drive = rule.factor(delta, A) * u * to_float(in.B.row(batch)[n + k]);
      h[k] = fmaf(rule.multiplier(alpha, A), h[k], drive);
      y = fmaf(to_float(in.C.row(batch)[n + k]), h[k], y);
    }
    store_vec<float, kVec>(state, h);
  }
  for (int offset = p.lanes / 2; offset > 0; offset /= 2)
    y += __shfl_xor_sync(0xFFFFFFFFU, y, offset);
  if (!exists || lane != 0) return;
  if (in.D != nullptr) y = fmaf(in.D[channel], u, y);
  if (in.z.data != nullptr) {
    const float z = to_float(in.z.row(batch)[channel]);
    y *= z * fast_sigmoid(z);
  }
  p.y.row(batch)[channel] = from_float<T>(y);
}

template <class T, int kVec>
void launch_step(Context& ctx, const SelectiveScanStep& a) {
  const Sizes sizes(a.in, 1, 1);
  int lanes = 1;
  while (lanes < 32 && lanes * kVec < sizes.dstate) lanes *= 2;
  const StepArgs<T> p{Operands<T>(a.in, sizes), device_rows<T>(a.y), a.state.data<float>(), lanes};
  const std::int64_t threads = std::int64_t{sizes.batch} * sizes.channels * lanes;
  selective_scan_step_kernel<T, kVec>
      <<<static_cast<unsigned>((threads + kStepThreads - 1) / kStepThreads), kStepThreads, 0,
         ctx.stream().handle>>>(p);
  LRNN_CUDA_CHECK_LAUNCH();
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

void selective_scan_step(Context& ctx, const SelectiveScanStep& a) {
  visit_float("selective_scan_step", a.in.u.dtype(), [&]<class T>() {
    const std::int64_t dstate = a.in.A_log.dim(1);
    if (allows_vectors(a.state.data<float>(), dstate, dstate, 4) &&
        allows_vectors(a.in.A_log.data<float>(), dstate, dstate, 4))
      selective::launch_step<T, 4>(ctx, a);
    else
      selective::launch_step<T, 1>(ctx, a);
  });
}

}  // namespace lrnn::cuda
