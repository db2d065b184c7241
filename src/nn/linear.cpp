#include "lrnn/nn/linear.hpp"

#include <cmath>

#include "lrnn/ops/linear.hpp"

namespace lrnn {

Linear::Linear(const ParameterScope& scope, std::int64_t in_features, std::int64_t out_features,
               const LinearOptions& options) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(in_features));
  weight_ = &scope.add("weight", {out_features, in_features},
                       options.weight_init ? options.weight_init : init::uniform(bound),
                       {.weight_decay = options.weight_decay, .matrix = true});
  if (options.bias)
    bias_ = &scope.add("bias", {out_features},
                       options.bias_init ? options.bias_init : init::constant(0.0),
                       {.weight_decay = false});
}

void Linear::forward(Context& ctx, TensorView x, MutableTensorView y) const {
  linear_forward(
      ctx, {.x = x, .weight = weight_->value, .bias = bias_value(), .y = y, .stable_weight = true});
}

void Linear::backward(Context& ctx, TensorView dy, TensorView x, MutableTensorView dx,
                      bool accumulate_dx) const {
  linear_backward(ctx, {.dy = dy,
                        .x = x,
                        .weight = weight_->value,
                        .dx = dx,
                        .dweight = weight_->grad,
                        .dbias = bias_ != nullptr ? bias_->grad : MutableTensorView(),
                        .accumulate_dx = accumulate_dx});
}

}  // namespace lrnn
