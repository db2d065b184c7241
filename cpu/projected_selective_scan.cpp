#include "ops/projected_selective_scan_parts.hpp"

namespace lrnn::cpu {

void projected_selective_scan_step(Context& ctx, const ProjectedSelectiveScanStep& a) {
  detail::projected_selective_scan_by_parts(ctx, a);
}

}  // namespace lrnn::cpu
