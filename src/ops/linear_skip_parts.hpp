/// linear_skip by the ops that it stands for: two passes over y or dx.
#pragma once

#include "lrnn/ops/linear_skip.hpp"

namespace lrnn::detail {

void linear_skip_forward_by_parts(Context& ctx, const LinearSkipForward& args);
void linear_skip_backward_by_parts(Context& ctx, const LinearSkipBackward& args);

}  // namespace lrnn::detail
