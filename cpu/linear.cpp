#include "lrnn/ops/linear.hpp"

#include <algorithm>

#include "common/rows.hpp"
#include "linear_few_rows.hpp"

namespace lrnn::cpu {
namespace {

// Work items of fixed size, so that sums do not depend on the number of threads.
constexpr std::int64_t kRowsPerItem = 128;
constexpr std::int64_t kWeightRowsPerItem = 64;
constexpr std::int64_t kWidenedRowsPerItem = 128;
constexpr int kFewRows = 8;  // up to here, reading the weight is what takes the time

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

// y, or what is added to it, from products with all rows of x.
template <class T>
struct Output {
  Rows<T> y;
  const T* bias;
  bool accumulate;

  explicit Output(const LinearForward& a)
      : y(rows_of<T>(a.y)), bias(a.bias ? a.bias.data<T>() : nullptr), accumulate(a.accumulate) {}

  // Column o of y.
  void write(std::int64_t o, const T* products) const {
    for (std::int64_t r = 0; r < y.count; ++r) {
      T& out = y[r][o];
      out = products[r] + (accumulate ? out : bias != nullptr ? bias[o] : T(0));
    }
  }
  // Some rows of y by some columns.
  template <class Part, class Products>
  void write_block(Part&& out, std::int64_t first_column, const Products& products) const {
    if (accumulate)
      out.noalias() += products;
    else
      out.noalias() = products;
    if (bias != nullptr)
      out.rowwise() +=
          Eigen::Map<const Eigen::Matrix<T, 1, Eigen::Dynamic>>(bias + first_column, out.cols());
  }
};

template <class T>
void many_rows(const LinearForward& a) {
  const auto x = rows_of<T>(a.x);
  const auto w = rows_of<T>(a.weight);
  const Output<T> output(a);
  for_each_item(x.count, kRowsPerItem, [&](std::int64_t first, std::int64_t count) {
    output.write_block(block<T>(output.y, first, count), 0,
                       block<T>(x, first, count) * block<T>(w, 0, w.count).transpose());
  });
}

// Each item widens some rows of the weight and multiplies all of x with them.
void many_rows_bfloat16(const LinearForward& a) {
  const auto x = rows_of<float>(a.x);
  const auto w = rows_of<bfloat16>(a.weight);
  const Output<float> output(a);
  for_each_item(w.count, kWidenedRowsPerItem, [&](std::int64_t first, std::int64_t count) {
    Dense<float> wide(count, w.width);
    for (std::int64_t o = 0; o < count; ++o)
      std::transform(w[first + o], w[first + o] + w.width, wide.row(o).data(), to_float);
    output.write_block(block<float>(output.y, 0, x.count).middleCols(first, count), first,
                       block<float>(x, 0, x.count) * wide.transpose());
  });
}

template <class T, class W>
void few_rows(const LinearForward& a) {
  const Output<T> output(a);
  for_each_dot<kFewRows>(rows_of<T>(a.x), rows_of<W>(a.weight),
                         [&](std::int64_t o, const T* products) { output.write(o, products); });
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
  const bool few = detail::row_count(a.x) <= kFewRows;
  if (a.weight.dtype() != a.x.dtype())  // bfloat16 beside float32
    return few ? few_rows<float, bfloat16>(a) : many_rows_bfloat16(a);
  visit_float("linear_forward", a.x.dtype(),
              [&]<class T>() { few ? few_rows<T, T>(a) : many_rows<T>(a); });
}

void linear_backward(Context&, const LinearBackward& a) {
  visit_float("linear_backward", a.dy.dtype(), [&]<class T>() {
    if (a.dx) backward_input<T>(a);
    if (a.dweight) backward_weight<T>(a);
    if (a.dbias) backward_bias<T>(a);
  });
}

}  // namespace lrnn::cpu
