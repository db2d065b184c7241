/// Copies, conversions, sums and masks. No gradients of their own: each is its own adjoint.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

/// dst = src, converted to the dtype of dst. Rows may be column slices of wider tensors.
struct Cast {
  TensorView src;         ///< [..., C] any of float32, float64, bfloat16
  MutableTensorView dst;  ///< same shape
};
/// dst = src^T, converted to the dtype of dst.
struct Transpose {
  TensorView src;         ///< [R, C] any of float32, float64, bfloat16
  MutableTensorView dst;  ///< [C, R]
};
/// dst += src, computed in float32 (float64). dst may have another float dtype than src.
struct AddTo {
  TensorView src;         ///< [..., C]
  MutableTensorView dst;  ///< same shape
};
/// dst = value.
struct Fill {
  MutableTensorView dst;  ///< any float or integer dtype
  double value;
};
/// x[b, t] = 0 for t >= lengths[b].
struct MaskPadding {
  MutableTensorView x;  ///< [B, L, ...]
  TensorView lengths;   ///< [B] int32
};
/// dst = src * scale per last-dimension column: dst[..., c] = src[..., c] * scale[c].
struct ScaleColumns {
  TensorView src;         ///< [..., C]
  TensorView scale;       ///< [C], float32 (float64)
  MutableTensorView dst;  ///< [..., C]; may be src
};
/// Of y = x * scale per column: dx[..., c] = dy[..., c] * scale[c] and
/// dscale[c] += sum over rows of dy[..., c] * x[..., c], in one pass. Sums as in SumColumns.
struct ScaleColumnsBackward {
  TensorView dy;             ///< [..., C]
  TensorView x;              ///< [..., C]
  TensorView scale;          ///< [C], float32 (float64)
  MutableTensorView dx;      ///< [..., C], overwritten; may be dy
  MutableTensorView dscale;  ///< [C], float32 (float64), accumulated into
};
/// Column sums of products: out[c] += sum over rows of a[..., c] * b[..., c] (b absent: of a).
/// Fixed-order, float32 (float64) sums.
struct SumColumns {
  TensorView a;           ///< [..., C]
  TensorView b = {};      ///< [..., C], dtype of a
  MutableTensorView out;  ///< [C], float32 (float64), accumulated into
};

/// @throws ShapeError, DTypeError, DeviceError
void cast(Context& ctx, const Cast& args);
void transpose(Context& ctx, const Transpose& args);
void add_to(Context& ctx, const AddTo& args);
void fill(Context& ctx, const Fill& args);
void mask_padding(Context& ctx, const MaskPadding& args);
void scale_columns(Context& ctx, const ScaleColumns& args);
void scale_columns_backward(Context& ctx, const ScaleColumnsBackward& args);
void sum_columns(Context& ctx, const SumColumns& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void cast(Context& ctx, const Cast& args);
void transpose(Context& ctx, const Transpose& args);
void add_to(Context& ctx, const AddTo& args);
void fill(Context& ctx, const Fill& args);
void mask_padding(Context& ctx, const MaskPadding& args);
void scale_columns(Context& ctx, const ScaleColumns& args);
void scale_columns_backward(Context& ctx, const ScaleColumnsBackward& args);
void sum_columns(Context& ctx, const SumColumns& args);
}  // namespace cpu
namespace cuda {
void cast(Context& ctx, const Cast& args);
void transpose(Context& ctx, const Transpose& args);
void add_to(Context& ctx, const AddTo& args);
void fill(Context& ctx, const Fill& args);
void mask_padding(Context& ctx, const MaskPadding& args);
void scale_columns(Context& ctx, const ScaleColumns& args);
void scale_columns_backward(Context& ctx, const ScaleColumnsBackward& args);
void sum_columns(Context& ctx, const SumColumns& args);
}  // namespace cuda

}  // namespace lrnn
