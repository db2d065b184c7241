/// Scalar formulas of `lane_weight`, in double, the same on the host and on a device.
#pragma once

#include "lrnn/ops/lane_weight.hpp"

#include "ops/lane_math.hpp"

namespace lrnn::detail {

/// Factors and gradients of one weight as a kernel sees them. Null: absent.
template <class T>
struct LaneWeightSource {
  double scale;
  bool real;
  std::int64_t channels;
  std::int64_t lanes;
  std::int64_t substates;
  std::int64_t copies;  // S
  const T* gamma;
  const T* B;
  const T* C;
  const T* left;
  const T* right;

  explicit LaneWeightSource(const LaneWeightFactors& f)
      : scale(f.scale),
        real(f.C.rank() == 2),
        channels(real ? 1 : f.C.dim(0)),
        lanes(f.C.dim(real ? 0 : 1)),
        substates(f.C.dim(real ? 1 : 2)),
        copies(f.B ? f.B.dim(0) : 1),
        gamma(f.gamma ? f.gamma.data<T>() : nullptr),
        B(f.B ? f.B.data<T>() : nullptr),
        C(f.C.data<T>()),
        left(f.left ? f.left.data<T>() : nullptr),
        right(f.right ? f.right.data<T>() : nullptr) {}

  /// Elements of a plane; element i belongs to lane i / M and sub-state i mod M.
  LRNN_HOST_DEVICE std::int64_t plane() const { return lanes * substates; }
  /// Element of B that weight element i uses, in pairs.
  LRNN_HOST_DEVICE std::int64_t shared(std::int64_t i) const {
    return i / substates % copies * substates + i % substates;
  }
  LRNN_HOST_DEVICE double left_of(std::int64_t i) const {
    return left == nullptr ? 1.0 : static_cast<double>(left[i / substates]);
  }
  LRNN_HOST_DEVICE double right_of(std::int64_t i) const {
    return right == nullptr ? 1.0 : static_cast<double>(right[i / substates]);
  }
  LRNN_HOST_DEVICE Complex gamma_of(std::int64_t i) const {
    if (gamma == nullptr) return {1.0, 0.0};
    return {static_cast<double>(gamma[i]), real ? 0.0 : static_cast<double>(gamma[plane() + i])};
  }
  LRNN_HOST_DEVICE Complex B_of(std::int64_t i) const {
    if (B == nullptr) return {1.0, 0.0};
    const T* const b = B + 2 * shared(i);
    return {static_cast<double>(b[0]), static_cast<double>(b[1])};
  }
  LRNN_HOST_DEVICE Complex C_of(std::int64_t c, std::int64_t i) const {
    if (real) return {static_cast<double>(C[i]), 0.0};
    const T* const p = C + 2 * (c * plane() + i);
    return {static_cast<double>(p[0]), static_cast<double>(p[1])};
  }
  /// Where the real part of weight (c, i) lies; the imaginary one follows a plane later.
  LRNN_HOST_DEVICE std::int64_t weight_at(std::int64_t c, std::int64_t i) const {
    return (real ? c : 2 * c) * plane() + i;
  }
};

/// Gradients of the factors of weight element i, summed over the channels.
struct LaneWeightGradient {
  Complex gamma;
  Complex B;
  double left;
  double right;
};

/// Adds the gradient of C to dC and returns the others.
template <class T>
LRNN_HOST_DEVICE LaneWeightGradient lane_weight_gradient(const LaneWeightSource<T>& f,
                                                         std::int64_t i, const T* dW, T* dC) {
  const double left = f.left_of(i);
  const double right = f.right_of(i);
  const Complex gamma = f.gamma_of(i);
  const Complex B = f.B_of(i);
  const double sides = f.scale * left * right;
  const Complex rest = sides * (gamma * B);
  Complex sum{0.0, 0.0};
  for (std::int64_t c = 0; c < f.channels; ++c) {
    const std::int64_t at = f.weight_at(c, i);
    const Complex d{static_cast<double>(dW[at]),
                    f.real ? 0.0 : static_cast<double>(dW[f.plane() + at])};
    sum = sum + d * conj(f.C_of(c, i));
    const Complex g = d * conj(rest);
    if (f.real) {
      dC[i] += static_cast<T>(g.re);
    } else {
      T* const p = dC + 2 * (c * f.plane() + i);
      p[0] += static_cast<T>(g.re);
      p[1] += static_cast<T>(g.im);
    }
  }
  const Complex inner = gamma * B;
  return {sides * (sum * conj(B)), sides * (sum * conj(gamma)),
          f.scale * right * (sum * conj(inner)).re, f.scale * left * (sum * conj(inner)).re};
}

}  // namespace lrnn::detail
