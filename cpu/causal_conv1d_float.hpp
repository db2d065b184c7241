/// The passes of causal_conv1d in float, compiled for several instruction sets: see common/isa.hpp.
#pragma once

#include <cstdint>

namespace lrnn::cpu {

/// Operands of a pass; see include/lrnn/ops/causal_conv1d.hpp. Optional ones may be null.
struct FloatConv {
  const float *x, *weight, *bias, *state_in;
  const std::int32_t* lengths;
  std::int64_t x_stride;  // of tokens
  std::int64_t batch, seqlen, channels, width;
  bool silu;
};
struct FloatConvForward {
  FloatConv in;
  float* y;
  std::int64_t y_stride;
};
struct FloatConvBackward {
  FloatConv in;
  const float *dy, *dstate_out;
  float *dx, *dstate_in;
  std::int64_t dy_stride, dx_stride;
  float* sums;  ///< [B, C, width + 1], overwritten: the gradients of the weights and the bias
};

void run_float_conv(const FloatConvForward& p);
void run_float_conv_backward(const FloatConvBackward& p);

}  // namespace lrnn::cpu
