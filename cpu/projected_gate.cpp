#include "ops/projected_gate_parts.hpp"

namespace lrnn::cpu {

void projected_gate(Context& ctx, const ProjectedGate& a) {
  detail::projected_gate_by_parts(ctx, a);
}

}  // namespace lrnn::cpu
