/// projected_conv1d_step by the ops that it stands for.
#pragma once

#include "lrnn/ops/causal_conv1d.hpp"
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/projected_conv1d.hpp"

namespace lrnn::detail {

void projected_conv1d_by_parts(Context& ctx, const ProjectedConv1dStep& args);

}  // namespace lrnn::detail
