#include "lrnn/ops/causal_conv1d.hpp"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "causal_conv1d_float.hpp"
#include "common/activation.hpp"
#include "common/pack.hpp"
#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

// Channels of one work item; sums over time stay inside an item.
constexpr std::int64_t kChannels = 64;

/// What both passes share. Rows are tokens.
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
};

template <class F>
void for_each_item(std::int64_t batch, std::int64_t channels, F&& f) {
  const std::int64_t blocks = (channels + kChannels - 1) / kChannels;
#pragma omp parallel for collapse(2) schedule(static)
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t i = 0; i < blocks; ++i)
      f(b, i * kChannels, std::min(channels, (i + 1) * kChannels));
}

/// One pack of channels of one sequence. Rows of taps and windows are packs.
template <class T>
struct Channels {
  const Conv<T>& v;
  std::int64_t b, first, count;
  Pack<T> bias;
  std::vector<Pack<T>> weight;  // [width]
  std::vector<Pack<T>> before;  // [width]: inputs -width .. -1

  Channels(const Conv<T>& conv, std::int64_t sequence, std::int64_t channel, std::int64_t last)
      : v(conv),
        b(sequence),
        first(channel),
        count(std::min<std::int64_t>(kLanes<T>, last - channel)),
        bias(conv.bias != nullptr ? load(conv.bias + channel, count) : Pack<T>(Pack<T>::Zero())),
        weight(gather(conv.weight + channel * conv.width)),
        before(gather(conv.state_in == nullptr
                          ? nullptr
                          : conv.state_in + (sequence * conv.channels + channel) * conv.width)) {}

  // Columns of [.., width] rows of the channels; null: zeros.
  [[nodiscard]] std::vector<Pack<T>> gather(const T* from) const {
    std::vector<Pack<T>> columns(static_cast<std::size_t>(v.width), Pack<T>::Zero());
    for (std::int64_t k = 0; k < v.width && from != nullptr; ++k)
      for (std::int64_t i = 0; i < count; ++i)
        columns[static_cast<std::size_t>(k)](i) = from[i * v.width + k];
    return columns;
  }
  [[nodiscard]] std::int64_t row(std::int64_t t) const { return b * v.seqlen + t; }
  [[nodiscard]] Pack<T> input(std::int64_t t) const {
    if (t < 0) return before[static_cast<std::size_t>(v.width + t)];
    return load(v.x[row(t)] + first, count);
  }
  [[nodiscard]] Pack<T> pre(std::int64_t t) const {
    Pack<T> sum = bias;
    for (std::int64_t k = 0; k < v.width; ++k)
      sum += weight[static_cast<std::size_t>(k)] * input(t - (v.width - 1) + k);
    return sum;
  }
  // Channel i, column k of a [B, channels, width] tensor.
  [[nodiscard]] std::int64_t window(std::int64_t i, std::int64_t k) const {
    return (b * v.channels + first + i) * v.width + k;
  }
};

template <class T, class F>
void for_each_pack(const Conv<T>& v, F&& f) {
  for_each_item(v.batch, v.channels, [&](std::int64_t b, std::int64_t first, std::int64_t last) {
    for (std::int64_t c = first; c < last; c += kLanes<T>) f(Channels<T>(v, b, c, last));
  });
}

// The last inputs; state_out may be state_in, which has been read.
template <class T>
void write_state(const CausalConv1dForward& a, const Channels<T>& c) {
  if (!a.state_out) return;
  T* const state = a.state_out.data<T>();
  for (std::int64_t k = 0; k < c.v.width; ++k) {
    const Pack<T> input = c.input(c.v.length(c.b) - c.v.width + k);
    for (std::int64_t i = 0; i < c.count; ++i) state[c.window(i, k)] = input(i);
  }
}

template <class T>
void forward(const CausalConv1dForward& a) {
  const Conv<T> v(a);
  const auto y = rows_of<T>(a.y);
  for_each_pack(v, [&](const Channels<T>& c) {
    const std::int64_t length = v.length(c.b);
    for (std::int64_t t = 0; t < v.seqlen; ++t) {
      Pack<T> out = t < length ? c.pre(t) : Pack<T>(Pack<T>::Zero());
      if (v.activation == Activation::Silu) out /= T(1) + (-out).exp();
      store<T>(out, y[c.row(t)] + c.first, c.count);
    }
    write_state(a, c);
  });
}

FloatConv float_conv(const Conv<float>& v) {
  return {.x = v.x.data,
          .weight = v.weight,
          .bias = v.bias,
          .state_in = v.state_in,
          .lengths = v.lengths,
          .x_stride = v.x.stride,
          .batch = v.batch,
          .seqlen = v.seqlen,
          .channels = v.channels,
          .width = v.width,
          .silu = v.activation == Activation::Silu};
}
void forward_float(const CausalConv1dForward& a) {
  const Conv<float> v(a);
  const auto y = rows_of<float>(a.y);
  run_float_conv({.in = float_conv(v), .y = y.data, .y_stride = y.stride});
  if (a.state_out) for_each_pack(v, [&](const Channels<float>& c) { write_state(a, c); });
}

/// One pack of channels backward. The gradient of pre passes through a ring of `width` tokens, from
/// which that of an input is taken when its last use has been seen.
template <class T>
class BackwardPack {
 public:
  BackwardPack(const CausalConv1dBackward& a, const Channels<T>& c)
      : a_(a),
        c_(c),
        dy_(rows_of<T>(a.dy)),
        dx_(rows_of<T>(a.dx)),
        length_(c.v.length(c.b)),
        dpre_(static_cast<std::size_t>(c.v.width)),
        dweight_(static_cast<std::size_t>(c.v.width), Pack<T>::Zero()) {}

  void run() {
    const std::int64_t width = c_.v.width;
    const std::int64_t seen = std::min(length_, width);  // of these tokens is the state a part
    if (length_ == 0) write_dstate();
    for (std::int64_t t = 0; t < length_; ++t) {
      add_token(t);
      if (t == seen - 1) write_dstate();
      if (t >= width - 1) write_dx(t - (width - 1), gradient(t - (width - 1)));
    }
    for (std::int64_t t = std::max<std::int64_t>(0, length_ - (width - 1)); t < length_; ++t)
      write_dx(t, gradient(t));
    for (std::int64_t t = length_; t < c_.v.seqlen; ++t) write_dx(t, Pack<T>::Zero());
  }
  // Per channel `width` weights, then the bias.
  void write_sums(T* sums) const {
    for (std::int64_t i = 0; i < c_.count; ++i) {
      T* const to = sums + (c_.b * c_.v.channels + c_.first + i) * (c_.v.width + 1);
      for (std::int64_t k = 0; k < c_.v.width; ++k)
        to[k] = dweight_[static_cast<std::size_t>(k)](i);
      to[c_.v.width] = dbias_(i);
    }
  }

 private:
  [[nodiscard]] Pack<T>& dpre(std::int64_t t) {
    return dpre_[static_cast<std::size_t>(t % c_.v.width)];
  }
  void add_token(std::int64_t t) {
    Pack<T> d = load(dy_[c_.row(t)] + c_.first, c_.count);
    if (c_.v.activation == Activation::Silu) {
      const Pack<T> pre = c_.pre(t);
      const Pack<T> s = T(1) / (T(1) + (-pre).exp());
      d *= s * (T(1) + pre * (T(1) - s));
    }
    dpre(t) = d;
    dbias_ += d;
    for (std::int64_t k = 0; k < c_.v.width; ++k)
      dweight_[static_cast<std::size_t>(k)] += d * c_.input(t - (c_.v.width - 1) + k);
  }
  // Of input t, which may be one of the window before the start (t < 0).
  [[nodiscard]] Pack<T> gradient(std::int64_t t) {
    const std::int64_t width = c_.v.width;
    Pack<T> sum = Pack<T>::Zero();
    for (std::int64_t j = std::max<std::int64_t>(0, -t); j < width && t + j < length_; ++j)
      sum += c_.weight[static_cast<std::size_t>(width - 1 - j)] * dpre(t + j);
    const std::int64_t slot = t - (length_ - width);  // where the final window holds this input
    if (a_.dstate_out && slot >= 0)
      for (std::int64_t i = 0; i < c_.count; ++i)
        sum(i) += a_.dstate_out.data<T>()[c_.window(i, slot)];
    return sum;
  }
  void write_dx(std::int64_t t, const Pack<T>& dx) {
    store<T>(dx, dx_[c_.row(t)] + c_.first, c_.count);
  }
  void write_dstate() {
    if (!a_.dstate_in) return;
    for (std::int64_t k = 0; k < c_.v.width; ++k) {
      const Pack<T> d = gradient(k - c_.v.width);
      for (std::int64_t i = 0; i < c_.count; ++i) a_.dstate_in.data<T>()[c_.window(i, k)] = d(i);
    }
  }

  const CausalConv1dBackward& a_;
  const Channels<T>& c_;
  Rows<const T> dy_;
  Rows<T> dx_;
  std::int64_t length_;
  std::vector<Pack<T>> dpre_;
  std::vector<Pack<T>> dweight_;
  Pack<T> dbias_ = Pack<T>::Zero();
};

// `sums`: [B, C, width + 1], the weights' and the bias's; over the batch, in order.
template <class T>
void add_sums(const CausalConv1dBackward& a, const Conv<T>& v, const std::vector<T>& sums) {
  T* const dweight = a.dweight.data<T>();
  for (std::int64_t b = 0; b < v.batch; ++b)
    for (std::int64_t c = 0; c < v.channels; ++c) {
      const T* const part = sums.data() + (b * v.channels + c) * (v.width + 1);
      for (std::int64_t k = 0; k < v.width; ++k) dweight[c * v.width + k] += part[k];
      if (a.dbias) a.dbias.data<T>()[c] += part[v.width];
    }
}

template <class T>
void backward(const CausalConv1dBackward& a) {
  const Conv<T> v(a);
  std::vector<T> sums(static_cast<std::size_t>(v.batch * v.channels * (v.width + 1)));
  if constexpr (std::is_same_v<T, float>) {
    const auto dy = rows_of<float>(a.dy);
    const auto dx = rows_of<float>(a.dx);
    run_float_conv_backward({.in = float_conv(v),
                             .dy = dy.data,
                             .dstate_out = a.dstate_out ? a.dstate_out.data<float>() : nullptr,
                             .dx = dx.data,
                             .dstate_in = a.dstate_in ? a.dstate_in.data<float>() : nullptr,
                             .dy_stride = dy.stride,
                             .dx_stride = dx.stride,
                             .sums = sums.data()});
  } else {
    for_each_pack(v, [&](const Channels<T>& c) {
      BackwardPack<T> pack(a, c);
      pack.run();
      pack.write_sums(sums.data());
    });
  }
  add_sums(a, v, sums);
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
  visit_float("causal_conv1d_forward", a.x.dtype(), [&]<class T>() {
    if constexpr (std::is_same_v<T, float>)
      forward_float(a);
    else
      forward<T>(a);
  });
}
void causal_conv1d_backward(Context&, const CausalConv1dBackward& a) {
  visit_float("causal_conv1d_backward", a.x.dtype(), [&]<class T>() { backward<T>(a); });
}
void causal_conv1d_step(Context&, const CausalConv1dStep& a) {
  visit_float("causal_conv1d_step", a.x.dtype(), [&]<class T>() { step<T>(a); });
}

}  // namespace lrnn::cpu
