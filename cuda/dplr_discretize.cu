// One warp owns one head, its lanes the states: O(N R^2) double-precision work per head, bound by
// latency. Lanes that share a parameter are summed by a second kernel, one thread per element, in a
// fixed order.
#include <algorithm>

#include "lrnn/ops/dplr_discretize.hpp"

#include "common/check.cuh"
#include "common/dtype.cuh"
#include "ops/dplr_math.hpp"

namespace lrnn::cuda {
namespace {

using detail::DplrGradients;
using detail::DplrOperands;
using detail::DplrPlanes;
using detail::DplrScratch;
using detail::DplrShare;
using detail::DplrSources;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kSumThreads = 64;

struct Warp {
  __device__ std::int64_t index() const { return threadIdx.x % 32; }
  __device__ std::int64_t size() const { return 32; }
  __device__ void barrier() const { __syncwarp(); }
  __device__ double sum(double v) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFFU, v, offset);
    return v;
  }
};

__device__ std::int64_t head_of_warp() {
  return static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
}
__device__ DplrScratch scratch_of(const DplrSources<float>& p, double* memory, std::int64_t head) {
  const std::int64_t size = 2 * p.states + 2 * p.rank * p.rank + 2 * p.rank;
  return {memory + head * size, p.states, p.rank};
}

__global__ __launch_bounds__(kThreads) void dplr_discretize_forward_kernel(
    DplrSources<float> p, double* memory, DplrOperands<float> out, DplrPlanes<float> e_low) {
  const std::int64_t head = head_of_warp();
  if (head >= p.heads) return;  // the whole warp
  detail::dplr_forward(Warp{}, p, head, scratch_of(p, memory, head), out, e_low);
}

__global__ __launch_bounds__(kThreads) void dplr_discretize_backward_kernel(
    DplrSources<float> p, double* memory, DplrOperands<const float> d, DplrGradients gradients) {
  const std::int64_t head = head_of_warp();
  if (head >= p.heads) return;  // the whole warp
  detail::dplr_backward(Warp{}, p, head, scratch_of(p, memory, head), d, gradients);
}

struct SumArgs {
  const double* gradients;  // rows of DplrGradients
  std::int64_t lanes;
  std::int64_t rates;
  std::int64_t steps;
  DplrShare of_rates;
  DplrShare of_steps;
  float* dA_re;
  float* dA_im;
  float* ddt;
  float* dB;
  float* dP;
};

// blockIdx.y is a row.
__global__ __launch_bounds__(kSumThreads) void dplr_discretize_sum_kernel(SumArgs args) {
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const auto row = static_cast<std::int64_t>(blockIdx.y);
  const DplrShare share = row == 2 ? args.of_steps : args.of_rates;
  float* out = nullptr;
  std::int64_t offset = j;
  if (row < 3) {
    out = row == 0 ? args.dA_re : row == 1 ? args.dA_im : args.ddt;
  } else if (row < 5) {
    out = args.dB;
    offset = 2 * j + (row - 3);
  } else {
    out = args.dP;
    offset = 2 * ((row - 5) / 2 * args.rates + j) + (row - 5) % 2;
  }
  if (out == nullptr || j >= (row == 2 ? args.steps : args.rates)) return;
  const double* const values = args.gradients + row * args.lanes + j * share.first;
  double sum = 0.0;
#pragma unroll 8
  for (std::int64_t i = 0; i < share.uses; ++i) sum += values[i * share.next];
  out[offset] += static_cast<float>(sum);
}

float* data_or_null(const MutableTensorView& t) {
  return t ? t.data<float>() : nullptr;
}

unsigned blocks_for(std::int64_t count, int size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

Tensor scratch(Context& ctx, const DplrSources<float>& p) {
  return ctx.empty({p.heads, DplrScratch::size(p.states, p.rank)}, DType::float64);
}

}  // namespace

void dplr_discretize_forward(Context& ctx, const DplrDiscretizeForward& args) {
  const DplrSources<float> p(args.parameters);
  const auto planes = [&](const MutableTensorView& t) {
    return DplrPlanes<float>{data_or_null(t), p.lanes.lanes};
  };
  Tensor memory = scratch(ctx, p);
  dplr_discretize_forward_kernel<<<blocks_for(p.heads, kWarps), kThreads, 0, ctx.stream().handle>>>(
      p, memory.view().data<double>(),
      {planes(args.e), planes(args.w), planes(args.k), planes(args.b)}, planes(args.e_low));
  LRNN_CUDA_CHECK_LAUNCH();
}

void dplr_discretize_backward(Context& ctx, const DplrDiscretizeBackward& args) {
  const DplrSources<float> p(args.parameters);
  const std::int64_t lanes = p.lanes.lanes;
  const auto planes = [&](const TensorView& t) {
    return DplrPlanes<const float>{t.data<float>(), lanes};
  };
  const std::int64_t rows = DplrGradients::rows(p.rank);
  Tensor memory = scratch(ctx, p);
  Tensor gradients = ctx.empty({rows, lanes}, DType::float64);
  double* const values = gradients.view().data<double>();
  dplr_discretize_backward_kernel<<<blocks_for(p.heads, kWarps), kThreads, 0,
                                    ctx.stream().handle>>>(
      p, memory.view().data<double>(),
      {planes(args.de), planes(args.dw), planes(args.dk), planes(args.db)}, {values, lanes});
  LRNN_CUDA_CHECK_LAUNCH();
  const std::int64_t rates = p.lanes.A_re.count;
  const std::int64_t steps = p.lanes.dt.count;
  const dim3 blocks(blocks_for(std::max(rates, steps), kSumThreads), static_cast<unsigned>(rows));
  dplr_discretize_sum_kernel<<<blocks, kSumThreads, 0, ctx.stream().handle>>>(
      {values, lanes, rates, steps, DplrShare::of_rates(lanes, rates),
       DplrShare::of_steps(lanes, steps), data_or_null(args.dA_re), data_or_null(args.dA_im),
       data_or_null(args.ddt), data_or_null(args.dB), data_or_null(args.dP)});
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
