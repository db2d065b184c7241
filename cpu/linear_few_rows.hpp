/// y = x W^T for a few rows of x, as in decoding: the weight is what is read, once and in order.
#pragma once

#include <cstring>

#include "common/rows.hpp"

namespace lrnn::cpu {

template <class T>
using Lanes = typename Eigen::internal::packet_traits<T>::type;
template <class T>
inline constexpr int kLanes = Eigen::internal::packet_traits<T>::size;

template <class T>
Lanes<T> load_lanes(const T* p) {
  return Eigen::internal::ploadu<Lanes<T>>(p);
}
/// bfloat16 is the upper half of a float.
inline Lanes<float> load_lanes(const bfloat16* p) {
#if defined(EIGEN_VECTORIZE_AVX512)  // g++ 12 splits the conversion below in two
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m512i whole = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
  using Half __attribute__((vector_size(sizeof(std::uint16_t) * kLanes<float>))) = std::uint16_t;
  using Whole __attribute__((vector_size(sizeof(std::uint32_t) * kLanes<float>))) = std::uint32_t;
  Half half;
  std::memcpy(&half, p, sizeof(half));
  const Whole whole = __builtin_convertvector(half, Whole) << 16;
#endif
  Lanes<float> lanes;
  std::memcpy(&lanes, &whole, sizeof(whole));
  return lanes;
}
/// `count` < kLanes elements; the rest is zero.
template <class T, class From>
Lanes<T> load_some_lanes(const From* p, std::int64_t count) {
  From v[kLanes<T>] = {};
  std::copy_n(p, count, v);
  return load_lanes(v);
}

/// sums[r] = sum of w x[r]: kChains interleaved sums of vectors, so that their latency is hidden.
/// The order depends on the width alone, not on how many rows go together.
template <int rows, class T, class W>
void dot_rows(const W* w, const Rows<const T>& x, std::int64_t first, T* sums) {
  // Written out: the compiler fuses an addition and a product here and not there.
  using Eigen::internal::padd, Eigen::internal::pmadd;
  constexpr int kChains = 4;
  constexpr std::int64_t kStep = kChains * kLanes<T>;
  constexpr std::size_t kLine = 64;
  // Bytes: the hardware stops at pages, which the weight does not. At the rate of one core, memory
  // is some 3 KiB away.
  constexpr int kAhead = 4096;
  constexpr std::size_t kSums = rows;
  Lanes<T> acc[kSums][kChains];
  for (auto& chains : acc)
    for (auto& sum : chains) sum = Eigen::internal::pset1<Lanes<T>>(T(0));
  std::int64_t i = 0;
  for (; i + kStep <= x.width; i += kStep) {
    for (std::size_t line = 0; line < kStep * sizeof(W); line += kLine)
      __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAhead + line);
    for (int c = 0; c < kChains; ++c) {
      const std::int64_t at = i + c * kLanes<T>;
      const Lanes<T> weight = load_lanes(w + at);
      for (int r = 0; r < rows; ++r)
        acc[r][c] = pmadd(weight, load_lanes(x[first + r] + at), acc[r][c]);
    }
  }
  for (; i + kLanes<T> <= x.width; i += kLanes<T>) {
    const Lanes<T> weight = load_lanes(w + i);
    for (int r = 0; r < rows; ++r)
      acc[r][0] = pmadd(weight, load_lanes(x[first + r] + i), acc[r][0]);
  }
  if (const std::int64_t left = x.width - i; left > 0) {
    const Lanes<T> weight = load_some_lanes<T>(w + i, left);
    for (int r = 0; r < rows; ++r)
      acc[r][1] = pmadd(weight, load_some_lanes<T>(x[first + r] + i, left), acc[r][1]);
  }
  for (int r = 0; r < rows; ++r)
    sums[r] = Eigen::internal::predux(padd(padd(acc[r][0], acc[r][1]), padd(acc[r][2], acc[r][3])));
}

/// All of x W^T for one row of W.
template <class T, class W>
void dot_all_rows(const W* w, const Rows<const T>& x, T* sums) {
  std::int64_t r = 0;
  for (; r + 4 <= x.count; r += 4) dot_rows<4>(w, x, r, sums + r);
  for (; r + 2 <= x.count; r += 2) dot_rows<2>(w, x, r, sums + r);
  for (; r < x.count; ++r) dot_rows<1>(w, x, r, sums + r);
}

/// Calls write(o, sums) with the x.count products of every row of W, in parallel.
template <std::size_t max_rows, class T, class W, class Write>
void for_each_dot(const Rows<const T>& x, const Rows<const W>& w, const Write& write) {
  constexpr std::int64_t kWorthAThread = 1 << 15;  // multiplications
  constexpr int kOutputs = 8;                      // a cache line of results or more
  const bool parallel = x.count * w.count * w.width > kWorthAThread;
#pragma omp parallel for schedule(guided, kOutputs) if (parallel)
  for (std::int64_t o = 0; o < w.count; ++o) {
    T sums[max_rows];
    dot_all_rows(w[o], x, sums);
    write(o, sums);
  }
}

}  // namespace lrnn::cpu
