/// The scalar part of an AdamW step, shared by both backends.
#pragma once

#include <cmath>
#include <cstdint>

#include "lrnn/core/random.hpp"

namespace lrnn::detail {

struct AdamwScalars {
  double grad_scale;
  double max_grad_norm;
  double beta1;
  double beta2;
};

/// Positions in `factors`.
enum AdamwFactor : int {
  kAdamwApply,
  kAdamwGradFactor,
  kAdamwLr,
  kAdamwInverseBias1,
  kAdamwInverseRootBias2,
};

/// 1 - beta^t without cancellation.
LRNN_HOST_DEVICE inline double bias_correction(double beta, std::int64_t t) {
  return beta > 0.0 ? -expm1(static_cast<double>(t) * log(beta)) : 1.0;
}

/// Counts the step and writes the factors of the update.
template <class T>
LRNN_HOST_DEVICE void adamw_begin_scalar(const AdamwScalars& s, T grad_norm, T lr,
                                         std::int64_t* counters, T* factors) {
  const auto norm = static_cast<double>(grad_norm);
  const bool apply = norm - norm == 0.0;  // false for NaN and infinity
  factors[kAdamwApply] = apply ? T(1) : T(0);
  ++counters[apply ? 0 : 1];
  const double clip = s.max_grad_norm > 0.0 ? fmin(1.0, s.max_grad_norm / (norm + 1e-6)) : 1.0;
  factors[kAdamwGradFactor] = static_cast<T>(clip * s.grad_scale);
  factors[kAdamwLr] = lr;
  factors[kAdamwInverseBias1] = static_cast<T>(1.0 / bias_correction(s.beta1, counters[0]));
  factors[kAdamwInverseRootBias2] =
      static_cast<T>(1.0 / sqrt(bias_correction(s.beta2, counters[0])));
}

}  // namespace lrnn::detail
