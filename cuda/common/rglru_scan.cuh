/// What the forward and backward kernels of rglru_scan share: operands and gates.
#pragma once

#include "lrnn/ops/rglru_scan.hpp"

#include "common/first_order.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda::rglru {

using namespace first_order;  // NOLINT(google-build-using-namespace)

static_assert(kSteps == kRglruScanChunk);  // a slice begins with a saved state
constexpr float kLog2e = 1.4426950408889634F;
constexpr float kLn2 = 0.6931471805599453F;

// ---- gates ----

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float square_root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// e^-v. bfloat16 kernels have no time for more than the hardware's exponential; its error here,
/// 6e-8 |v|, is far below the rounding of v.
template <class T>
__device__ __forceinline__ float exp_minus(float v) {
  if constexpr (sizeof(T) == 2) return ex2(-kLog2e * v);
  return expf(-v);
}
template <class T>
__device__ __forceinline__ float sigmoid(float v) {
  return reciprocal(1.0F + exp_minus<T>(v));
}
/// The larger number, or NaN if one is.
__device__ __forceinline__ float larger(float x, float y) {
#if __CUDA_ARCH__ >= 800
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x < y ? y : x;
#endif
}
/// sig(v), and in `rest` 1 - sig(v) without cancellation.
template <class T>
__device__ __forceinline__ float sigmoid(float v, float& rest) {
  const float e = exp_minus<T>(larger(v, -80.0F));  // finite; sig(-80) is 0 beside anything
  const float s = reciprocal(1.0F + e);
  rest = e * s;
  return s;
}

/// a = 2^t and u = 1 - a, both to a few units of their own last place, for t <= 0. A multiplier
/// near 1 must not lose its distance from 1: sqrt(1 - a^2) = sqrt(u (2 - u)), and the rounding of
/// the hardware's exponential is not centred there.
__device__ __forceinline__ void decay(float t, float& a, float& u) {
  t = larger(t, -126.0F);
  const float shifted = t + 12582912.0F;  // 1.5 * 2^23: the last bits of the sum are rint(t)
  const float f = t - (shifted - 12582912.0F);
  // 2^f - 1 on [-1/2, 1/2], interpolated at Chebyshev nodes: 4e-8 of it in the mean.
  float p = fmaf(1.54531634e-4F, f, 1.33908633e-3F);
  p = fmaf(p, f, 9.61808302e-3F);
  p = fmaf(p, f, 5.55035695e-2F);
  p = fmaf(p, f, 2.40226507e-1F);
  p = fmaf(p, f, 6.93147182e-1F);
  p *= f;
  const float scale = __int_as_float((__float_as_int(shifted) << 23) + 0x3F800000);  // 2^rint(t)
  a = fmaf(scale, p, scale);
  u = fmaf(-scale, p, 1.0F - scale);
}

// ---- operands ----

template <class T>
struct Inputs {
  DeviceRows<const T> v, pre_r, pre_i;
  const float* a_log;
  const std::int32_t* lengths;
  float c;
  int channels;
  int seqlen;
  int chunks;  // of a sequence
  std::int64_t batch;

  __device__ int length(std::int64_t b) const {
    return lengths != nullptr ? min(lengths[b], seqlen) : seqlen;
  }
  /// log2 a at r = 1.
  __device__ float rate(int channel) const {
    const float x = a_log[channel];
    return -kLog2e * c * (fmaxf(-x, 0.0F) + log1pf(expf(-fabsf(x))));
  }
};

/// h = a h + b of one token and one channel.
template <class T>
__device__ __forceinline__ void token(float rate, float v, float pre_r, float pre_i, float& a,
                                      float& b) {
  float u;
  decay(rate * sigmoid<T>(pre_r), a, u);
  b = square_root(u * (2.0F - u)) * (sigmoid<T>(pre_i) * v);
}

template <class T>
Inputs<T> make_inputs(const RglruScanInputs& in) {
  const auto rows = [](TensorView t) {
    return DeviceRows<const T>{t.data<T>(), detail::row_stride(t)};
  };
  return {rows(in.v),
          rows(in.pre_r),
          rows(in.pre_i),
          in.a_log.data<float>(),
          in.lengths ? in.lengths.data<std::int32_t>() : nullptr,
          static_cast<float>(in.c),
          static_cast<int>(in.v.dim(2)),
          static_cast<int>(in.v.dim(1)),
          static_cast<int>(rglru_scan_chunks(in.v.dim(1))),
          in.v.dim(0)};
}

/// What log2 a = rate r is made of; a missing channel never decays.
template <class T>
__device__ float2 rates(const Inputs<T>& p, const Place& at) {
  return {at.exists ? p.rate(at.channel) : 0.0F,
          at.exists && at.second ? p.rate(at.channel + 1) : 0.0F};
}

/// The saved state that enters the slice of a thread in the tile at t0.
template <class T, class State>
__device__ __forceinline__ State* saved_state(const Inputs<T>& p, State* states, const Place& at,
                                              int t0) {
  const std::int64_t row = static_cast<std::int64_t>(at.b) * p.chunks + (t0 + at.offset) / kSteps;
  return states + row * p.channels + at.channel;
}

/// A recurrence gate that makes a token leave the state as it is: r = 0, a = 1, 1 - a^2 = 0.
constexpr float kClosed = -INFINITY;

}  // namespace lrnn::cuda::rglru
