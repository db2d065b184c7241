/// Cache lines that a kernel fetches for the work after its own: rows of tensors lie too far apart
/// for the hardware to do so.
#pragma once

#include <cstdint>

namespace lrnn::cpu {

/// `count` addresses, `stride` bytes apart.
struct Lines {
  const char* first;
  std::int64_t stride, count;

  void fetch(std::int64_t i) const {
#if defined(__GNUC__) || defined(__clang__)
    if (i < count) __builtin_prefetch(first + i * stride, 0, 2);
#endif
  }
};
template <class T>
Lines lines_at(const T* first, std::int64_t stride, std::int64_t count) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  return {reinterpret_cast<const char*>(first), stride * kSize, first == nullptr ? 0 : count};
}
/// All lines of `size` elements in a row.
template <class T>
Lines lines_of_row(const T* first, std::int64_t size) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  return lines_at(first, kLine, (size + kLine - 1) / kLine);
}

}  // namespace lrnn::cpu
