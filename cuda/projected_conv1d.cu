// Blocks and threads are those of the product of few rows; the thread that has a sum moves the
// window of its channel on. Bound by reading the projection. More rows than that kernel takes go
// through the ops one by one.
#include "common/causal_conv1d.cuh"
#include "common/linear_two_products.cuh"
#include "ops/projected_conv1d_parts.hpp"

namespace lrnn::cuda {
namespace {

/// What becomes of a sum: a channel of the convolution, or a column that is stored.
template <class T, int K>
struct Channel {
  conv::Conv<T> conv;
  const T* bias;  // of the projection, or null
  DeviceRows<T> y;
  float* state;

  __device__ __forceinline__ void prefetch(int r, int c) const {
    if (c >= conv.channels) return;
    prefetch_to_l2(state + (r * conv.channels + c) * conv.width);
    prefetch_to_l2(conv.weight + static_cast<std::int64_t>(c) * conv.width);
  }
  __device__ __forceinline__ void operator()(int r, int c, float sum) const {
    if (bias != nullptr) sum += to_float(bias[c]);
    if (c < conv.channels)
      sum = conv::advance_window<T, K>(conv, r, c, to_float(from_float<T>(sum)), state);
    y.row(r)[c] = from_float<T>(sum);
  }
};

template <class T>
few_rows::Args<T> product_of(TensorView x, TensorView weight) {
  return {.x = device_rows<T>(x),
          .weight = device_rows<T>(weight),
          .rows = static_cast<int>(x.dim(0)),
          .columns = static_cast<int>(weight.dim(0)),
          .depth = static_cast<int>(x.dim(1)),
          .stable_weight = true};
}

template <class T>
const T* data_or_null(TensorView t) {
  return t ? t.data<T>() : nullptr;
}

template <class T>
void step(Context& ctx, const ProjectedConv1dStep& a) {
  const conv::Conv<T> v{.x = nullptr,
                        .x_stride = 0,
                        .weight = a.weight.data<T>(),
                        .bias = data_or_null<T>(a.bias),
                        .state_in = nullptr,
                        .lengths = nullptr,
                        .batch = a.x.dim(0),
                        .seqlen = 1,
                        .channels = a.weight.dim(0),
                        .width = static_cast<int>(a.weight.dim(1)),
                        .silu = a.activation == Activation::Silu};
  const cudaStream_t stream = ctx.stream().handle;
  const auto product = product_of<T>(a.x, a.projection);
  float* const state = a.state.data<float>();
  conv::visit_window(v, state, [&]<int K>() {
    const Channel<T, K> channel{v, data_or_null<T>(a.projection_bias), device_rows<T>(a.y), state};
    if (!a.side_y) return few_rows::launch(stream, product, channel);
    few_rows::launch_pair(stream, product, channel, product_of<T>(a.x, a.side_projection),
                          few_rows::StoreSum<T>{.bias = data_or_null<T>(a.side_bias),
                                                .y = device_rows<T>(a.side_y),
                                                .accumulate = false});
  });
}

template <class T>
bool takes_few_rows(const ProjectedConv1dStep& a) {
  return few_rows::fuses<T>(a.x, a.projection) &&
         (!a.side_y || few_rows::fuses<T>(a.x, a.side_projection));
}

}  // namespace

void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& a) {
  visit_float("projected_conv1d_step", a.x.dtype(), [&]<class T>() {
    if (takes_few_rows<T>(a)) return step<T>(ctx, a);
    lrnn::detail::projected_conv1d_by_parts(ctx, a);
  });
}

}  // namespace lrnn::cuda
