// Blocks and threads are those of the product of few rows; the thread that has a sum moves the
// window of its channel on. Bound by reading the projection. More rows than that kernel takes go
// through the ops one by one.
#include "common/norm_in_front.cuh"
#include "common/projected_conv1d.cuh"
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
  struct Operands {
    conv::Window<T, K> window;
    Packed<T, 1> bias;
  };
  __device__ __forceinline__ Operands load(int r, int c) const {
    Operands o{};
    if (bias != nullptr) o.bias.load_constant(bias + c);
    // The last channel stands for the columns beside.
    o.window.load(conv, r, min(c, static_cast<int>(conv.channels) - 1), state);
    return o;
  }
  __device__ __forceinline__ void operator()(int r, int c, float sum, Operands& o) const {
    sum += o.bias.get(0);
    if (c < conv.channels) sum = o.window.advance(conv, r, c, to_float(from_float<T>(sum)), state);
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
  const conv::Conv<T> v = conv::step_conv<T>(a);
  const cudaStream_t stream = ctx.stream().handle;
  const few_rows::Rows rows =
      few_rows::rows_of<T>(ctx, a.x, a.norm, few_rows::warps_of<T>(static_cast<int>(a.x.dim(1))));
  const auto product = product_of<T>(rows.x, a.projection);
  float* const state = a.state.data<float>();
  conv::visit_window(v, state, [&]<int K>() {
    const Channel<T, K> channel{v, data_or_null<T>(a.projection_bias), device_rows<T>(a.y), state};
    few_rows::visit_norm<T>(rows, {}, [&](const auto& norm) {
      if (!a.side_y) return few_rows::launch(stream, product, channel, norm);
      few_rows::launch_pair(stream, product, channel, product_of<T>(rows.x, a.side_projection),
                            few_rows::StoreSum<T>{.bias = data_or_null<T>(a.side_bias),
                                                  .y = device_rows<T>(a.side_y),
                                                  .accumulate = false},
                            norm);
    });
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
#ifdef LRNN_WITH_SM90A
    if (linear_sm90::takes(a)) {
      if (a.norm != nullptr) cuda::add_norm_forward(ctx, *a.norm);
      return linear_sm90::projected_conv1d_step(ctx, a);
    }
#endif
    if (takes_few_rows<T>(a)) return step<T>(ctx, a);
    lrnn::detail::projected_conv1d_by_parts(ctx, a);
  });
}

}  // namespace lrnn::cuda
