/// projected_rglru_step by the ops that it stands for.
#pragma once

#include "lrnn/ops/projected_rglru.hpp"

namespace lrnn::detail {

void projected_rglru_by_parts(Context& ctx, const ProjectedRglruStep& args);

}  // namespace lrnn::detail
