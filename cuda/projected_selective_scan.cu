// Many sequences on Hopper: projected_selective_scan_sm90.cu. All else goes through the ops one by
// one.
#include "common/projected_selective_scan.cuh"
#include "ops/projected_selective_scan_parts.hpp"

namespace lrnn::cuda {

void projected_selective_scan_step(Context& ctx, const ProjectedSelectiveScanStep& a) {
#ifdef LRNN_WITH_SM90A
  if (linear_sm90::takes(a)) return linear_sm90::projected_selective_scan_step(ctx, a);
#endif
  lrnn::detail::projected_selective_scan_by_parts(ctx, a);
}

}  // namespace lrnn::cuda
