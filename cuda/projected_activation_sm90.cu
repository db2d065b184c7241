// The product as common/linear_sm90_product.cuh tells; the thread that has a sum activates it.
#include "common/activation.cuh"
#include "common/linear_sm90_product.cuh"
#include "common/linear_two_products.cuh"
#include "common/projected_activation.cuh"

namespace lrnn::cuda::linear_sm90 {
namespace {

/// y = act(sum (+ bias)).
template <Activation kind>
struct Activated : StoreSum {
  template <int N>
  __device__ __forceinline__ void finish(int row, int column, float (&sum)[N],
                                         const Operands<N>& o) const {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (bias != nullptr) sum[e] += o.bias.get(e);
      sum[e] = activate<kind>(to_float(from_float<bf16>(sum[e])));
    }
    store_packed(y.row(row) + column, sum);
  }
};

}  // namespace

bool takes(const ProjectedActivation& a) {
  if (a.kind != Activation::Gelu || !applies(a.x, a.weight)) return false;
  return !few_rows::fuses<bf16>(a.x, a.weight) && pays(detail::row_count(a.x), a.weight, a.y);
}

void projected_activation(Context& ctx, const ProjectedActivation& a) {
  const StoreSum store{.bias = a.bias ? a.bias.data<bf16>() : nullptr,
                       .y = device_rows<bf16>(a.y),
                       .accumulate = false};
  launch(ctx.stream().handle, Product{.x = a.x, .weight = a.weight, .stable_weight = true},
         Activated<Activation::Gelu>{store});
}

}  // namespace lrnn::cuda::linear_sm90
