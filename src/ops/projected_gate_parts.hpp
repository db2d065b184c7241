/// projected_gate by the ops that it stands for.
#pragma once

#include "lrnn/ops/projected_gate.hpp"

namespace lrnn::detail {

void projected_gate_by_parts(Context& ctx, const ProjectedGate& args);

}  // namespace lrnn::detail
