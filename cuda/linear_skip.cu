// One pass where Hopper's kernel applies (linear_skip_sm90.cu), else the two ops it stands for.
#include "lrnn/ops/linear_skip.hpp"

#include "common/linear_skip_sm90.cuh"
#include "ops/linear_skip_parts.hpp"

namespace lrnn::cuda {
void linear_skip_forward(Context& ctx, const LinearSkipForward& a) {
  if (linear_skip::run_if_suits(ctx, {.x = a.x,
                                      .weight = a.weight,
                                      .across = false,
                                      .skip = a.skip,
                                      .scale = a.scale,
                                      .y = a.y}))
    return;
  detail::linear_skip_forward_by_parts(ctx, a);
}

void linear_skip_backward(Context& ctx, const LinearSkipBackward& a) {
  if (linear_skip::run_if_suits(ctx, {.x = a.dv,
                                      .weight = a.weight,
                                      .across = true,
                                      .skip = a.dy,
                                      .scale = a.scale,
                                      .y = a.dx,
                                      .other = a.x,
                                      .dscale = a.dscale}))
    return;
  detail::linear_skip_backward_by_parts(ctx, a);
}

}  // namespace lrnn::cuda
