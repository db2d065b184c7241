#include "ops/projected_diagonal_parts.hpp"

namespace lrnn::cpu {

void projected_diagonal_step(Context& ctx, const ProjectedDiagonalStep& a) {
  detail::projected_diagonal_by_parts(ctx, a);
}

}  // namespace lrnn::cpu
