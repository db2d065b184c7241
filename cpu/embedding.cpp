#include "lrnn/ops/embedding.hpp"

#include <algorithm>

#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kColumnsPerItem = 32;

}  // namespace

void embedding_forward(Context&, const EmbeddingForward& a) {
  visit_float("embedding_forward", a.weight.dtype(), [&]<class T>() {
    const std::int32_t* const ids = a.ids.data<std::int32_t>();
    const auto weight = rows_of<T>(a.weight);
    const auto y = rows_of<T>(a.y);
#pragma omp parallel for
    for (std::int64_t i = 0; i < y.count; ++i) std::copy_n(weight[ids[i]], y.width, y[i]);
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
