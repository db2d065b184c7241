/// As many neighbouring channels as a vector register holds, as an Eigen array.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/eigen.hpp"

namespace lrnn::cpu {

template <class T>
constexpr int kLanes = Eigen::internal::packet_traits<T>::size;
template <class T>
using Pack = Eigen::Array<T, kLanes<T>, 1>;

/// `count` values; the lanes beyond hold `padding`.
template <class T>
Pack<T> load(const T* p, std::int64_t count, T padding = T(0)) {
  if (count == kLanes<T>) return Eigen::Map<const Pack<T>>(p);
  Pack<T> v = Pack<T>::Constant(padding);
  std::copy_n(p, count, v.data());
  return v;
}
/// The first `count` lanes.
template <class T>
void store(const Pack<T>& v, T* p, std::int64_t count) {
  std::copy_n(v.data(), count, p);
}

template <class T>
Pack<T> sigmoid(const Pack<T>& v) {
  return T(1) / (T(1) + (-v).exp());
}
template <class T>
Pack<T> softplus(const Pack<T>& v) {
  return v.max(T(0)) + (-v.abs()).exp().log1p();
}

}  // namespace lrnn::cpu
