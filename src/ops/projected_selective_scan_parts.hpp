/// projected_selective_scan_step by the ops that it stands for.
#pragma once

#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/projected_selective_scan.hpp"

namespace lrnn::detail {

void projected_selective_scan_by_parts(Context& ctx, const ProjectedSelectiveScanStep& args);

}  // namespace lrnn::detail
