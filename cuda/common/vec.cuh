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

/// N neighbouring elements as bits, in one access of up to 16 bytes. Words, because the compiler
/// takes arrays of elements apart at branches and then moves them element by element.
template <class T, int N>
struct Packed {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  std::uint32_t words[kBytes < 4 ? 1 : kBytes / 4];

  __device__ __forceinline__ void load(const T* p) {
    load_by(p, [](const auto* q) { return *q; });
  }
  /// Through the read-only cache: for memory that the same kernel does not write.
  __device__ __forceinline__ void load_constant(const T* p) {
    load_by(p, [](const auto* q) { return __ldg(q); });
  }
  /// The first to go from the caches: for memory that nobody reads soon.
  __device__ __forceinline__ void load_once(const T* p) {
    load_by(p, [](const auto* q) { return __ldcs(q); });
  }
  /// To global memory.
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kBytes == 16)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    else if constexpr (kBytes == 8)
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(words[0]), "r"(words[1])
                   : "memory");
    else if constexpr (kBytes == 4)
      *reinterpret_cast<unsigned*>(p) = words[0];
    else
      *reinterpret_cast<unsigned short*>(p) = static_cast<unsigned short>(words[0]);
  }
  /// A bfloat16 is the upper half of a float.
  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000U);
  }
  __device__ __forceinline__ void set(const float (&in)[N]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < N; ++i) words[i] = __float_as_uint(in[i]);
    } else if constexpr (N == 1) {
      words[0] = __bfloat16_as_ushort(__float2bfloat16_rn(in[0]));
    } else {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
        memcpy(&words[i], &pair, sizeof(pair));
      }
    }
  }

 private:
  template <class Load>
  __device__ __forceinline__ void load_by(const T* p, Load load) {
    if constexpr (kBytes == 16) {
      const uint4 w = load(reinterpret_cast<const uint4*>(p));
      words[0] = w.x;
      words[1] = w.y;
      words[2] = w.z;
      words[3] = w.w;
    } else if constexpr (kBytes == 8) {
      const uint2 w = load(reinterpret_cast<const uint2*>(p));
      words[0] = w.x;
      words[1] = w.y;
    } else if constexpr (kBytes == 4) {
      words[0] = load(reinterpret_cast<const unsigned*>(p));
    } else {
      static_assert(kBytes == 2);
      words[0] = load(reinterpret_cast<const unsigned short*>(p));
    }
  }
};

template <class T, int N>
__device__ __forceinline__ void store_packed(T* p, const float (&in)[N]) {
  Packed<T, N> row;
  row.set(in);
  row.store(p);
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
