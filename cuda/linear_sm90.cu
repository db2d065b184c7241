// Products of up to a few hundred rows on Hopper. Ownership: common/linear_sm90_product.cuh.
//
// Bound by the reading of W, from 64 rows on by that of x from L2. In a chain of such products on
// an H200 weights of 50280 x 2048 stream at 4.08 TB/s, 50277 x 768 at 3.5, 8192 x 2048 at 3.4, 2048
// x 4096 at 2.55.
#include "common/linear_sm90_product.cuh"

namespace lrnn::cuda::linear_sm90 {

void forward(Context& ctx, const LinearForward& a, bool behind_wait) {
  launch(ctx.stream().handle,
         Product{.x = a.x,
                 .weight = a.weight,
                 .stable_weight = a.stable_weight,
                 .behind_wait = behind_wait},
         StoreSum{.bias = a.bias ? a.bias.data<bf16>() : nullptr,
                  .y = device_rows<bf16>(a.y),
                  .accumulate = a.accumulate});
}

}  // namespace lrnn::cuda::linear_sm90
