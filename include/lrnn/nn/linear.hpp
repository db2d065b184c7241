/// A dense layer with its parameters: y = x W^T (+ b).
#pragma once

#include "lrnn/nn/parameter.hpp"

namespace lrnn {

struct LinearOptions {
  bool bias = false;
  Initializer weight_init = {};  ///< default U(+-1/sqrt(in_features))
  Initializer bias_init = {};    ///< default 0, as the model's initialisation pass leaves it
  bool weight_decay = true;
};

/// Parameters "weight" [out_features, in_features] and, with bias, "bias" [out_features].
class Linear {
 public:
  Linear(const ParameterScope& scope, std::int64_t in_features, std::int64_t out_features,
         const LinearOptions& options = {});

  /// x [..., in], y [..., out]; rows may be column slices of wider tensors.
  void forward(Context& ctx, TensorView x, MutableTensorView y) const;
  /// Accumulates the gradients of the parameters; writes dx unless absent.
  void backward(Context& ctx, TensorView dy, TensorView x, MutableTensorView dx,
                bool accumulate_dx = false) const;

  [[nodiscard]] std::int64_t in_features() const { return weight_->shape[1]; }
  [[nodiscard]] std::int64_t out_features() const { return weight_->shape[0]; }
  [[nodiscard]] Parameter& weight() const noexcept { return *weight_; }
  /// Null without bias.
  [[nodiscard]] Parameter* bias() const noexcept { return bias_; }
  /// Values for ops that project by themselves; no view without bias.
  [[nodiscard]] TensorView weight_value() const { return weight_->value; }
  [[nodiscard]] TensorView bias_value() const {
    return bias_ != nullptr ? TensorView(bias_->value) : TensorView();
  }

 private:
  Parameter* weight_;
  Parameter* bias_ = nullptr;
};

}  // namespace lrnn
