// A block owns eight channels of all sequences and does both products as common/
// linear_two_products.cuh tells; the thread that has both sums of a channel moves its state on.
// Bound by reading the projections. More rows than that kernel takes go through the ops one by one.
#include <cmath>

#include "common/activation.cuh"
#include "common/linear_two_products.cuh"
#include "common/rglru_scan.cuh"
#include "ops/projected_rglru_parts.hpp"

namespace lrnn::cuda {
namespace {

/// What becomes of both sums of a channel.
template <class T>
struct Recurrence {
  rglru::Inputs<T> in;
  const T* r_bias;
  const T* i_bias;
  DeviceRows<const T> gate;
  DeviceRows<T> y;
  float* state;

  __device__ __forceinline__ float* state_of(int row, int e) const {
    return state + static_cast<std::int64_t>(row) * in.channels + e;
  }
  __device__ __forceinline__ void prefetch(int row, int e) const {
    prefetch_to_l2(state_of(row, e));
    prefetch_to_l2(in.a_log + e);
  }
  struct Operands {
    float rate, v, r_bias, i_bias, h, gate;
  };
  __device__ __forceinline__ Operands load(int row, int e) const {
    return {in.rate(e),          to_float(in.v.row(row)[e]), to_float(r_bias[e]),
            to_float(i_bias[e]), *state_of(row, e),          to_float(gate.row(row)[e])};
  }
  __device__ __forceinline__ void operator()(int row, int e, float r_sum, float i_sum,
                                             const Operands& o) const {
    const auto rounded = [](float v) { return to_float(from_float<T>(v)); };
    float a;
    float drive;
    rglru::token<T>(o.rate, o.v, rounded(r_sum + o.r_bias), rounded(i_sum + o.i_bias), a, drive);
    const float next = fmaf(a, o.h, drive);
    *state_of(row, e) = next;
    y.row(row)[e] = from_float<T>(rounded(next) * activate<Activation::Gelu>(o.gate));
  }
};

template <class T>
void step(Context& ctx, const ProjectedRglruStep& a) {
  const auto product = [&](TensorView weight) {
    return few_rows::Args<T>{.x = device_rows<T>(a.v),
                             .weight = device_rows<T>(weight),
                             .rows = static_cast<int>(a.v.dim(0)),
                             .columns = static_cast<int>(weight.dim(0)),
                             .depth = static_cast<int>(a.v.dim(1)),
                             .stable_weight = true};
  };
  const DeviceRows<const T> none{nullptr, 0};
  const int channels = static_cast<int>(a.v.dim(1));
  const Recurrence<T> recurrence{{device_rows<T>(a.v), none, none, a.a_log.data<float>(), nullptr,
                                  static_cast<float>(a.c), channels, 1, 1, a.v.dim(0)},
                                 a.r_bias.data<T>(),
                                 a.i_bias.data<T>(),
                                 device_rows<T>(a.gate),
                                 device_rows<T>(a.y),
                                 a.state.data<float>()};
  few_rows::launch_two(ctx.stream().handle, product(a.r_projection), product(a.i_projection),
                       recurrence);
}

}  // namespace

void projected_rglru_step(Context& ctx, const ProjectedRglruStep& a) {
  visit_float("projected_rglru_step", a.v.dtype(), [&]<class T>() {
    if (few_rows::fuses<T>(a.v, a.r_projection) && few_rows::fuses<T>(a.v, a.i_projection))
      return step<T>(ctx, a);
    lrnn::detail::projected_rglru_by_parts(ctx, a);
  });
}

}  // namespace lrnn::cuda
