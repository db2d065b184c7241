/// The activations and their derivatives on the device.
#pragma once

#include "lrnn/ops/activation.hpp"

namespace lrnn::cuda {

__device__ __forceinline__ float sigmoid(float v) {
  return 1.0F / (1.0F + expf(-v));
}

template <Activation kind>
__device__ __forceinline__ float activate(float v) {
  if constexpr (kind == Activation::Silu) return v * sigmoid(v);
  if constexpr (kind == Activation::Gelu) return 0.5F * v * (1.0F + erff(v * 0.70710678F));
  if constexpr (kind == Activation::Sigmoid) return sigmoid(v);
  if constexpr (kind == Activation::Softplus) return fmaxf(v, 0.0F) + log1pf(expf(-fabsf(v)));
  return v;
}

template <Activation kind>
__device__ __forceinline__ float activation_derivative(float v) {
  if constexpr (kind == Activation::Silu) {
    const float s = sigmoid(v);
    return s * (1.0F + v * (1.0F - s));
  }
  if constexpr (kind == Activation::Gelu) {
    const float Phi = 0.5F * (1.0F + erff(v * 0.70710678F));
    return fmaf(v, 0.39894228F * expf(-0.5F * v * v), Phi);
  }
  if constexpr (kind == Activation::Sigmoid) {
    const float s = sigmoid(v);
    return s * (1.0F - s);
  }
  if constexpr (kind == Activation::Softplus) return sigmoid(v);
  return 1.0F;
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

}  // namespace lrnn::cuda
