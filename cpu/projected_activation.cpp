#include "ops/projected_activation_parts.hpp"

namespace lrnn::cpu {

void projected_activation(Context& ctx, const ProjectedActivation& a) {
  detail::projected_activation_by_parts(ctx, a);
}

}  // namespace lrnn::cpu
