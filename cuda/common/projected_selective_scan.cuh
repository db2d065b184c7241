/// projected_selective_scan_step on Hopper: when it applies.
#pragma once

#include "lrnn/ops/projected_selective_scan.hpp"

namespace lrnn::cuda::linear_sm90 {

bool takes(const ProjectedSelectiveScanStep& args);
void projected_selective_scan_step(Context& ctx, const ProjectedSelectiveScanStep& args);

}  // namespace lrnn::cuda::linear_sm90
