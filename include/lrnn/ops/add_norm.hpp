/// Residual addition and normalisation of the sum, over the last dimension.
///
///   r    = x (+ residual)
///   RMS:   rstd = 1 / sqrt(mean(r^2) + eps),           y = r rstd weight
///   Layer: mu = mean(r), rstd = 1 / sqrt(mean((r - mu)^2) + eps),  y = (r - mu) rstd weight + bias
///
/// Statistics come from the unrounded float32 sum. With g = weight * dy and n = (r - mu) rstd:
///   dr = rstd (g - n mean(n g) - mean(g) [layer only]) + dresidual_out
/// which is the gradient of x and of residual alike.
///
/// Ops that begin with a product of x, one token of each sequence, may be handed the AddNormForward
/// that makes it (`norm`, whose y is their x), to save a launch. Their results may then not overlap
/// its operands, and whether they write x is theirs. CUDA adds and norms within the product where
/// there are up to four rows of bfloat16, an RMS norm and up to 2048 columns (768 where two
/// products meet); r weight is then rounded before its factor rstd is applied.
/// Papers: arXiv:1910.07467 (RMSNorm), arXiv:1607.06450 (LayerNorm).
/// Matches: the fused path of lrnnx/ops/triton/layer_norm.py.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

enum class NormKind { Rms, Layer };

struct AddNormForward {
  NormKind kind = NormKind::Rms;
  TensorView x;                         ///< [..., H]
  TensorView residual = {};             ///< [..., H], float32 or dtype of x; absent: 0
  TensorView weight;                    ///< [H], float32 (float64)
  TensorView bias = {};                 ///< [H], float32 (float64); Layer only
  double eps = 1e-5;                    ///< added to the mean square; dimensionless
  MutableTensorView y;                  ///< [..., H], dtype of x
  MutableTensorView residual_out = {};  ///< [..., H], float32 or dtype of x; may be `residual`
  MutableTensorView rstd = {};          ///< [...], float32 (float64); saved for backward
  MutableTensorView mean = {};          ///< [...], float32 (float64); Layer, saved for backward
};

struct AddNormBackward {
  NormKind kind = NormKind::Rms;
  TensorView dy;                   ///< [..., H]
  TensorView r;                    ///< [..., H], the sum as stored in residual_out (or x)
  TensorView weight;               ///< [H], float32 (float64)
  TensorView rstd;                 ///< [...]
  TensorView mean = {};            ///< [...]; Layer
  TensorView dresidual_out = {};   ///< [..., H], dtype of r; absent: 0
  MutableTensorView dx;            ///< [..., H], dtype of dy, overwritten
  MutableTensorView dresidual = {};  ///< [..., H], dtype of r, overwritten; may be dresidual_out
  MutableTensorView dweight;       ///< [H], float32 (float64), accumulated into
  MutableTensorView dbias = {};    ///< [H], float32 (float64), accumulated into; Layer
};

/// @throws ShapeError, DTypeError, DeviceError
void add_norm_forward(Context& ctx, const AddNormForward& args);
void add_norm_backward(Context& ctx, const AddNormBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void add_norm_forward(Context& ctx, const AddNormForward& args);
void add_norm_backward(Context& ctx, const AddNormBackward& args);
}  // namespace cpu
namespace cuda {
void add_norm_forward(Context& ctx, const AddNormForward& args);
void add_norm_backward(Context& ctx, const AddNormBackward& args);
}  // namespace cuda

}  // namespace lrnn
