/// Row-strided matrices: all leading dimensions of a tensor as rows.
#pragma once

#include "common/eigen.hpp"
#include "ops/dispatch.hpp"

namespace lrnn::cpu {

/// Dense rows at one distance. T may be const.
template <class T>
struct Rows {
  T* data;
  std::int64_t count;
  std::int64_t width;
  std::int64_t stride;

  [[nodiscard]] T* operator[](std::int64_t row) const { return data + row * stride; }
};

template <class T>
Rows<const T> rows_of(TensorView t) {
  return {t.data<T>(), detail::row_count(t), t.dim(-1), detail::row_stride(t)};
}
template <class T>
Rows<T> rows_of(MutableTensorView t) {
  return {t.data<T>(), detail::row_count(t), t.dim(-1), detail::row_stride(t)};
}

/// Of an operand that may be absent.
template <class T>
const T* data_or_null(TensorView t) {
  return t ? t.data<T>() : nullptr;
}
template <class T>
T* data_or_null(MutableTensorView t) {
  return t ? t.data<T>() : nullptr;
}

}  // namespace lrnn::cpu
