/// Causal depthwise convolution over time, with an optional SiLU.
///
///   pre_t = bias + sum_{k=0..K-1} weight[k] x_{t-(K-1)+k},   y = act(pre)
///
/// weight[K-1] multiplies the current token; x before the start is state_in, or 0. The state is the
/// last K *inputs*, newest last, whatever the activation. x, y, dy, dx may be column slices.
/// With lengths: y is 0 at t >= lengths[b] and the state is that at lengths[b].
/// Backward recomputes pre. Matches: causal_conv1d as used by lrnnx's Mamba, RGLRU and attention.
#pragma once

#include "lrnn/ops/activation.hpp"

namespace lrnn {

struct CausalConv1dForward {
  TensorView x;                     ///< [B, L, C]
  TensorView weight;                ///< [C, K], dtype of x
  TensorView bias = {};             ///< [C], dtype of x
  Activation activation = Activation::Identity;  ///< Identity or Silu
  TensorView lengths = {};          ///< [B] int32
  TensorView state_in = {};         ///< [B, C, K], float32 (float64); absent: 0
  MutableTensorView y;              ///< [B, L, C]
  MutableTensorView state_out = {};  ///< [B, C, K], float32 (float64); may be state_in
};
struct CausalConv1dBackward {
  TensorView dy;                     ///< [B, L, C]
  TensorView x;                      ///< [B, L, C]
  TensorView weight;                 ///< [C, K]
  TensorView bias = {};              ///< [C]
  Activation activation = Activation::Identity;
  TensorView lengths = {};           ///< [B] int32
  TensorView state_in = {};          ///< [B, C, K]
  TensorView dstate_out = {};        ///< [B, C, K], float32 (float64); absent: 0
  MutableTensorView dx;              ///< [B, L, C], overwritten
  MutableTensorView dweight;         ///< [C, K], float32 (float64), accumulated into
  MutableTensorView dbias = {};      ///< [C], float32 (float64), accumulated into
  MutableTensorView dstate_in = {};  ///< [B, C, K], overwritten
};
struct CausalConv1dStep {
  TensorView x;             ///< [B, C]
  TensorView weight;        ///< [C, K]
  TensorView bias = {};     ///< [C]
  Activation activation = Activation::Identity;
  MutableTensorView y;      ///< [B, C]
  MutableTensorView state;  ///< [B, C, K], updated in place
};

/// @throws ShapeError, DTypeError, DeviceError
void causal_conv1d_forward(Context& ctx, const CausalConv1dForward& args);
void causal_conv1d_backward(Context& ctx, const CausalConv1dBackward& args);
void causal_conv1d_step(Context& ctx, const CausalConv1dStep& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void causal_conv1d_forward(Context& ctx, const CausalConv1dForward& args);
void causal_conv1d_backward(Context& ctx, const CausalConv1dBackward& args);
void causal_conv1d_step(Context& ctx, const CausalConv1dStep& args);
}  // namespace cpu
namespace cuda {
void causal_conv1d_forward(Context& ctx, const CausalConv1dForward& args);
void causal_conv1d_backward(Context& ctx, const CausalConv1dBackward& args);
void causal_conv1d_step(Context& ctx, const CausalConv1dStep& args);
}  // namespace cuda

}  // namespace lrnn
