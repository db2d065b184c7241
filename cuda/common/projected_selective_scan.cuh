/// projected_selective_scan_step on Hopper: when it applies.
#pragma once

#include "lrnn/ops/projected_selective_scan.hpp"

namespace lrnn::cuda::linear_sm90 {

bool takes(const ProjectedSelectiveScanStep& args);
void projected_selective_scan_step(Context& ctx, const ProjectedSelectiveScanStep& args);

/// The same of more than 64 sequences where all kernels up to the last that wrote the states are
/// known to have ended when the one before this starts: the states are read as soon as there is
/// room.
void projected_selective_scan_step_early(Context& ctx, const ProjectedSelectiveScanStep& args);

/// The projection of that scan, x = u projection^T [B, R + 2 N], of more than 64 sequences. If not
/// `early`, the kernel behind it starts when those before it have ended, as linear_sm90::forward()
/// tells.
void project_inputs(Context& ctx, const ProjectedSelectiveScanStep& args, MutableTensorView x,
                    bool early);

}  // namespace lrnn::cuda::linear_sm90
