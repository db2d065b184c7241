// Three launches: the product with all projections; a block per sequence that contracts them, moves
// the state on, reads it out and applies GELU; the product with the gate, whose epilogue gates and
// adds. Bound by latency. Sizes that the kernels do not take go through the ops one by one.
#include "lrnn/ops/linear.hpp"

#include "common/activation.cuh"
#include "common/linear_two_products.cuh"
#include "common/s7_contract.cuh"
#include "common/transpose_add.cuh"
#include "ops/s7_gated_step_parts.hpp"
#include "ops/s7_scan.hpp"

namespace lrnn::cuda {
namespace s7 {
namespace {

constexpr int kStepThreads = 512;
constexpr int kStepWarps = kStepThreads / 32;
constexpr std::int64_t kMostRows = 8192;    // of pB, H N: what the threads load at once
constexpr std::int64_t kMostTokens = 1024;  // so that their projections take 32 MiB at most

template <class T>
struct RowArgs {
  const T* P;  // [tokens, N + 2 H N + H + N]
  const T* x;
  const float* base;
  T* v;
  T* activated;
  float* state;
  int dim;
};

/// What a thread holds of pB or pC of its token: every kStepThreads-th group of kWide states. A
/// channel has kPer groups.
template <class T, int kPer>
struct Projections {
  static constexpr int kVectors = static_cast<int>(kMostRows) / (kWide<T> * kStepThreads);
  Packed<T, kWide<T>> groups[kVectors];

  __device__ __forceinline__ void load(const T* p, int dim) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      groups[i] = {};
      if (channel(i) < dim) groups[i].load(p + group(i) * kWide<T>);
    }
  }
  [[nodiscard]] static __device__ __forceinline__ int group(int i) {
    return static_cast<int>(threadIdx.x) + i * kStepThreads;
  }
  [[nodiscard]] static __device__ __forceinline__ int channel(int i) { return group(i) / kPer; }
};

template <class T, int kPer>
__global__ __launch_bounds__(kStepThreads) void s7_step_row_kernel(RowArgs<T> a) {
  using Own = Projections<T, kPer>;
  constexpr int kVectors = Own::kVectors;
  constexpr int kStates = kWide<T>;   // of a thread
  constexpr int kN = kPer * kStates;  // of a token
  constexpr int kParts = 32 / kPer;   // channels of a warp at a time
  __shared__ float sums[kStepWarps][kN];
  __shared__ __align__(16) float states[kN];
  let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x);
  const int first = thread % kPer * kStates;
  const std::int64_t token = blockIdx.x;
  const std::int64_t HN = static_cast<std::int64_t>(a.dim) * kN;
  const T* const pA = a.P + token * (2 * HN + a.dim + 2 * kN);
  const T* const pD = pA + kN + 2 * HN;
  const float base = thread < kN ? a.base[thread] : 0.0F;
  wait_for_previous_kernel();
  Own B;
  Own C;
  B.load(pA + kN, a.dim);
  float x[kVectors];
  float skip[kVectors];
  const auto channel = [&](int i) { return min(Own::channel(i), a.dim - 1); };
#pragma unroll
  for (int i = 0; i < kVectors; ++i) x[i] = to_float(a.x[token * a.dim + channel(i)]);
  C.load(pA + kN + HN, a.dim);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) skip[i] = to_float(pD[channel(i)]) * x[i];
  float A = 0.0F;
  float drive = 0.0F;
  float state = 0.0F;
  if (thread < kN) {
    A = to_float(pA[thread]) + base;
    drive = to_float(pD[a.dim + thread]);
    state = a.state[token * kN + thread];
  }
  float sum[kStates] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
#pragma unroll
    for (int k = 0; k < kStates; ++k) sum[k] = fmaf(B.groups[i].get(k), x[i], sum[k]);
  const int part = thread % 32 / kPer;
  transpose_add<kStates, kParts, kPer>(sum, part);
  if (part % kLanesOfSum<kStates, kParts> == 0)
#pragma unroll
    for (int k = 0; k < kSumsOfLane<kStates, kParts>; ++k)
      sums[thread / 32][first + first_sum<kStates, kParts>(part) + k] = sum[k];
  __syncthreads();
  if (thread < kN) {
#pragma unroll
    for (int w = 0; w < kStepWarps; ++w) drive += sums[w][thread];
    state = fmaf(multiplier(A), state, drive);
    states[thread] = state;
    a.state[token * kN + thread] = state;
  }
  __syncthreads();
  float h[kStates];
#pragma unroll
  for (int k = 0; k < kStates; k += 4)
    load_vec<float, 4>(states + first + k, reinterpret_cast<float (&)[4]>(h[k]));
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float v = 0.0F;
#pragma unroll
    for (int k = 0; k < kStates; ++k) v = fmaf(C.groups[i].get(k), h[k], v);
#pragma unroll
    for (int distance = kPer / 2; distance > 0; distance /= 2)
      v += __shfl_xor_sync(0xFFFFFFFFU, v, distance);
    if (thread % kPer != 0 || Own::channel(i) >= a.dim) continue;
    const T rounded = from_float<T>(v + skip[i]);
    const std::int64_t at = token * a.dim + Own::channel(i);
    a.v[at] = rounded;
    a.activated[at] = from_float<T>(activate<Activation::Gelu>(to_float(rounded)));
  }
}

/// y = sig(sum) v + hid.
template <class T>
struct Gate {
  DeviceRows<const T> v, hid;
  DeviceRows<T> y;

  struct Operands {
    float v, hid;
  };
  __device__ __forceinline__ Operands load(int r, int c) const {
    return {to_float(v.row(r)[c]), to_float(hid.row(r)[c])};
  }
  __device__ __forceinline__ void operator()(int r, int c, float sum, const Operands& o) const {
    const auto rounded = [](float value) { return to_float(from_float<T>(value)); };
    const float gated = rounded(o.v * sigmoid(rounded(sum)));
    y.row(r)[c] = from_float<T>(gated + o.hid);
  }
};

/// Calls f.operator()<kPer>() if the row kernel takes these sizes; returns whether it did.
template <class T, class F>
bool visit_states(std::int64_t dim, std::int64_t dstate, F&& f) {
  if (dim % kWide<T> != 0 || dstate % kWide<T> != 0 || dim * dstate > kMostRows) return false;
  switch (dstate / kWide<T>) {
    case 1:
      f.template operator()<1>();
      return true;
    case 2:
      f.template operator()<2>();
      return true;
    case 4:
      f.template operator()<4>();
      return true;
    case 8:
      f.template operator()<8>();
      return true;
    default:
      return false;
  }
}

template <class T>
few_rows::Args<T> gate_product(const S7GatedStep& a, TensorView activated) {
  return {.x = device_rows<T>(activated),
          .weight = device_rows<T>(a.gate),
          .rows = static_cast<int>(a.x.dim(0)),
          .columns = static_cast<int>(a.x.dim(2)),
          .depth = static_cast<int>(a.x.dim(2)),
          .stable_weight = true};
}

/// Whether it did.
template <class T>
bool step(Context& ctx, const S7GatedStep& a) {
  const std::int64_t tokens = a.x.dim(0);
  const lrnn::detail::S7Rows rows{a.x.dim(2), a.base.dim(0)};
  const Shape shape = {tokens, rows.dim};
  if (tokens > kMostTokens || !few_rows::fuses<T>(a.x, a.gate)) return false;
  return visit_states<T>(rows.dim, rows.dstate, [&]<int kPer>() {
    const cudaStream_t stream = ctx.stream().handle;
    Tensor P = ctx.empty({tokens, rows.count()}, a.x.dtype());
    Tensor v = ctx.empty(shape, a.x.dtype());
    Tensor activated = ctx.empty(shape, a.x.dtype());
    lrnn::linear_forward(
        ctx, {.x = a.x.reshape(shape), .weight = a.weight, .y = P, .stable_weight = true});
    launch_overlapped(s7_step_row_kernel<T, kPer>, static_cast<unsigned>(tokens), kStepThreads, 0,
                      stream,
                      RowArgs<T>{.P = P.view().data<T>(),
                                 .x = a.x.data<T>(),
                                 .base = a.base.data<float>(),
                                 .v = v.view().data<T>(),
                                 .activated = activated.view().data<T>(),
                                 .state = a.state.data<float>(),
                                 .dim = static_cast<int>(rows.dim)});
    few_rows::launch(stream, gate_product<T>(a, activated),
                     Gate<T>{device_rows<T>(TensorView(v)), device_rows<T>(a.hid.reshape(shape)),
                             device_rows<T>(a.y.reshape(shape))});
  });
}

}  // namespace
}  // namespace s7

void s7_gated_step(Context& ctx, const S7GatedStep& a) {
  visit_float("s7_gated_step", a.x.dtype(), [&]<class T>() {
    if (!s7::step<T>(ctx, a)) lrnn::detail::s7_gated_step_by_parts(ctx, a);
  });
}

}  // namespace lrnn::cuda
