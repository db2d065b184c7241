#include "ops/s7_gated_step_parts.hpp"

namespace lrnn::cpu {

void s7_gated_step(Context& ctx, const S7GatedStep& a) {
  detail::s7_gated_step_by_parts(ctx, a);
}

}  // namespace lrnn::cpu
