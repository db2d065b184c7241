/// The activations and their derivatives, one element at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "lrnn/ops/activation.hpp"

namespace lrnn::cpu {

template <class T>
T sigmoid(T v) {
  return T(1) / (T(1) + std::exp(-v));
}

template <Activation kind, class T>
T activate(T v) {
  if constexpr (kind == Activation::Silu) return v * sigmoid(v);
  if constexpr (kind == Activation::Gelu)
    return T(0.5) * v * (T(1) + std::erf(v * T(std::numbers::sqrt2 / 2)));
  if constexpr (kind == Activation::Sigmoid) return sigmoid(v);
  if constexpr (kind == Activation::Softplus)
    return std::max(v, T(0)) + std::log1p(std::exp(-std::abs(v)));
  return v;
}

template <Activation kind, class T>
T activation_derivative(T v) {
  if constexpr (kind == Activation::Silu) {
    const T s = sigmoid(v);
    return s * (T(1) + v * (T(1) - s));
  }
  if constexpr (kind == Activation::Gelu) {
    const T Phi = T(0.5) * (T(1) + std::erf(v * T(std::numbers::sqrt2 / 2)));
    const T phi = std::exp(T(-0.5) * v * v) * T(std::numbers::inv_sqrtpi * std::numbers::sqrt2 / 2);
    return Phi + v * phi;
  }
  if constexpr (kind == Activation::Sigmoid) {
    const T s = sigmoid(v);
    return s * (T(1) - s);
  }
  if constexpr (kind == Activation::Softplus) return sigmoid(v);
  return T(1);
}

/// Calls `f.operator()<kind>()`.
template <class F>
void visit_activation(Activation kind, F&& f) {
  switch (kind) {
    case Activation::Identity:
      return f.template operator()<Activation::Identity>();
    case Activation::Silu:
      return f.template operator()<Activation::Silu>();
    case Activation::Gelu:
      return f.template operator()<Activation::Gelu>();
    case Activation::Sigmoid:
      return f.template operator()<Activation::Sigmoid>();
    case Activation::Softplus:
      return f.template operator()<Activation::Softplus>();
  }
}

}  // namespace lrnn::cpu
