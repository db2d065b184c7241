#include "lrnn/ops/argmax.hpp"

#include <limits>

#include "common/eigen.hpp"
#include "ops/dispatch.hpp"

namespace lrnn::cpu {

void argmax_forward(Context&, const ArgmaxForward& a) {
  visit_float("argmax_forward", a.logits.dtype(), [&]<class T>() {
    const T* const logits = a.logits.data<T>();
    const std::int64_t vocab_size = a.logits.dim(-1);
    const std::int64_t rows = a.logits.numel() / vocab_size;
    const std::int64_t stride = detail::row_stride(a.logits);
    std::int32_t* const ids = a.ids.data<std::int32_t>();
#pragma omp parallel for
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* const row = logits + r * stride;
      std::int64_t best = 0;
      T greatest = -std::numeric_limits<T>::infinity();
      for (std::int64_t i = 0; i < vocab_size; ++i) {
        if (row[i] > greatest) {  // false for NaN
          greatest = row[i];
          best = i;
        }
      }
      ids[r] = static_cast<std::int32_t>(best);
    }
  });
}

}  // namespace lrnn::cpu
