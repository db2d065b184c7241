// Both products of a block's columns as common/linear_two_products.cuh tells; the thread that has
// both sums gates one by the other. Bound by reading the weights. More rows than that kernel takes
// go through the ops one by one.
#include "common/activation.cuh"
#include "common/linear_two_products.cuh"
#include "common/norm_in_front.cuh"
#include "ops/projected_gate_parts.hpp"

namespace lrnn::cuda {
namespace {

template <class T, Activation kind>
struct Gate {
  DeviceRows<T> y;

  __device__ __forceinline__ void operator()(int r, int c, float value, float gate) const {
    const auto rounded = [](float v) { return to_float(from_float<T>(v)); };
    y.row(r)[c] = from_float<T>(rounded(value) * activate<kind>(rounded(gate)));
  }
};

}  // namespace

void projected_gate(Context& ctx, const ProjectedGate& a) {
  visit_float("projected_gate", a.x.dtype(), [&]<class T>() {
    const std::int64_t depth = a.x.dim(-1);
    const auto weight = [&](int part) {
      return a.weight.slice(0, part, 1).reshape({a.weight.dim(1), depth});
    };
    if (!few_rows::fuses<T>(a.x, weight(0)) || !few_rows::fuses<T>(a.x, weight(1)))
      return lrnn::detail::projected_gate_by_parts(ctx, a);
    const few_rows::Rows rows =
        few_rows::rows_of<T>(ctx, a.x, a.norm, few_rows::warps_of_two<T>(static_cast<int>(depth)));
    const auto product = [&](int part) {
      return few_rows::Args<T>{.x = device_rows<T>(rows.x),
                               .weight = device_rows<T>(weight(part)),
                               .rows = static_cast<int>(detail::row_count(a.x)),
                               .columns = static_cast<int>(a.weight.dim(1)),
                               .depth = static_cast<int>(depth),
                               .stable_weight = true};
    };
    visit_activation(a.kind, [&]<Activation kind>() {
      few_rows::visit_norm<T>(rows, {}, [&](const auto& norm) {
        few_rows::launch_two(ctx.stream().handle, product(0), product(1),
                             Gate<T, kind>{device_rows<T>(a.y)}, norm);
      });
    });
  });
}

}  // namespace lrnn::cuda
