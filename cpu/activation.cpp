#include "lrnn/ops/activation.hpp"

#include "common/activation.hpp"
#include "common/rows.hpp"

namespace lrnn::cpu {

void activation_forward(Context&, const ActivationForward& a) {
  visit_float("activation_forward", a.x.dtype(), [&]<class T>() {
    const auto x = rows_of<T>(a.x);
    const auto y = rows_of<T>(a.y);
    visit_activation(a.kind, [&]<Activation kind>() {
#pragma omp parallel for
      for (std::int64_t r = 0; r < x.count; ++r)
        for (std::int64_t c = 0; c < x.width; ++c) {
          const T once = activate<kind>(x[r][c]);
          y[r][c] = a.twice ? activate<kind>(once) : once;
        }
    });
  });
}

void activation_backward(Context&, const ActivationBackward& a) {
  visit_float("activation_backward", a.dy.dtype(), [&]<class T>() {
    const auto dy = rows_of<T>(a.dy);
    const auto x = rows_of<T>(a.x);
    const auto dx = rows_of<T>(a.dx);
    visit_activation(a.kind, [&]<Activation kind>() {
#pragma omp parallel for
      for (std::int64_t r = 0; r < x.count; ++r)
        for (std::int64_t c = 0; c < x.width; ++c) {
          T d = dy[r][c];
          if (a.twice) d *= activation_derivative<kind>(activate<kind>(x[r][c]));
          dx[r][c] = d * activation_derivative<kind>(x[r][c]);
        }
    });
  });
}

}  // namespace lrnn::cpu
