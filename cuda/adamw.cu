// A warp owns one group of 128 elements, a thread four neighbours of it (float4, 8 bytes of
// bfloat16 values); the options of the group are uniform in the warp. Bound by DRAM: 28 bytes per
// element, 30 with bfloat16 values.
#include <cstdint>

#include "lrnn/ops/adamw.hpp"

#include "common/check.cuh"
#include "common/dtype.cuh"
#include "ops/adamw_math.hpp"

namespace lrnn::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;
constexpr int kItems = static_cast<int>(kAdamwGroup) / kWarpSize;
static_assert(kItems == 4);

__global__ void adamw_begin_kernel(detail::AdamwScalars scalars,
                                   const float* __restrict__ grad_norm,
                                   const float* __restrict__ lr,
                                   std::int64_t* __restrict__ counters,
                                   float* __restrict__ factors) {
  detail::adamw_begin_scalar(scalars, *grad_norm, *lr, counters, factors);
}

struct Constants {
  float beta1;
  float beta2;
  float rest1;  // 1 - beta1
  float rest2;
  float eps;
};

// Four elements of a thread: neighbours, or one in each quarter of the group where a pointer is not
// aligned to vectors.
template <bool kVector>
__device__ int element_of(int k) {
  const auto lane = static_cast<int>(threadIdx.x);
  return kVector ? kItems * lane + k : lane + kWarpSize * k;
}

template <bool kVector>
__device__ void load(const float* __restrict__ group, float (&out)[kItems]) {
  if constexpr (kVector) {
    const float4 v = reinterpret_cast<const float4*>(group)[threadIdx.x];
    out[0] = v.x;
    out[1] = v.y;
    out[2] = v.z;
    out[3] = v.w;
  } else {
    for (int k = 0; k < kItems; ++k) out[k] = group[element_of<false>(k)];
  }
}

template <bool kVector>
__device__ void store(float* __restrict__ group, const float (&in)[kItems]) {
  if constexpr (kVector) {
    reinterpret_cast<float4*>(group)[threadIdx.x] = make_float4(in[0], in[1], in[2], in[3]);
  } else {
    for (int k = 0; k < kItems; ++k) group[element_of<false>(k)] = in[k];
  }
}

template <bool kVector>
__device__ void store(__nv_bfloat16* __restrict__ group, const float (&in)[kItems]) {
  if constexpr (kVector) {
    union {
      __nv_bfloat162 pairs[2];
      uint2 bits;
    } packed;
    packed.pairs[0] = __floats2bfloat162_rn(in[0], in[1]);
    packed.pairs[1] = __floats2bfloat162_rn(in[2], in[3]);
    reinterpret_cast<uint2*>(group)[threadIdx.x] = packed.bits;
  } else {
    for (int k = 0; k < kItems; ++k) group[element_of<false>(k)] = __float2bfloat16_rn(in[k]);
  }
}

// `weights` are the masters of bfloat16 `rounded`, or the values themselves where `rounded` is
// null.
template <bool kVector>
__global__ __launch_bounds__(kWarpSize* kWarps) void adamw_update_kernel(
    const float* __restrict__ grad, const float* __restrict__ factors,
    const std::int32_t* __restrict__ group_options, const float* __restrict__ options,
    Constants constants, float* __restrict__ m_out, float* __restrict__ v_out,
    float* __restrict__ weights, __nv_bfloat16* __restrict__ rounded, std::int64_t groups) {
  const std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (group >= groups || factors[detail::kAdamwApply] == 0.0F) return;
  const std::int64_t first = group * kAdamwGroup;
  float g[kItems];
  float m[kItems];
  float v[kItems];
  float w[kItems];
  load<kVector>(grad + first, g);
  load<kVector>(m_out + first, m);
  load<kVector>(v_out + first, v);
  load<kVector>(weights + first, w);
  const float* const option = options + 2 * group_options[group];
  const float lr = factors[detail::kAdamwLr] * option[0];
  const float decay = lr * option[1];
  const float step = lr * factors[detail::kAdamwInverseBias1];
  const float bias2 = factors[detail::kAdamwInverseRootBias2];
  const float grad_factor = factors[detail::kAdamwGradFactor];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const float scaled = grad_factor * g[k];
    m[k] = constants.beta1 * m[k] + constants.rest1 * scaled;
    v[k] = constants.beta2 * v[k] + constants.rest2 * scaled * scaled;
    w[k] -= decay * w[k] + step * m[k] / (sqrtf(v[k]) * bias2 + constants.eps);
  }
  store<kVector>(m_out + first, m);
  store<kVector>(v_out + first, v);
  store<kVector>(weights + first, w);
  if (rounded != nullptr) store<kVector>(rounded + first, w);
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(float4) == 0;
}

}  // namespace

void adamw_begin(Context& ctx, const AdamwBegin& a) {
  const detail::AdamwScalars scalars{a.grad_scale, a.max_grad_norm, a.beta1, a.beta2};
  adamw_begin_kernel<<<1, 1, 0, ctx.stream().handle>>>(
      scalars, a.grad_norm.data<float>(), a.lr.data<float>(), a.counters.data<std::int64_t>(),
      a.factors.data<float>());
  LRNN_CUDA_CHECK_LAUNCH();
}

void adamw_update(Context& ctx, const AdamwUpdate& a) {
  const std::int64_t groups = a.group_options.dim(0);
  if (groups == 0) return;
  const Constants constants{static_cast<float>(a.beta1), static_cast<float>(a.beta2),
                            static_cast<float>(1.0 - a.beta1), static_cast<float>(1.0 - a.beta2),
                            static_cast<float>(a.eps)};
  const bool mixed = static_cast<bool>(a.masters);
  float* const weights = mixed ? a.masters.data<float>() : a.values.data<float>();
  __nv_bfloat16* const rounded = mixed ? a.values.data<__nv_bfloat16>() : nullptr;
  const float* const grad = a.grad.data<float>();
  float* const m = a.m.data<float>();
  float* const v = a.v.data<float>();
  const auto blocks = static_cast<unsigned>((groups + kWarps - 1) / kWarps);
  const dim3 threads(kWarpSize, kWarps);
  const bool vector = is_aligned(grad) && is_aligned(m) && is_aligned(v) && is_aligned(weights) &&
                      is_aligned(rounded);
  const auto kernel = vector ? adamw_update_kernel<true> : adamw_update_kernel<false>;
  kernel<<<blocks, threads, 0, ctx.stream().handle>>>(
      grad, a.factors.data<float>(), a.group_options.data<std::int32_t>(), a.options.data<float>(),
      constants, m, v, weights, rounded, groups);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
