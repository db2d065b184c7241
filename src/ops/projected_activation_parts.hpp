/// projected_activation by the ops that it stands for.
#pragma once

#include "lrnn/ops/projected_activation.hpp"

namespace lrnn::detail {

void projected_activation_by_parts(Context& ctx, const ProjectedActivation& args);

}  // namespace lrnn::detail
