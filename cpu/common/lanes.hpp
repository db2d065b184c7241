/// Complex numbers of a block of lanes, which compilers vectorise over.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lrnn::cpu {

/// Lanes of one block: a constant, so that sums do not depend on the number of threads. Unused
/// lanes of the last block hold zeros.
inline constexpr std::int64_t kBlockLanes = 16;

/// In cache lines, so that no vector lies across two.
template <class T>
struct alignas(64) Lanes : std::array<T, kBlockLanes> {};

template <class T>
struct Pair {
  Lanes<T> re{};
  Lanes<T> im{};
};
template <class T>
using Pairs = std::vector<Pair<T>>;

template <class T, class U>
void add(Pair<T>& sum, const Pair<U>& value) {
  for (std::size_t i = 0; i < kBlockLanes; ++i) {
    sum.re[i] += static_cast<T>(value.re[i]);
    sum.im[i] += static_cast<T>(value.im[i]);
  }
}

/// The first `count` of the lanes. All of them, the usual case, are a few vectors.
template <class T>
Lanes<T> load_lanes(const T* first, std::int64_t count) {
  Lanes<T> out{};
  if (count == kBlockLanes)
    std::copy_n(first, kBlockLanes, out.begin());
  else
    std::copy_n(first, count, out.begin());
  return out;
}
template <class T>
void store_lanes(T* first, std::int64_t count, const Lanes<T>& value) {
  if (count == kBlockLanes)
    std::copy_n(value.begin(), kBlockLanes, first);
  else
    std::copy_n(value.begin(), count, first);
}

/// As numbers in a row, [.., 2, kBlockLanes], for kernels in float; null if there are none.
inline const float* numbers(const Pairs<float>& v) {
  static_assert(sizeof(Pair<float>) == 2 * kBlockLanes * sizeof(float));
  return v.empty() ? nullptr : v.front().re.data();
}
inline float* numbers(Pairs<float>& v) {
  return v.empty() ? nullptr : v.front().re.data();
}

}  // namespace lrnn::cpu
