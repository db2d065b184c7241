#include "lrnn/ops/embedding.hpp"

#include <algorithm>

#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kColumnsPerItem = 32;

// read(row, n, y) writes n elements of a row.
template <class T, class W, class Read>
void forward(const EmbeddingForward& a, const Read& read) {
  const std::int32_t* const ids = a.ids.data<std::int32_t>();
  const auto weight = rows_of<W>(a.weight);
  const auto y = rows_of<T>(a.y);
#pragma omp parallel for if (y.count > 1)
  for (std::int64_t i = 0; i < y.count; ++i) read(weight[ids[i]], y.width, y[i]);
}

}  // namespace

void embedding_forward(Context&, const EmbeddingForward& a) {
  if (a.weight.dtype() != a.y.dtype())
    return forward<float, bfloat16>(a, [](const bfloat16* row, std::int64_t n, float* y) {
      std::transform(row, row + n, y, to_float);
    });
  visit_float("embedding_forward", a.weight.dtype(), [&]<class T>() {
    forward<T, T>(a, [](const T* row, std::int64_t n, T* y) { std::copy_n(row, n, y); });
  });
}

// Each item owns some columns and adds positions in order.
void embedding_backward(Context&, const EmbeddingBackward& a) {
  visit_float("embedding_backward", a.dy.dtype(), [&]<class T>() {
    const std::int32_t* const ids = a.ids.data<std::int32_t>();
    const auto dy = rows_of<T>(a.dy);
    const auto dweight = rows_of<T>(a.dweight);
    const std::int64_t items = (dy.width + kColumnsPerItem - 1) / kColumnsPerItem;
#pragma omp parallel for
    for (std::int64_t item = 0; item < items; ++item) {
      const std::int64_t first = item * kColumnsPerItem;
      const std::int64_t last = std::min(dy.width, first + kColumnsPerItem);
      for (std::int64_t i = 0; i < dy.count; ++i) {
        T* const row = dweight[ids[i]];
        for (std::int64_t c = first; c < last; ++c) row[c] += dy[i][c];
      }
    }
  });
}

}  // namespace lrnn::cpu
