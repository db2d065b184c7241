#include "lrnn/ops/causal_conv1d.hpp"

#include <algorithm>
#include <vector>

#include "common/activation.hpp"
#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

// Channels of one work item; sums over time stay inside an item.
constexpr std::int64_t kChannels = 64;

/// What both passes share. Rows are tokens; index -k is the k-th newest input before the start.
template <class T>
struct Conv {
  Rows<const T> x;
  const T* weight;
  const T* bias;
  const T* state_in;
  const std::int32_t* lengths;
  std::int64_t batch, seqlen, channels, width;
  Activation activation;

  template <class Args>
  explicit Conv(const Args& a)
      : x(rows_of<T>(a.x)),
        weight(a.weight.template data<T>()),
        bias(a.bias ? a.bias.template data<T>() : nullptr),
        state_in(a.state_in ? a.state_in.template data<T>() : nullptr),
        lengths(a.lengths ? a.lengths.template data<std::int32_t>() : nullptr),
        batch(a.x.dim(0)),
        seqlen(a.x.dim(1)),
        channels(a.x.dim(2)),
        width(a.weight.dim(1)),
        activation(a.activation) {}

  [[nodiscard]] std::int64_t length(std::int64_t b) const {
    return lengths != nullptr ? lengths[b] : seqlen;
  }
  [[nodiscard]] T input(std::int64_t b, std::int64_t t, std::int64_t c) const {
    if (t >= 0) return x[b * seqlen + t][c];
    return state_in != nullptr ? state_in[(b * channels + c) * width + width + t] : T(0);
  }
  [[nodiscard]] T pre(std::int64_t b, std::int64_t t, std::int64_t c) const {
    T sum = bias != nullptr ? bias[c] : T(0);
    for (std::int64_t k = 0; k < width; ++k)
      sum += weight[c * width + k] * input(b, t - (width - 1) + k, c);
    return sum;
  }
};

template <class F>
void for_each_item(std::int64_t batch, std::int64_t channels, F&& f) {
  const std::int64_t blocks = (channels + kChannels - 1) / kChannels;
#pragma omp parallel for collapse(2) schedule(static)
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t i = 0; i < blocks; ++i)
      f(b, i * kChannels, std::min(channels, (i + 1) * kChannels));
}

// pre of channels [first, last) at (b, t), taps outermost so that channels vectorise.
template <class T>
void pre_row(const Conv<T>& v, std::int64_t b, std::int64_t t, std::int64_t first,
             std::int64_t last, T* out) {
  if (t < v.width - 1) {
    for (std::int64_t c = first; c < last; ++c) out[c - first] = v.pre(b, t, c);
    return;
  }
  for (std::int64_t c = first; c < last; ++c) out[c - first] = v.bias != nullptr ? v.bias[c] : T(0);
  for (std::int64_t k = 0; k < v.width; ++k) {
    const T* const row = v.x[b * v.seqlen + t - (v.width - 1) + k];
    for (std::int64_t c = first; c < last; ++c)
      out[c - first] += v.weight[c * v.width + k] * row[c];
  }
}

template <class T>
void forward(const CausalConv1dForward& a) {
  const Conv<T> v(a);
  const auto y = rows_of<T>(a.y);
  for_each_item(v.batch, v.channels, [&](std::int64_t b, std::int64_t first, std::int64_t last) {
    const std::int64_t length = v.length(b);
    for (std::int64_t t = 0; t < v.seqlen; ++t) {
      T* const out = y[b * v.seqlen + t] + first;
      if (t >= length) {
        std::fill(out, out + (last - first), T(0));
        continue;
      }
      pre_row(v, b, t, first, last, out);
      if (v.activation == Activation::Silu)
        for (std::int64_t c = 0; c < last - first; ++c) out[c] = activate<Activation::Silu>(out[c]);
    }
    if (!a.state_out) return;
    T* const state = a.state_out.data<T>();
    std::vector<T> window(static_cast<std::size_t>(v.width));  // state_out may be state_in
    for (std::int64_t c = first; c < last; ++c) {
      for (std::int64_t k = 0; k < v.width; ++k)
        window[static_cast<std::size_t>(k)] = v.input(b, length - v.width + k, c);
      std::copy(window.begin(), window.end(), state + (b * v.channels + c) * v.width);
    }
  });
}

// One channel of one sequence: dpre over time, then its correlation with weight and inputs.
template <class T>
struct ChannelBackward {
  const Conv<T>& v;
  const CausalConv1dBackward& a;
  std::vector<T> dpre;  // [seqlen], 0 at padding

  void run(std::int64_t b, std::int64_t c, T* dweight, T* dbias) {
    const auto dy = rows_of<T>(a.dy);
    const auto dx = rows_of<T>(a.dx);
    const std::int64_t length = v.length(b);
    const std::int64_t row = b * v.seqlen;
    for (std::int64_t t = 0; t < v.seqlen; ++t) {
      T d = t < length ? dy[row + t][c] : T(0);
      if (t < length && v.activation == Activation::Silu)
        d *= activation_derivative<Activation::Silu>(v.pre(b, t, c));
      dpre[static_cast<std::size_t>(t)] = d;
    }
    for (std::int64_t t = 0; t < v.seqlen; ++t)
      dx[row + t][c] = t < length ? gradient(b, t, c, length) : T(0);
    if (a.dstate_in)
      for (std::int64_t k = 0; k < v.width; ++k)
        a.dstate_in.data<T>()[(b * v.channels + c) * v.width + k] =
            gradient(b, k - v.width, c, length);
    for (std::int64_t k = 0; k < v.width; ++k) {
      T sum = T(0);
      for (std::int64_t t = 0; t < length; ++t)
        sum += dpre[static_cast<std::size_t>(t)] * v.input(b, t - (v.width - 1) + k, c);
      dweight[k] = sum;
    }
    T sum = T(0);
    for (std::int64_t t = 0; t < length; ++t) sum += dpre[static_cast<std::size_t>(t)];
    *dbias = sum;
  }

  // Gradient of input t, which may be one of the window before the start (t < 0).
  T gradient(std::int64_t b, std::int64_t t, std::int64_t c, std::int64_t length) const {
    T sum = T(0);
    for (std::int64_t j = std::max<std::int64_t>(0, -t); j < v.width && t + j < length; ++j)
      sum += v.weight[c * v.width + v.width - 1 - j] * dpre[static_cast<std::size_t>(t + j)];
    const std::int64_t slot = t - (length - v.width);  // where the final window holds this input
    if (a.dstate_out && slot >= 0)
      sum += a.dstate_out.data<T>()[(b * v.channels + c) * v.width + slot];
    return sum;
  }
};

template <class T>
void backward(const CausalConv1dBackward& a) {
  const Conv<T> v(a);
  const std::int64_t stride = v.width + 1;  // of partial sums: width weights, one bias
  std::vector<T> partial(static_cast<std::size_t>(v.batch * v.channels * stride));
  for_each_item(v.batch, v.channels, [&](std::int64_t b, std::int64_t first, std::int64_t last) {
    ChannelBackward<T> channel{v, a, std::vector<T>(static_cast<std::size_t>(v.seqlen))};
    for (std::int64_t c = first; c < last; ++c) {
      T* const sums = partial.data() + (b * v.channels + c) * stride;
      channel.run(b, c, sums, sums + v.width);
    }
  });
  T* const dweight = a.dweight.data<T>();
  for (std::int64_t b = 0; b < v.batch; ++b)
    for (std::int64_t c = 0; c < v.channels; ++c) {
      const T* const sums = partial.data() + (b * v.channels + c) * stride;
      for (std::int64_t k = 0; k < v.width; ++k) dweight[c * v.width + k] += sums[k];
      if (a.dbias) a.dbias.data<T>()[c] += sums[v.width];
    }
}

template <class T>
void step(const CausalConv1dStep& a) {
  const auto x = rows_of<T>(a.x);
  const auto y = rows_of<T>(a.y);
  const std::int64_t width = a.weight.dim(1);
  const T* const weight = a.weight.data<T>();
  const T* const bias = a.bias ? a.bias.data<T>() : nullptr;
  T* const state = a.state.data<T>();
#pragma omp parallel for if (x.count * x.width > 4096)
  for (std::int64_t b = 0; b < x.count; ++b)
    for (std::int64_t c = 0; c < x.width; ++c) {
      T* const window = state + (b * x.width + c) * width;
      std::copy(window + 1, window + width, window);
      window[width - 1] = x[b][c];
      T sum = bias != nullptr ? bias[c] : T(0);
      for (std::int64_t k = 0; k < width; ++k) sum += weight[c * width + k] * window[k];
      y[b][c] = a.activation == Activation::Silu ? activate<Activation::Silu>(sum) : sum;
    }
}

}  // namespace

void causal_conv1d_forward(Context&, const CausalConv1dForward& a) {
  visit_float("causal_conv1d_forward", a.x.dtype(), [&]<class T>() { forward<T>(a); });
}
void causal_conv1d_backward(Context&, const CausalConv1dBackward& a) {
  visit_float("causal_conv1d_backward", a.x.dtype(), [&]<class T>() { backward<T>(a); });
}
void causal_conv1d_step(Context&, const CausalConv1dStep& a) {
  visit_float("causal_conv1d_step", a.x.dtype(), [&]<class T>() { step<T>(a); });
}

}  // namespace lrnn::cpu
