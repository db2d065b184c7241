#include "lrnn/ops/gated_activation.hpp"

#include "common/activation.hpp"
#include "common/rows.hpp"

namespace lrnn::cpu {

void gated_activation_forward(Context&, const GatedActivationForward& a) {
  visit_float("gated_activation_forward", a.value.dtype(), [&]<class T>() {
    const auto value = rows_of<T>(a.value);
    const auto gate = rows_of<T>(a.gate);
    const auto y = rows_of<T>(a.y);
    visit_activation(a.kind, [&]<Activation kind>() {
#pragma omp parallel for
      for (std::int64_t r = 0; r < y.count; ++r)
        for (std::int64_t c = 0; c < y.width; ++c)
          y[r][c] = value[r][c] * activate<kind>(gate[r][c]);
    });
  });
}

void gated_activation_backward(Context&, const GatedActivationBackward& a) {
  visit_float("gated_activation_backward", a.dy.dtype(), [&]<class T>() {
    const auto dy = rows_of<T>(a.dy);
    const auto value = rows_of<T>(a.value);
    const auto gate = rows_of<T>(a.gate);
    const auto dvalue = rows_of<T>(a.dvalue);
    const auto dgate = rows_of<T>(a.dgate);
    visit_activation(a.kind, [&]<Activation kind>() {
#pragma omp parallel for
      for (std::int64_t r = 0; r < dy.count; ++r)
        for (std::int64_t c = 0; c < dy.width; ++c) {
          const T g = gate[r][c];
          const T d = dy[r][c];
          const T v = value[r][c];
          dvalue[r][c] = d * activate<kind>(g);
          dgate[r][c] = d * v * activation_derivative<kind>(g);
        }
    });
  });
}

}  // namespace lrnn::cpu
