/// What the kernels of projected_activation share.
#pragma once

#include "lrnn/ops/projected_activation.hpp"

namespace lrnn::cuda::linear_sm90 {

/// Hopper's kernel for rows or weights that the product of few rows leaves to it.
bool takes(const ProjectedActivation& args);
void projected_activation(Context& ctx, const ProjectedActivation& args);

}  // namespace lrnn::cuda::linear_sm90
