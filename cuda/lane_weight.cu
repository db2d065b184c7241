// One thread per weight element; sums over elements that share a factor go through per-element
// gradients in double and one warp per sum, in a fixed order. O(N M) values in all.
#include "lrnn/ops/lane_weight.hpp"

#include "common/check.cuh"
#include "common/dtype.cuh"
#include "ops/lane_weight_math.hpp"

namespace lrnn::cuda {
namespace {

using detail::Complex;
using detail::LaneWeightGradient;
using detail::LaneWeightSource;

constexpr int kThreads = 128;
constexpr int kWarp = 32;

__global__ __launch_bounds__(kThreads) void lane_weight_forward_kernel(LaneWeightSource<float> f,
                                                                       float* __restrict__ W) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= f.plane()) return;
  const Complex rest = (f.scale * f.left_of(i) * f.right_of(i)) * (f.gamma_of(i) * f.B_of(i));
  for (std::int64_t c = 0; c < f.channels; ++c) {
    const Complex w = rest * f.C_of(c, i);
    W[f.weight_at(c, i)] = static_cast<float>(w.re);
    if (!f.real) W[f.plane() + f.weight_at(c, i)] = static_cast<float>(w.im);
  }
}

// Rows of `parts` [4, N M]: Re B, Im B, left, right.
__global__ __launch_bounds__(kThreads) void lane_weight_backward_kernel(
    LaneWeightSource<float> f, const float* __restrict__ dW, float* __restrict__ dC,
    float* __restrict__ dgamma, double* __restrict__ parts) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t plane = f.plane();
  if (i >= plane) return;
  const LaneWeightGradient g = detail::lane_weight_gradient(f, i, dW, dC);
  if (dgamma != nullptr) {
    dgamma[i] = static_cast<float>(g.gamma.re);
    dgamma[plane + i] = f.real ? 0.0F : static_cast<float>(g.gamma.im);
  }
  if (parts == nullptr) return;
  parts[i] = g.B.re;
  parts[plane + i] = g.B.im;
  parts[2 * plane + i] = g.left;
  parts[3 * plane + i] = g.right;
}

// Element k of an output is the sum of count values of one row of `parts`, from first(k) on at
// distance `step`.
struct SharedSum {
  float* out;
  std::int64_t out_step;
  std::int64_t elements;
  std::int64_t row;
  std::int64_t block;  // first(k) = k / block * block_step + k % block
  std::int64_t block_step;
  std::int64_t step;
  std::int64_t count;
};
struct SharedSums {
  SharedSum part[4];
};

__global__ __launch_bounds__(kThreads) void lane_weight_sum_kernel(const double* __restrict__ parts,
                                                                   std::int64_t plane,
                                                                   SharedSums all) {
  const SharedSum s = all.part[blockIdx.y];
  const std::int64_t k = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) +
                         static_cast<std::int64_t>(threadIdx.x) / kWarp;
  if (s.out == nullptr || k >= s.elements) return;  // a whole warp
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const double* const values = parts + s.row * plane + k / s.block * s.block_step + k % s.block;
  double sum = 0.0;
  for (std::int64_t j = lane; j < s.count; j += kWarp) sum += values[j * s.step];
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    sum += __shfl_down_sync(0xFFFFFFFFU, sum, offset);
  if (lane == 0) s.out[k * s.out_step] += static_cast<float>(sum);
}

unsigned blocks_for(std::int64_t items, std::int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace

void lane_weight_forward(Context& ctx, const LaneWeightForward& args) {
  const LaneWeightSource<float> f(args.factors);
  lane_weight_forward_kernel<<<blocks_for(f.plane(), kThreads), kThreads, 0, ctx.stream().handle>>>(
      f, args.W.data<float>());
  LRNN_CUDA_CHECK_LAUNCH();
}

void lane_weight_backward(Context& ctx, const LaneWeightBackward& args) {
  const LaneWeightSource<float> f(args.factors);
  const std::int64_t plane = f.plane();
  const std::int64_t m = f.substates;
  SharedSums sums{};
  std::int64_t most = 0;
  if (args.dB) {
    const std::int64_t uses = f.lanes / f.copies;
    const std::int64_t elements = f.copies * m;
    float* const dB = args.dB.data<float>();
    sums.part[0] = {dB, 2, elements, 0, elements, 0, elements, uses};
    sums.part[1] = {dB + 1, 2, elements, 1, elements, 0, elements, uses};
    most = elements;
  }
  if (args.dleft) sums.part[2] = {args.dleft.data<float>(), 1, f.lanes, 2, 1, m, 1, m};
  if (args.dright) sums.part[3] = {args.dright.data<float>(), 1, f.lanes, 3, 1, m, 1, m};
  if (args.dleft || args.dright) most = std::max(most, f.lanes);
  Tensor parts;
  if (most > 0) parts = ctx.empty({4, plane}, DType::float64);
  double* const values = most > 0 ? parts.view().data<double>() : nullptr;
  lane_weight_backward_kernel<<<blocks_for(plane, kThreads), kThreads, 0, ctx.stream().handle>>>(
      f, args.dW.data<float>(), args.dC.data<float>(),
      args.dgamma ? args.dgamma.data<float>() : nullptr, values);
  LRNN_CUDA_CHECK_LAUNCH();
  if (most == 0) return;
  lane_weight_sum_kernel<<<dim3(blocks_for(most, kThreads / kWarp), 4), kThreads, 0,
                           ctx.stream().handle>>>(values, plane, sums);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
