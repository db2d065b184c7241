#include "ops/projected_rglru_parts.hpp"

namespace lrnn::cpu {

void projected_rglru_step(Context& ctx, const ProjectedRglruStep& a) {
  detail::projected_rglru_by_parts(ctx, a);
}

}  // namespace lrnn::cpu
