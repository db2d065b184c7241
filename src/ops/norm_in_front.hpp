/// An operand `norm` of an op: the add_norm_forward that makes the op's x.
#pragma once

#include "lrnn/ops/add_norm.hpp"

namespace lrnn::detail {

/// Checks everything that add_norm_forward would. @throws ShapeError, DTypeError, DeviceError,
/// InvalidArgument
void check_add_norm_forward(const Context& ctx, const AddNormForward& norm);
/// The same for the norm in front of x, if there is one. @throws InvalidArgument unless x is its y
void check_norm_in_front(const char* op, const Context& ctx, const AddNormForward* norm,
                         TensorView x);
/// Runs it, if there is one.
inline void run_norm_in_front(Context& ctx, const AddNormForward* norm) {
  if (norm != nullptr) add_norm_forward(ctx, *norm);
}

}  // namespace lrnn::detail
