#include "ops/linear_skip_parts.hpp"

namespace lrnn::cpu {

void linear_skip_forward(Context& ctx, const LinearSkipForward& a) {
  detail::linear_skip_forward_by_parts(ctx, a);
}

void linear_skip_backward(Context& ctx, const LinearSkipBackward& a) {
  detail::linear_skip_backward_by_parts(ctx, a);
}

}  // namespace lrnn::cpu
