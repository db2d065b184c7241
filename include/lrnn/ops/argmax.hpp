/// Index of the greatest element of every row; the lowest index where several are equal.
///
/// NaN counts as minus infinity: a row without any number above minus infinity gives 0.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct ArgmaxForward {
  TensorView logits;      ///< [..., V], V < 2^31; rows may be column slices of a wider tensor
  MutableTensorView ids;  ///< [...], int32
};

/// @throws ShapeError, DTypeError, DeviceError
void argmax_forward(Context& ctx, const ArgmaxForward& args);
/// logits [..., V] -> ids [...], int32.
[[nodiscard]] Tensor argmax(Context& ctx, TensorView logits);

// Backends. Unchecked: call the functions above.
namespace cpu {
void argmax_forward(Context& ctx, const ArgmaxForward& args);
}
namespace cuda {
void argmax_forward(Context& ctx, const ArgmaxForward& args);
}

}  // namespace lrnn
