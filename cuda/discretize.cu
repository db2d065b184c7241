// One thread owns one lane: O(lanes) double-precision work, bound by latency. Lanes that share a
// parameter are summed by a second kernel, one block per parameter element, in a fixed order.
#include "lrnn/ops/discretize.hpp"

#include "common/check.cuh"
#include "common/dtype.cuh"
#include "ops/lane_math.hpp"

namespace lrnn::cuda {
namespace {

using detail::Complex;
using detail::LaneGradient;
using detail::LaneSources;

constexpr int kThreads = 64;
constexpr int kSumThreads = 128;

struct ForwardOutputs {
  float* a;
  float* a_low;
  float* gamma;
  float* powers;
  int power_count;
  float* z;
};

__device__ void write_pair(float* planes, std::int64_t lanes, std::int64_t lane, Complex value) {
  if (planes == nullptr) return;
  planes[lane] = static_cast<float>(value.re);
  planes[lanes + lane] = static_cast<float>(value.im);
}

__device__ Complex read_pair(const float* planes, std::int64_t lanes, std::int64_t lane) {
  if (planes == nullptr) return {0.0, 0.0};
  return {static_cast<double>(planes[lane]), static_cast<double>(planes[lanes + lane])};
}

__device__ double low_part(double value) {
  return value - static_cast<double>(static_cast<float>(value));
}

__global__ __launch_bounds__(kThreads) void discretize_forward_kernel(LaneSources<float> sources,
                                                                      ForwardOutputs out) {
  const std::int64_t lane = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t lanes = sources.lanes;
  if (lane >= lanes) return;
  const detail::LaneStep s = sources.step(lane);
  write_pair(out.a, lanes, lane, s.a);
  write_pair(out.a_low, lanes, lane, {low_part(s.a.re), low_part(s.a.im)});
  write_pair(out.gamma, lanes, lane, s.gamma);
  if (out.z != nullptr) {
    const double turns = s.z.im * 0.15915494309189535;
    out.z[lane] = static_cast<float>(s.z.re);
    out.z[lanes + lane] = static_cast<float>(low_part(s.z.re));
    out.z[2 * lanes + lane] = static_cast<float>(turns);
    out.z[3 * lanes + lane] = static_cast<float>(low_part(turns));
  }
  Complex power{1.0, 0.0};
  for (int j = 0; j < out.power_count; ++j) {
    write_pair(out.powers + 2 * j * lanes, lanes, lane, power);
    power = power * s.a;
  }
}

__global__ __launch_bounds__(kThreads) void discretize_backward_kernel(
    LaneSources<float> sources, const float* __restrict__ da, const float* __restrict__ dz,
    const float* __restrict__ dgamma, double* __restrict__ gradients) {
  const std::int64_t lane = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t lanes = sources.lanes;
  if (lane >= lanes) return;
  const LaneGradient g = lane_gradient(sources, lane, read_pair(da, lanes, lane),
                                       read_pair(dz, lanes, lane), read_pair(dgamma, lanes, lane));
  gradients[lane] = g.A_re;
  gradients[lanes + lane] = g.A_im;
  gradients[2 * lanes + lane] = g.dt;
  gradients[3 * lanes + lane] = g.gamma_log;
}

struct SharedGradient {
  float* grad;
  std::int64_t stride;  // between elements of grad
  std::int64_t count;
  std::int64_t first;  // lanes of element k: first * k + i * next, i < uses
  std::int64_t next;
  std::int64_t uses;
};
struct SharedGradients {
  SharedGradient part[4];
};

// Block (k, part) sums the lanes of element k: thread i takes lanes i, i + kSumThreads, ...
__global__ __launch_bounds__(kSumThreads) void discretize_sum_kernel(
    const double* __restrict__ gradients, std::int64_t lanes, SharedGradients all) {
  __shared__ double sums[kSumThreads];
  const SharedGradient part = all.part[blockIdx.y];
  const std::int64_t k = blockIdx.x;
  if (part.grad == nullptr || k >= part.count) return;  // the whole block
  const double* const values = gradients + blockIdx.y * lanes + part.first * k;
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < part.uses; i += kSumThreads) sum += values[i * part.next];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) part.grad[k * part.stride] += static_cast<float>(sums[0]);
}

// One thread per element where no lanes share anything.
__global__ __launch_bounds__(kThreads) void discretize_add_kernel(
    const double* __restrict__ gradients, std::int64_t lanes, SharedGradients all) {
  const SharedGradient part = all.part[blockIdx.y];
  const std::int64_t k = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (part.grad == nullptr || k >= part.count) return;
  part.grad[k * part.stride] += static_cast<float>(gradients[blockIdx.y * lanes + k]);
}

float* data_or_null(const MutableTensorView& t) {
  return t ? t.data<float>() : nullptr;
}
const float* data_or_null(const TensorView& t) {
  return t ? t.data<float>() : nullptr;
}

int blocks_for(std::int64_t lanes) {
  return static_cast<int>((lanes + kThreads - 1) / kThreads);
}

// Element k of a rate is used by lanes k, k + K, ...; that of a step by lanes k uses, k uses + 1,
// ...
SharedGradient shared_gradient(const MutableTensorView& grad, std::int64_t lanes, bool of_step) {
  if (!grad) return {};
  const std::int64_t count = grad.numel();
  const std::int64_t uses = lanes / count;
  return {grad.data<float>(), detail::lane_stride(grad), count,
          of_step ? uses : 1, of_step ? 1 : count,       uses};
}

}  // namespace

void discretize_forward(Context& ctx, const DiscretizeForward& args) {
  const LaneSources<float> sources(args.parameters);
  const ForwardOutputs out{data_or_null(args.a),
                           data_or_null(args.a_low),
                           data_or_null(args.gamma),
                           data_or_null(args.powers),
                           args.powers ? static_cast<int>(args.powers.dim(0)) : 0,
                           data_or_null(args.z)};
  discretize_forward_kernel<<<blocks_for(sources.lanes), kThreads, 0, ctx.stream().handle>>>(
      sources, out);
  LRNN_CUDA_CHECK_LAUNCH();
}

void discretize_backward(Context& ctx, const DiscretizeBackward& args) {
  const LaneSources<float> sources(args.parameters);
  const std::int64_t lanes = sources.lanes;
  Tensor gradients = ctx.empty({4, lanes}, DType::float64);
  double* const values = gradients.view().data<double>();
  discretize_backward_kernel<<<blocks_for(lanes), kThreads, 0, ctx.stream().handle>>>(
      sources, data_or_null(args.da), data_or_null(args.dz), data_or_null(args.dgamma), values);
  LRNN_CUDA_CHECK_LAUNCH();
  SharedGradients unshared{};
  SharedGradients shared{};
  std::int64_t most = 0;
  const MutableTensorView grads[4] = {args.dA_re, args.dA_im, args.ddt, args.dgamma_log};
  for (int i = 0; i < 4; ++i) {
    const SharedGradient part = shared_gradient(grads[i], lanes, i == 2);
    (part.uses == 1 ? unshared : shared).part[i] = part;
    if (part.uses > 1) most = std::max(most, part.count);
  }
  discretize_add_kernel<<<dim3(blocks_for(lanes), 4), kThreads, 0, ctx.stream().handle>>>(
      values, lanes, unshared);
  LRNN_CUDA_CHECK_LAUNCH();
  if (most == 0) return;
  discretize_sum_kernel<<<dim3(static_cast<unsigned>(most), 4), kSumThreads, 0,
                          ctx.stream().handle>>>(values, lanes, shared);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
