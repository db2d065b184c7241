// A product whose epilogue adds the bias, rounds and applies the activation: few rows by
// common/linear_few_rows.cuh, more on Hopper by linear_sm90 (projected_activation_sm90.cu). Other
// rows go through the ops one by one. Bound by latency.
#include "common/activation.cuh"
#include "common/linear_two_products.cuh"
#include "common/projected_activation.cuh"
#include "ops/projected_activation_parts.hpp"

namespace lrnn::cuda {
namespace {

template <class T, Activation kind>
struct Activated {
  const T* bias;  // or null
  DeviceRows<T> y;

  struct Operands {
    float bias;
  };
  __device__ __forceinline__ Operands load(int, int c) const {
    return {bias != nullptr ? to_float(bias[c]) : 0.0F};
  }
  __device__ __forceinline__ void operator()(int r, int c, float sum, const Operands& o) const {
    sum += o.bias;
    y.row(r)[c] = from_float<T>(activate<kind>(to_float(from_float<T>(sum))));
  }
};

}  // namespace

void projected_activation(Context& ctx, const ProjectedActivation& a) {
#ifdef LRNN_WITH_SM90A
  if (linear_sm90::takes(a)) return linear_sm90::projected_activation(ctx, a);
#endif
  visit_float("projected_activation", a.x.dtype(), [&]<class T>() {
    if (!few_rows::fuses<T>(a.x, a.weight))
      return lrnn::detail::projected_activation_by_parts(ctx, a);
    const few_rows::Args<T> product{.x = device_rows<T>(a.x),
                                    .weight = device_rows<T>(a.weight),
                                    .rows = static_cast<int>(detail::row_count(a.x)),
                                    .columns = static_cast<int>(a.weight.dim(0)),
                                    .depth = static_cast<int>(a.x.dim(-1)),
                                    .stable_weight = true};
    visit_activation(a.kind, [&]<Activation kind>() {
      few_rows::launch(
          ctx.stream().handle, product,
          Activated<T, kind>{a.bias ? a.bias.data<T>() : nullptr, device_rows<T>(a.y)});
    });
  });
}

}  // namespace lrnn::cuda
