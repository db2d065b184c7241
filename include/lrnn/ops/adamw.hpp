/// One step of Adam with decoupled weight decay, over whole parameter slabs.
///
/// adamw_begin, once per step, on scalars; grad_norm is the norm of grad_scale * grad:
///   grad_norm finite: applied += 1, t = applied
///   otherwise:        skipped += 1, and adamw_update leaves everything as it is
///   clip = max_grad_norm > 0 ? min(1, max_grad_norm / (grad_norm + 1e-6)) : 1
///
/// adamw_update, per element, with the options (lr_scale, weight_decay) of its group of 128:
///   g = clip grad_scale grad
///   m = beta1 m + (1 - beta1) g
///   v = beta2 v + (1 - beta2) g^2
///   w = w - lr lr_scale (weight_decay w + m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps))
///
/// The counters, the learning rate and the norm are read from device memory, so that a recorded
/// step stays valid. With bfloat16 values, w is the float32 master and its rounding is written to
/// the values in the same pass.
/// Paper: Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct AdamwBegin {
  TensorView grad_norm;  ///< [], float32 (float64)
  TensorView lr;         ///< [], dtype of grad_norm
  double grad_scale = 1.0;
  double max_grad_norm = 0.0;  ///< 0: no clipping
  double beta1;
  double beta2;
  MutableTensorView counters;  ///< [2] int64: steps applied, steps skipped; updated
  /// [5], dtype of grad_norm, for adamw_update: 1 or 0 (apply or skip), clip grad_scale, lr,
  /// 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  MutableTensorView factors;
};

/// Elements in a group that shares its options. Parameters start at multiples of it.
inline constexpr std::int64_t kAdamwGroup = 128;

struct AdamwUpdate {
  TensorView grad;           ///< [n], n a multiple of kAdamwGroup, float32 (float64)
  TensorView factors;        ///< [5], dtype of grad
  TensorView group_options;  ///< [n / kAdamwGroup] int32, a row of options per group
  TensorView options;        ///< [K, 2], dtype of grad: lr_scale, weight_decay
  double beta1;
  double beta2;
  double eps;
  MutableTensorView m;             ///< [n], dtype of grad
  MutableTensorView v;             ///< [n], dtype of grad
  MutableTensorView masters = {};  ///< [n], float32; required where values are bfloat16
  MutableTensorView values;        ///< [n], dtype of grad, or bfloat16 (CUDA) beside masters
};

/// @throws ShapeError, DTypeError, DeviceError
void adamw_begin(Context& ctx, const AdamwBegin& args);
void adamw_update(Context& ctx, const AdamwUpdate& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void adamw_begin(Context& ctx, const AdamwBegin& args);
void adamw_update(Context& ctx, const AdamwUpdate& args);
}  // namespace cpu
namespace cuda {
void adamw_begin(Context& ctx, const AdamwBegin& args);
void adamw_update(Context& ctx, const AdamwUpdate& args);
}  // namespace cuda

}  // namespace lrnn
