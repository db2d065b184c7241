#include "ops/mamba_stack_parts.hpp"

namespace lrnn::cpu {

void mamba_stack_step(Context& ctx, const MambaStackStep& a) {
  detail::mamba_stack_by_parts(ctx, a);
}

}  // namespace lrnn::cpu
