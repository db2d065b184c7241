/// s7_gated_step by the ops that it stands for.
#pragma once

#include "lrnn/ops/s7_gated_step.hpp"

namespace lrnn::detail {

void s7_gated_step_by_parts(Context& ctx, const S7GatedStep& args);

}  // namespace lrnn::detail
