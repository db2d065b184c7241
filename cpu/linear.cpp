#include "lrnn/ops/linear.hpp"

#include <algorithm>

#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

// Work items of fixed size, so that sums do not depend on the number of threads.
constexpr std::int64_t kRowsPerItem = 128;
constexpr std::int64_t kWeightRowsPerItem = 64;
constexpr std::int64_t kFewRows = 8;  // below, the weight is what is read: split its rows

template <class T>
using Dense = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using ConstMap = Eigen::Map<const Dense<T>, 0, Eigen::OuterStride<>>;
template <class T>
using MutableMap = Eigen::Map<Dense<T>, 0, Eigen::OuterStride<>>;

template <class T>
ConstMap<T> block(const Rows<const T>& r, std::int64_t first, std::int64_t count) {
  return {r[first], count, r.width, Eigen::OuterStride<>(r.stride)};
}
template <class T>
MutableMap<T> block(const Rows<T>& r, std::int64_t first, std::int64_t count) {
  return {r[first], count, r.width, Eigen::OuterStride<>(r.stride)};
}

// Calls f(first, count) for items of `size` out of `total`, in parallel.
template <class F>
void for_each_item(std::int64_t total, std::int64_t size, F&& f) {
  const std::int64_t items = (total + size - 1) / size;
#pragma omp parallel for schedule(dynamic) if (items > 1)
  for (std::int64_t i = 0; i < items; ++i) f(i * size, std::min(size, total - i * size));
}

template <class T>
void forward(const LinearForward& a) {
  const auto x = rows_of<T>(a.x);
  const auto w = rows_of<T>(a.weight);
  const auto y = rows_of<T>(a.y);
  const T* const bias = a.bias ? a.bias.data<T>() : nullptr;
  using RowMap = Eigen::Map<const Eigen::Matrix<T, 1, Eigen::Dynamic>>;
  if (x.count <= kFewRows) {
    for_each_item(w.count, kWeightRowsPerItem, [&](std::int64_t first, std::int64_t count) {
      for (std::int64_t r = 0; r < x.count; ++r) {
        Eigen::Map<Eigen::Matrix<T, Eigen::Dynamic, 1>> out(y[r] + first, count);
        const Eigen::Map<const Eigen::Matrix<T, Eigen::Dynamic, 1>> in(x[r], x.width);
        if (a.accumulate)
          out.noalias() += block<T>(w, first, count) * in;
        else
          out.noalias() = block<T>(w, first, count) * in;
        if (bias != nullptr) out += RowMap(bias + first, count).transpose();
      }
    });
    return;
  }
  for_each_item(x.count, kRowsPerItem, [&](std::int64_t first, std::int64_t count) {
    auto out = block<T>(y, first, count);
    if (a.accumulate)
      out.noalias() += block<T>(x, first, count) * block<T>(w, 0, w.count).transpose();
    else
      out.noalias() = block<T>(x, first, count) * block<T>(w, 0, w.count).transpose();
    if (bias != nullptr) out.rowwise() += RowMap(bias, w.count);
  });
}

template <class T>
void backward_input(const LinearBackward& a) {
  const auto dy = rows_of<T>(a.dy);
  const auto w = rows_of<T>(a.weight);
  const auto dx = rows_of<T>(a.dx);
  for_each_item(dy.count, kRowsPerItem, [&](std::int64_t first, std::int64_t count) {
    auto out = block<T>(dx, first, count);
    if (a.accumulate_dx)
      out.noalias() += block<T>(dy, first, count) * block<T>(w, 0, w.count);
    else
      out.noalias() = block<T>(dy, first, count) * block<T>(w, 0, w.count);
  });
}

// Each item owns some rows of dweight and sums over all rows of dy.
template <class T>
void backward_weight(const LinearBackward& a) {
  const auto dy = rows_of<T>(a.dy);
  const auto x = rows_of<T>(a.x);
  const auto dw = rows_of<T>(a.dweight);
  for_each_item(dw.count, kWeightRowsPerItem, [&](std::int64_t first, std::int64_t count) {
    block<T>(dw, first, count).noalias() +=
        block<T>(dy, 0, dy.count).middleCols(first, count).transpose() * block<T>(x, 0, x.count);
  });
}

template <class T>
void backward_bias(const LinearBackward& a) {
  const auto dy = rows_of<T>(a.dy);
  T* const out = a.dbias.data<T>();
  for_each_item(dy.width, kWeightRowsPerItem, [&](std::int64_t first, std::int64_t count) {
    for (std::int64_t r = 0; r < dy.count; ++r)
      for (std::int64_t c = first; c < first + count; ++c) out[c] += dy[r][c];
  });
}

}  // namespace

void linear_forward(Context&, const LinearForward& a) {
  visit_float("linear_forward", a.x.dtype(), [&]<class T>() { forward<T>(a); });
}

void linear_backward(Context&, const LinearBackward& a) {
  visit_float("linear_backward", a.dy.dtype(), [&]<class T>() {
    if (a.dx) backward_input<T>(a);
    if (a.dweight) backward_weight<T>(a);
    if (a.dbias) backward_bias<T>(a);
  });
}

}  // namespace lrnn::cpu
