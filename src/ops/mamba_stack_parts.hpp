/// mamba_stack_step by the ops that it stands for.
#pragma once

#include "lrnn/ops/mamba_stack.hpp"

namespace lrnn::detail {

void mamba_stack_by_parts(Context& ctx, const MambaStackStep& args);

}  // namespace lrnn::detail
