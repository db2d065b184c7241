// Block b of the first kernel sums one run of kNormRun elements; thread i owns the interleaved sums
// 4 i ... 4 i + 3, so that it loads float4. The second kernel, one block, folds the sums of the
// runs by the same scheme. Bound by DRAM: 4 bytes per element. Products are exact in double, so
// fusing them changes nothing and the bits are those of the CPU.
#include <algorithm>
#include <cstdint>

#include "lrnn/ops/global_norm.hpp"

#include "common/check.cuh"
#include "common/dtype.cuh"
#include "ops/norm_shape.hpp"

namespace lrnn::cuda {
namespace {

using detail::kNormLanes;
using detail::kNormRun;

constexpr int kThreads = kNormLanes / 4;

// Called by all threads after the sums of all lanes are written.
__device__ double fold(double* lanes) {
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < half; j += kThreads)
      lanes[j] += lanes[j + half];
  }
  __syncthreads();
  return lanes[0];
}

__device__ void add_squares(double (&sum)[4], float4 v) {
  sum[0] += static_cast<double>(v.x) * static_cast<double>(v.x);
  sum[1] += static_cast<double>(v.y) * static_cast<double>(v.y);
  sum[2] += static_cast<double>(v.z) * static_cast<double>(v.z);
  sum[3] += static_cast<double>(v.w) * static_cast<double>(v.w);
}

// Elements past the end count as 0, which leaves the sums as they are.
__device__ float4 load_guarded(const float* values, std::int64_t at, std::int64_t numel) {
  return make_float4(at < numel ? values[at] : 0.0F, at + 1 < numel ? values[at + 1] : 0.0F,
                     at + 2 < numel ? values[at + 2] : 0.0F,
                     at + 3 < numel ? values[at + 3] : 0.0F);
}

template <bool kVector>
__global__ __launch_bounds__(kThreads) void global_norm_runs_kernel(
    const float* __restrict__ values, std::int64_t numel, double* __restrict__ sums) {
  __shared__ double lanes[kNormLanes];
  const std::int64_t run = static_cast<std::int64_t>(blockIdx.x) * kNormRun;
  const int lane = 4 * static_cast<int>(threadIdx.x);
  const std::int64_t first = run + lane;
  double sum[4] = {0.0, 0.0, 0.0, 0.0};
  if (kVector && run + kNormRun <= numel) {
#pragma unroll 8
    for (int i = 0; i < kNormRun; i += kNormLanes)
      add_squares(sum, *reinterpret_cast<const float4*>(values + first + i));
  } else {
    for (int i = 0; i < kNormRun; i += kNormLanes)
      add_squares(sum, load_guarded(values, first + i, numel));
  }
  for (int k = 0; k < 4; ++k) lanes[lane + k] = sum[k];
  const double total = fold(lanes);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

__global__ __launch_bounds__(kThreads) void global_norm_fold_kernel(const double* __restrict__ sums,
                                                                    std::int64_t count,
                                                                    double scale,
                                                                    float* __restrict__ norm) {
  __shared__ double lanes[kNormLanes];
  for (int lane = static_cast<int>(threadIdx.x); lane < kNormLanes; lane += kThreads) {
    double sum = 0.0;
    for (std::int64_t i = lane; i < count; i += kNormLanes) sum += sums[i];
    lanes[lane] = sum;
  }
  const double total = fold(lanes);
  if (threadIdx.x == 0) *norm = static_cast<float>(scale * sqrt(total));
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(float4) == 0;
}

}  // namespace

void global_norm(Context& ctx, const GlobalNorm& args) {
  std::int64_t count = 0;
  for (const TensorView& grad : args.grads) count += detail::norm_runs(grad.numel());
  Tensor sums = ctx.empty({std::max<std::int64_t>(count, 1)}, DType::float64);
  double* next = sums.view().data<double>();
  for (const TensorView& grad : args.grads) {
    const auto runs = static_cast<unsigned>(detail::norm_runs(grad.numel()));
    if (runs == 0) continue;
    const auto* const values = grad.data<float>();
    if (is_aligned(values))
      global_norm_runs_kernel<true>
          <<<runs, kThreads, 0, ctx.stream().handle>>>(values, grad.numel(), next);
    else
      global_norm_runs_kernel<false>
          <<<runs, kThreads, 0, ctx.stream().handle>>>(values, grad.numel(), next);
    LRNN_CUDA_CHECK_LAUNCH();
    next += runs;
  }
  global_norm_fold_kernel<<<1, kThreads, 0, ctx.stream().handle>>>(
      sums.view().data<double>(), count, args.scale, args.norm.data<float>());
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
