/// projected_diagonal_step by the ops that it stands for.
#pragma once

#include "lrnn/ops/projected_diagonal.hpp"

namespace lrnn::detail {

void projected_diagonal_by_parts(Context& ctx, const ProjectedDiagonalStep& args);

}  // namespace lrnn::detail
