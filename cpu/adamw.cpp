#include "lrnn/ops/adamw.hpp"

#include <cmath>

#include "common/eigen.hpp"
#include "ops/adamw_math.hpp"

namespace lrnn::cpu {

void adamw_begin(Context&, const AdamwBegin& a) {
  const detail::AdamwScalars scalars{a.grad_scale, a.max_grad_norm, a.beta1, a.beta2};
  visit_float("adamw_begin", a.grad_norm.dtype(), [&]<class T>() {
    detail::adamw_begin_scalar(scalars, *a.grad_norm.data<T>(), *a.lr.data<T>(),
                               a.counters.data<std::int64_t>(), a.factors.data<T>());
  });
}

void adamw_update(Context&, const AdamwUpdate& a) {
  visit_float("adamw_update", a.grad.dtype(), [&]<class T>() {
    const T* const factors = a.factors.data<T>();
    if (factors[detail::kAdamwApply] == T(0)) return;
    const T grad_factor = factors[detail::kAdamwGradFactor];
    const T bias1 = factors[detail::kAdamwInverseBias1];
    const T bias2 = factors[detail::kAdamwInverseRootBias2];
    const auto beta1 = static_cast<T>(a.beta1);
    const auto beta2 = static_cast<T>(a.beta2);
    const auto rest1 = static_cast<T>(1.0 - a.beta1);
    const auto rest2 = static_cast<T>(1.0 - a.beta2);
    const auto eps = static_cast<T>(a.eps);
    const T* const grad = a.grad.data<T>();
    const T* const options = a.options.data<T>();
    const std::int32_t* const group_options = a.group_options.data<std::int32_t>();
    T* const m = a.m.data<T>();
    T* const v = a.v.data<T>();
    T* const w = a.values.data<T>();
    const std::int64_t groups = a.group_options.dim(0);
#pragma omp parallel for
    for (std::int64_t group = 0; group < groups; ++group) {
      const T* const option = options + 2 * group_options[group];
      const T lr = factors[detail::kAdamwLr] * option[0];
      const T step = lr * bias1;
      const T decay = lr * option[1];
      for (std::int64_t i = group * kAdamwGroup; i < (group + 1) * kAdamwGroup; ++i) {
        const T g = grad_factor * grad[i];
        m[i] = beta1 * m[i] + rest1 * g;
        v[i] = beta2 * v[i] + rest2 * g * g;
        w[i] -= decay * w[i] + step * m[i] / (std::sqrt(v[i]) * bias2 + eps);
      }
    }
  });
}

}  // namespace lrnn::cpu
