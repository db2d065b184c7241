/// 16-byte accesses: N elements of T that travel together.
#pragma once

#include <cstdint>

#include "common/dtype.cuh"

namespace lrnn::cuda {

template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

/// N elements in one access of N * sizeof(T) bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <class T, int N>
__device__ __forceinline__ void load_vec(const T* p, float (&out)[N]) {
  const Vec<T, N> raw = *reinterpret_cast<const Vec<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(raw.v[i]);
}
template <class T, int N>
__device__ __forceinline__ void store_vec(T* p, const float (&in)[N]) {
  Vec<T, N> raw;
#pragma unroll
  for (int i = 0; i < N; ++i) raw.v[i] = from_float<T>(in[i]);
  *reinterpret_cast<Vec<T, N>*>(p) = raw;
}

/// Whether rows of `width` elements at distance `stride` from `p` can be walked in N-element steps.
template <class T>
bool allows_vectors(const T* p, std::int64_t width, std::int64_t stride, int n) {
  return reinterpret_cast<std::uintptr_t>(p) % (sizeof(T) * static_cast<std::size_t>(n)) == 0 &&
         width % n == 0 && stride % n == 0;
}

/// Row-strided operand of a kernel.
template <class T>
struct DeviceRows {
  T* data;
  std::int64_t stride;

  __device__ __forceinline__ T* row(std::int64_t r) const { return data + r * stride; }
};

}  // namespace lrnn::cuda
