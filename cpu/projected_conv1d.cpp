#include "ops/projected_conv1d_parts.hpp"

namespace lrnn::cpu {

void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& a) {
  detail::projected_conv1d_by_parts(ctx, a);
}

}  // namespace lrnn::cpu
