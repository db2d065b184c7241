// Elementwise activations; bound by HBM, except gelu on float32, which is near its issue limit.
#include "lrnn/ops/activation.hpp"

#include "common/activation.cuh"
#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

template <class T, Activation kind, bool kTwice, int N>
struct Forward {
  DeviceRows<const T> x;
  DeviceRows<T> y;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    float v[N];
    load_vec<T, N>(x.row(r) + c, v);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = activate<kind>(v[i]);
      if constexpr (kTwice) v[i] = activate<kind>(v[i]);
    }
    store_vec<T, N>(y.row(r) + c, v);
  }
};

template <class T, Activation kind, bool kTwice, int N>
struct Backward {
  DeviceRows<const T> dy, x;
  DeviceRows<T> dx;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    float d[N];
    float v[N];
    load_vec<T, N>(dy.row(r) + c, d);
    load_vec<T, N>(x.row(r) + c, v);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (kTwice) d[i] *= activation_derivative<kind>(activate<kind>(v[i]));
      d[i] *= activation_derivative<kind>(v[i]);
    }
    store_vec<T, N>(dx.row(r) + c, d);
  }
};

// Calls f.operator()<kind, twice>().
template <class F>
void visit_repeated(Activation kind, bool twice, F&& f) {
  visit_activation(kind, [&]<Activation kKind>() {
    if (twice)
      f.template operator()<kKind, true>();
    else
      f.template operator()<kKind, false>();
  });
}

}  // namespace

void activation_forward(Context& ctx, const ActivationForward& a) {
  visit_float("activation_forward", a.x.dtype(), [&]<class T>() {
    constexpr int wide = kWide<T>;
    const auto x = device_rows<T>(a.x);
    const auto y = device_rows<T>(a.y);
    const std::int64_t rows = detail::row_count(a.x);
    const std::int64_t width = a.x.dim(-1);
    const bool vectors = allows_vectors(x.data, width, x.stride, wide) &&
                         allows_vectors(y.data, width, y.stride, wide);
    visit_repeated(a.kind, a.twice, [&]<Activation kind, bool kTwice>() {
      if (vectors)
        for_each_vector<wide, true>(ctx.stream().handle, rows, width,
                                    Forward<T, kind, kTwice, wide>{x, y});
      else
        for_each_vector<1, true>(ctx.stream().handle, rows, width,
                                 Forward<T, kind, kTwice, 1>{x, y});
    });
  });
}

void activation_backward(Context& ctx, const ActivationBackward& a) {
  visit_float("activation_backward", a.x.dtype(), [&]<class T>() {
    constexpr int wide = kWide<T>;
    const auto dy = device_rows<T>(a.dy);
    const auto x = device_rows<T>(a.x);
    const auto dx = device_rows<T>(a.dx);
    const std::int64_t rows = detail::row_count(a.x);
    const std::int64_t width = a.x.dim(-1);
    const bool vectors = allows_vectors(x.data, width, x.stride, wide) &&
                         allows_vectors(dy.data, width, dy.stride, wide) &&
                         allows_vectors(dx.data, width, dx.stride, wide);
    visit_repeated(a.kind, a.twice, [&]<Activation kind, bool kTwice>() {
      if (vectors)
        for_each_vector<wide, true>(ctx.stream().handle, rows, width,
                                    Backward<T, kind, kTwice, wide>{dy, x, dx});
      else
        for_each_vector<1, true>(ctx.stream().handle, rows, width,
                                 Backward<T, kind, kTwice, 1>{dy, x, dx});
    });
  });
}

}  // namespace lrnn::cuda
