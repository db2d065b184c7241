// Forward and step of the selective scan.
//
// A CTA walks one segment of one sequence for 32 channels in tiles of kTile steps, double-buffered
// by asynchronous copies. A tile is first turned into (delta, delta u) per channel and into float
// rows of B and C; then every thread advances four states serially in registers, and four steps of
// y at a time are summed over the lanes of a channel by a transposing shuffle. The gate is applied
// by the lane that holds the sum; results leave through shared memory in whole rows.
//
// Bound by issue slots: per state one ex2, two FMA; per four states and step one shuffle and the
// reads of B, C and (delta, delta u). When batch x channels is small, time is cut into segments:
// a first pass leaves each segment's end state and decay, a carry pass chains them.
#include <algorithm>

#include "common/selective_scan.cuh"

namespace lrnn::cuda {
namespace scan {

__global__ void carry_kernel(const float2* __restrict__ ends, const float* __restrict__ start,
                             float* __restrict__ before, std::int64_t states, int batch,
                             int segments, bool reverse) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= states * batch) return;
  const std::int64_t b = i / states;
  const std::int64_t rest = i % states;
  float state = start != nullptr ? start[i] : 0.0F;
  for (int k = 0; k < segments; ++k) {
    const int s = reverse ? segments - 1 - k : k;
    const std::int64_t at = (b * segments + s) * states + rest;
    before[at] = state;
    state = fmaf(ends[at].x, state, ends[at].y);
  }
}

}  // namespace scan

namespace {

using namespace scan;  // NOLINT(google-build-using-namespace)

enum class Pass { Whole, Ends };

/// Where a pass leaves its results.
template <class T>
struct Outputs {
  DeviceRows<T> y;
  float* chunk_states;  // [B, chunks, E, N] or null
  float* state_out;     // [B, E, N] or null
  const float* before;  // [B, segments, E, N] or null: state before each segment
  float2* ends;         // [B, segments, E, N], pass Ends
  bool vectors;         // 16-byte stores of y
};

template <int kLanes>
constexpr int kTile = kLanes <= 4 ? 64 : (kLanes == 32 ? 16 : 32);

/// Shared memory of a CTA, in order.
template <class T, int kLanes, bool kPlain>
struct Layout {
  static constexpr int kC = kChannels<kLanes>;
  static constexpr int kT = kTile<kLanes>;
  static constexpr int kPadded = kStates * kLanes;
  static constexpr int kRaw = 3 * kT * kC;         // u, dt, z of one buffer, elements of T
  static constexpr int kFactors = kPlain ? 2 : 3;  // floats per channel and step
  static constexpr std::size_t kRawBytes = 2 * kRaw * sizeof(T);
  static constexpr std::size_t kBytes =
      kRawBytes + sizeof(float) * (kT * kC * kFactors + 2 * kT * kPadded);
};

template <class T, int kLanes, bool kPlain, Pass pass>
__global__ __launch_bounds__(kThreads<kLanes>) void selective_scan_forward_kernel(
    Inputs<T> p, Outputs<T> out, Segments segments) {
  using L = Layout<T, kLanes, kPlain>;
  constexpr int kC = L::kC;
  constexpr int kT = L::kT;
  constexpr int kCount = kThreads<kLanes>;
  extern __shared__ __align__(16) unsigned char memory[];
  T* const raw = reinterpret_cast<T*>(memory);
  float* const factors = reinterpret_cast<float*>(memory + L::kRawBytes);
  float* const shared_B = factors + kT * kC * L::kFactors;
  float* const shared_C = shared_B + kT * L::kPadded;

  const Place<kLanes> place;
  const int b = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(blockIdx.x) * kC;
  const int columns = min(kC, p.channels - first);
  const int channel = first + place.channel;
  const StateSlot slot(p.dstate, p.channels, channel, place.part);
  const std::int64_t states = static_cast<std::int64_t>(p.channels) * p.dstate;
  const int s = static_cast<int>(blockIdx.z);
  const std::int64_t begin = segments.begin(s);
  const std::int64_t end = segments.end(s, p.seqlen);
  const std::int64_t length = p.length(b);
  const std::int64_t row = b * p.seqlen;

  const auto request = [&](std::int64_t t0, int buffer) {
    T* const tile = raw + buffer * L::kRaw;
    const int rows = static_cast<int>(min(static_cast<std::int64_t>(kT), end - t0));
    copy_tile<T, kC, kCount>(tile, p.u, row + t0, rows, first, columns, p.vectors);
    copy_tile<T, kC, kCount>(tile + kT * kC, p.dt, row + t0, rows, first, columns, p.vectors);
    if (pass == Pass::Whole && p.z.data != nullptr)
      copy_tile<T, kC, kCount>(tile + 2 * kT * kC, p.z, row + t0, rows, first, columns, p.vectors);
  };

  float A[kStates];
  load_A(p.A_log, slot, A);
  float h[kStates];
  if (pass == Pass::Ends)
    slot.load(nullptr, h);
  else if (out.before != nullptr)
    slot.load(out.before + (static_cast<std::int64_t>(b) * segments.count + s) * states, h);
  else
    slot.load(p.state_in != nullptr ? p.state_in + b * states : nullptr, h);
  float product[kStates] = {1.0F, 1.0F, 1.0F, 1.0F};
  float alpha_sum = 0.0F;
  const float D = p.D != nullptr && channel < p.channels ? p.D[channel] : 0.0F;

  request(begin, 0);
  copies_commit();
  int buffer = 0;
  for (std::int64_t t0 = begin; t0 < end; t0 += kT, buffer ^= 1) {
    copies_wait();
    __syncthreads();
    if (t0 + kT < end) request(t0 + kT, buffer ^ 1);
    copies_commit();
    T* const raw_u = raw + buffer * L::kRaw;
    const T* const raw_dt = raw_u + kT * kC;
    T* const raw_z = raw_u + 2 * kT * kC;
    const int steps = static_cast<int>(min(static_cast<std::int64_t>(kT), end - t0));
    const int valid =
        static_cast<int>(max(std::int64_t{0}, min(static_cast<std::int64_t>(steps), length - t0)));
    // Beyond the valid steps delta = 0 and u = 0, which leaves every state as it is.
    for (int i = static_cast<int>(threadIdx.x); i < kT * kC; i += kCount) {
      const int t = i / kC;
      const int c = i % kC;
      float delta = 0.0F;
      float u = 0.0F;
      if (t < valid && c < columns) {
        delta = softplus(to_float(raw_dt[i]) + p.dt_bias[first + c]);
        u = to_float(raw_u[i]);
      }
      if constexpr (kPlain) {
        factors[2 * i] = delta;
        factors[2 * i + 1] = delta * u;
      } else {
        float alpha = delta;
        if (p.tau != nullptr)
          alpha = t < valid && c < columns ? p.tau[row + t0 + t] * softplus(p.dtA_bias[first + c])
                                           : 0.0F;
        factors[3 * i] = alpha;
        factors[3 * i + 1] = delta;
        factors[3 * i + 2] = u;
      }
    }
    load_shared_states<T, L::kPadded, kCount>(shared_B, p.B, row + t0, kT, valid, p.dstate);
    if (pass == Pass::Whole)
      load_shared_states<T, L::kPadded, kCount>(shared_C, p.C, row + t0, kT, valid, p.dstate);
    __syncthreads();

    if (pass == Pass::Whole && out.chunk_states != nullptr && t0 % kChunk == 0)
      slot.store(
          out.chunk_states +
              (static_cast<std::int64_t>(b) * ((p.seqlen + kChunk - 1) / kChunk) + t0 / kChunk) *
                  states,
          h);
    constexpr int G = kGroup<kLanes>;
#pragma unroll 2
    for (int g = 0; g < kT; g += G) {
      float y[G];
#pragma unroll
      for (int j = 0; j < G; ++j) {
        const int t = g + j;
        const float4 B4 =
            *reinterpret_cast<const float4*>(shared_B + t * L::kPadded + kStates * place.part);
        const float Bs[kStates] = {B4.x, B4.y, B4.z, B4.w};
        float Cs[kStates] = {};
        if (pass == Pass::Whole) {
          const float4 C4 =
              *reinterpret_cast<const float4*>(shared_C + t * L::kPadded + kStates * place.part);
          Cs[0] = C4.x;
          Cs[1] = C4.y;
          Cs[2] = C4.z;
          Cs[3] = C4.w;
        }
        y[j] = 0.0F;
        if constexpr (kPlain) {
          const float2 f = *reinterpret_cast<const float2*>(factors + 2 * (t * kC + place.channel));
          if (pass == Pass::Ends) alpha_sum += f.x;
          const float scaled = f.x * kLog2e;
#pragma unroll
          for (int n = 0; n < kStates; ++n) {
            h[n] = fmaf(ex2(scaled * A[n]), h[n], f.y * Bs[n]);
            y[j] = fmaf(Cs[n], h[n], y[j]);
          }
        } else {
          const float* const f = factors + 3 * (t * kC + place.channel);
          const float alpha = f[0];
          const float delta = f[1];
          const float u = f[2];
#pragma unroll
          for (int n = 0; n < kStates; ++n) {
            const float a = multiplier(p.disc, alpha, A[n]);
            h[n] = fmaf(a, h[n], input_factor(p.disc, delta, A[n]) * u * Bs[n]);
            if (pass == Pass::Ends) product[n] *= a;
            y[j] = fmaf(Cs[n], h[n], y[j]);
          }
        }
      }
      if (pass == Pass::Whole) {
        reduce_parts<kLanes, G>(y, place.part);
        if (writes_group<kLanes>(place.part)) {
          const int i = (g + group_step<kLanes>(place.part)) * kC + place.channel;
          const int t = g + group_step<kLanes>(place.part);
          float value = 0.0F;
          if (t < valid && place.channel < columns) {
            value = fmaf(D, to_float(raw_u[i]), y[0]);
            if (p.z.data != nullptr) {
              const float z = to_float(raw_z[i]);
              value *= z * sigmoid(z);
            }
          }
          raw_z[i] = from_float<T>(value);
        }
      }
    }
    if (pass == Pass::Whole) {
      __syncthreads();
      constexpr int N = kWide<T>;
      if (out.vectors && kC % N == 0) {
        for (int i = static_cast<int>(threadIdx.x); i < steps * (kC / N); i += kCount) {
          const int t = i / (kC / N);
          const int c = i % (kC / N) * N;
          if (c < columns)
            *reinterpret_cast<uint4*>(out.y.row(row + t0 + t) + first + c) =
                *reinterpret_cast<const uint4*>(raw_z + t * kC + c);
        }
      } else {
        for (int i = static_cast<int>(threadIdx.x); i < steps * kC; i += kCount)
          if (i % kC < columns) out.y.row(row + t0 + i / kC)[first + i % kC] = raw_z[i];
      }
    }
  }
  if (pass == Pass::Ends) {
    float2* const ends = out.ends + (static_cast<std::int64_t>(b) * segments.count + s) * states;
#pragma unroll
    for (int n = 0; n < kStates; ++n)
      if (n < slot.count)
        ends[slot.offset + n] = {kPlain ? ex2(alpha_sum * kLog2e * A[n]) : product[n], h[n]};
  } else if (out.state_out != nullptr && s + 1 == segments.count) {
    slot.store(out.state_out + b * states, h);
  }
}

template <class T, int kLanes, bool kPlain, Pass pass>
void launch(Context& ctx, const Inputs<T>& p, const Outputs<T>& out, const Segments& segments) {
  constexpr std::size_t shared = Layout<T, kLanes, kPlain>::kBytes;
  const auto kernel = selective_scan_forward_kernel<T, kLanes, kPlain, pass>;
  if (shared > 48 * 1024)
    LRNN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared)));
  const dim3 grid(static_cast<unsigned>((p.channels + kChannels<kLanes> - 1) / kChannels<kLanes>),
                  static_cast<unsigned>(p.batch), static_cast<unsigned>(segments.count));
  kernel<<<grid, kThreads<kLanes>, shared, ctx.stream().handle>>>(p, out, segments);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, int kLanes, bool kPlain>
void forward(Context& ctx, const SelectiveScanForward& a, const Inputs<T>& p) {
  Outputs<T> out{{a.y.data<T>(), detail::row_stride(a.y)},
                 a.chunk_states ? a.chunk_states.data<float>() : nullptr,
                 a.state_out ? a.state_out.data<float>() : nullptr,
                 nullptr,
                 nullptr,
                 false};
  out.vectors = allows_vectors(out.y.data, p.channels, out.y.stride, kWide<T>);
  const std::int64_t tiles = static_cast<std::int64_t>(p.batch) *
                             ((p.channels + kChannels<kLanes> - 1) / kChannels<kLanes>);
  const Segments segments = make_segments(tiles, p.seqlen);
  Tensor ends, before;
  // state_in is read by every CTA of the first segment and state_out written by the last: with the
  // carries in a tensor of their own they may be the same memory.
  if (segments.count > 1 || (a.state_out && a.in.state_in && a.state_out.raw() == p.state_in)) {
    const std::int64_t states = static_cast<std::int64_t>(p.channels) * p.dstate;
    const std::int64_t rows = static_cast<std::int64_t>(p.batch) * segments.count;
    before = ctx.empty(Shape{rows, states}, DType::float32);
    ends = ctx.empty(Shape{rows, states, 2}, DType::float32);
    out.before = before.view().data<float>();
    out.ends = reinterpret_cast<float2*>(ends.view().data<float>());
    if (segments.count > 1)
      launch<T, kLanes, kPlain, Pass::Ends>(ctx, p, out, segments);
    else
      LRNN_CUDA_CHECK(cudaMemsetAsync(out.ends, 0, ends.view().nbytes(), ctx.stream().handle));
    const std::int64_t count = states * p.batch;
    carry_kernel<<<static_cast<unsigned>((count + 255) / 256), 256, 0, ctx.stream().handle>>>(
        out.ends, p.state_in, before.view().data<float>(), states, p.batch, segments.count, false);
    LRNN_CUDA_CHECK_LAUNCH();
  }
  launch<T, kLanes, kPlain, Pass::Whole>(ctx, p, out, segments);
}

constexpr int kStepThreads = 256;

// One thread per (b, channel): N states in turn, four at a time. Bound by the state's bytes.
template <class T>
__global__ __launch_bounds__(kStepThreads) void selective_scan_step_kernel(
    Inputs<T> p, DeviceRows<T> y, float* __restrict__ state, int lanes) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
  const std::int64_t index = i / lanes;  // (b, channel), channels fastest
  const int lane = static_cast<int>(i % lanes);
  const bool exists = index < static_cast<std::int64_t>(p.batch) * p.channels;
  const int b = exists ? static_cast<int>(index / p.channels) : 0;
  const int e = exists ? static_cast<int>(index % p.channels) : 0;
  const float u = to_float(p.u.row(b)[e]);
  const float delta = softplus(to_float(p.dt.row(b)[e]) + p.dt_bias[e]);
  const float alpha = p.tau != nullptr ? p.tau[b] * softplus(p.dtA_bias[e]) : delta;
  float sum = 0.0F;
  for (int n = lane; exists && n < p.dstate; n += lanes) {
    const std::int64_t at = (static_cast<std::int64_t>(b) * p.channels + e) * p.dstate + n;
    const float A = -expf(p.A_log[static_cast<std::int64_t>(e) * p.dstate + n]);
    const float h = fmaf(multiplier(p.disc, alpha, A), state[at],
                         input_factor(p.disc, delta, A) * u * to_float(p.B.row(b)[n]));
    state[at] = h;
    sum = fmaf(to_float(p.C.row(b)[n]), h, sum);
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(0xFFFFFFFFU, sum, offset);
  if (!exists || lane != 0) return;
  if (p.D != nullptr) sum = fmaf(p.D[e], u, sum);
  if (p.z.data != nullptr) {
    const float z = to_float(p.z.row(b)[e]);
    sum *= z * sigmoid(z);
  }
  y.row(b)[e] = from_float<T>(sum);
}

}  // namespace

void selective_scan_forward(Context& ctx, const SelectiveScanForward& a) {
  visit_float("selective_scan_forward", a.in.u.dtype(), [&]<class T>() {
    const Inputs<T> p = make_inputs<T>(a.in);
    visit_lanes("selective_scan_forward", p.dstate, [&]<int kLanes>() {
      if (is_plain(p))
        forward<T, kLanes, true>(ctx, a, p);
      else
        forward<T, kLanes, false>(ctx, a, p);
    });
  });
}

void selective_scan_step(Context& ctx, const SelectiveScanStep& a) {
  visit_float("selective_scan_step", a.in.u.dtype(), [&]<class T>() {
    const Inputs<T> p = make_inputs<T>(a.in);
    int lanes = 1;
    while (lanes < 16 && lanes * 4 <= p.dstate) lanes *= 2;
    const std::int64_t threads = static_cast<std::int64_t>(p.batch) * p.channels * lanes;
    selective_scan_step_kernel<T>
        <<<static_cast<unsigned>((threads + kStepThreads - 1) / kStepThreads), kStepThreads, 0,
           ctx.stream().handle>>>(p, {a.y.data<T>(), detail::row_stride(a.y)},
                                  a.state.data<float>(), lanes);
    LRNN_CUDA_CHECK_LAUNCH();
  });
}

}  // namespace lrnn::cuda
