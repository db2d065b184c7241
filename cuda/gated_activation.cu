// value * act(gate) and its gradients; bound by HBM: 3 and 5 elements per output element.
#include "lrnn/ops/gated_activation.hpp"

#include "common/activation.cuh"
#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

template <class T, Activation kind, int N>
struct Forward {
  DeviceRows<const T> value, gate;
  DeviceRows<T> y;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    float v[N];
    float g[N];
    load_vec<T, N>(value.row(r) + c, v);
    load_vec<T, N>(gate.row(r) + c, g);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= activate<kind>(g[i]);
    store_vec<T, N>(y.row(r) + c, v);
  }
};

template <class T, Activation kind, int N>
struct Backward {
  DeviceRows<const T> dy, value, gate;
  DeviceRows<T> dvalue, dgate;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    float d[N];
    float v[N];
    float g[N];
    load_vec<T, N>(dy.row(r) + c, d);
    load_vec<T, N>(value.row(r) + c, v);
    load_vec<T, N>(gate.row(r) + c, g);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = d[i] * v[i] * activation_derivative<kind>(g[i]);
      d[i] *= activate<kind>(g[i]);
    }
    store_vec<T, N>(dvalue.row(r) + c, d);
    store_vec<T, N>(dgate.row(r) + c, v);
  }
};

template <class T>
bool all_allow(std::int64_t width, std::initializer_list<TensorView> operands) {
  return std::all_of(operands.begin(), operands.end(), [&](const TensorView& t) {
    return allows_vectors(t.data<T>(), width, detail::row_stride(t), kWide<T>);
  });
}

}  // namespace

void gated_activation_forward(Context& ctx, const GatedActivationForward& a) {
  visit_float("gated_activation_forward", a.value.dtype(), [&]<class T>() {
    const std::int64_t rows = detail::row_count(a.value);
    const std::int64_t width = a.value.dim(-1);
    const bool vectors = all_allow<T>(width, {a.value, a.gate, a.y});
    visit_activation(a.kind, [&]<Activation kind>() {
      const auto launch = [&]<int N>() {
        for_each_vector<N, true>(ctx.stream().handle, rows, width,
                                 Forward<T, kind, N>{device_rows<T>(a.value),
                                                     device_rows<T>(a.gate), device_rows<T>(a.y)});
      };
      if (vectors)
        launch.template operator()<kWide<T>>();
      else
        launch.template operator()<1>();
    });
  });
}

void gated_activation_backward(Context& ctx, const GatedActivationBackward& a) {
  visit_float("gated_activation_backward", a.value.dtype(), [&]<class T>() {
    const std::int64_t rows = detail::row_count(a.value);
    const std::int64_t width = a.value.dim(-1);
    const bool vectors = all_allow<T>(width, {a.dy, a.value, a.gate, a.dvalue, a.dgate});
    visit_activation(a.kind, [&]<Activation kind>() {
      const auto launch = [&]<int N>() {
        for_each_vector<N, true>(
            ctx.stream().handle, rows, width,
            Backward<T, kind, N>{device_rows<T>(a.dy), device_rows<T>(a.value),
                                 device_rows<T>(a.gate), device_rows<T>(a.dvalue),
                                 device_rows<T>(a.dgate)});
      };
      if (vectors)
        launch.template operator()<kWide<T>>();
      else
        launch.template operator()<1>();
    });
  });
}

}  // namespace lrnn::cuda
