/// mamba_stack_step of 65 to 128 sequences on Hopper.
#pragma once

#include "lrnn/ops/mamba_stack.hpp"

namespace lrnn::cuda::linear_sm90 {

/// Whether it has done the step: if not, it is not for these sequences or layers.
bool mamba_stack_step(Context& ctx, const MambaStackStep& args);

}  // namespace lrnn::cuda::linear_sm90
