// The product as common/linear_sm90_product.cuh tells; the thread that has a sum moves the window
// of its channel on. Bound by reading the projection, with many sequences next to the windows: of a
// layer of 128 sequences on an H200 3072 x 768 and the windows (11 MB) took 8 us while sums were
// sent one by one, 2 us of it.
#include "common/linear_sm90_product.cuh"
#include "common/projected_conv1d.cuh"

namespace lrnn::cuda::linear_sm90 {
namespace {

using Window = conv::Window<bf16, conv::kUsualWidth>;

/// What stays of a window. The oldest value is not read: its register would be used for something
/// else, for which a warp would wait until all windows asked for so far are there.
struct KeptWindow {
  float second;
  Packed<float, 2> newer;

  __device__ __forceinline__ void load(const float* window) {
    newer.load(window + 2);
    second = window[1];
  }
};
/// A channel's window after its input, and its output.
struct Advanced {
  float moved[conv::kUsualWidth];
  float output;
};
/// Parameters of a channel.
struct ChannelParameters {
  Packed<bf16, conv::kUsualWidth> taps;
  Packed<bf16, 1> conv_bias = {};
  Packed<bf16, 1> bias = {};  // of the projection

  __device__ __forceinline__ void load(const conv::Conv<bf16>& conv, const bf16* projection_bias,
                                       int c) {
    taps.load_constant(conv.weight + std::int64_t{c} * conv::kUsualWidth);
    if (conv.bias != nullptr) conv_bias.load_constant(conv.bias + c);
    if (projection_bias != nullptr) bias.load_constant(projection_bias + c);
  }
  __device__ __forceinline__ Advanced advance(const conv::Conv<bf16>& conv, float sum,
                                              const KeptWindow& w) const {
    const float newest = to_float(from_float<bf16>(sum + bias.get(0)));
    Advanced v{.moved = {w.second, w.newer.get(0), w.newer.get(1), newest}, .output = 0.0F};
    v.output = Window::output(conv, taps, conv_bias, v.moved);
    return v;
  }
};
__device__ __forceinline__ float* window_of(const conv::Conv<bf16>& conv, float* state, int r,
                                            int c) {
  return state + (std::int64_t{r} * conv.channels + c) * conv::kUsualWidth;
}

/// What becomes of a sum: a channel of the convolution, or a column that is stored.
struct Channel {
  static constexpr bool kNarrow = true;  // neighbouring lanes have neighbouring windows

  conv::Conv<bf16> conv;
  const bf16* bias;  // of the projection, or null
  DeviceRows<bf16> y;
  float* state;

  [[nodiscard]] bool allows(int, std::int64_t) const { return true; }
  template <int N>
  struct Operands {
    KeptWindow window;
    ChannelParameters own;
  };
  __device__ __forceinline__ void prefetch(int r, int c) const {
    constexpr int kPerLine = 128 / (4 * conv::kUsualWidth);
    if (c < conv.channels && c % kPerLine == 0) prefetch_to_l2(window_of(conv, state, r, c));
  }
  template <int N>
  __device__ __forceinline__ Operands<N> load(int r, int c) const {
    static_assert(N == 1);
    Operands<N> o;
    // The last channel stands for the columns beside, but for their bias.
    const int channel = min(c, static_cast<int>(conv.channels) - 1);
    o.own.load(conv, nullptr, channel);
    if (bias != nullptr) o.own.bias.load_constant(bias + c);
    o.window.load(window_of(conv, state, r, channel));
    return o;
  }
  template <int N>
  __device__ __forceinline__ void finish(int r, int c, float (&sum)[N], Operands<N>& o) const {
    if (c >= conv.channels) {
      y.row(r)[c] = from_float<bf16>(sum[0] + o.own.bias.get(0));
      return;
    }
    const Advanced v = o.own.advance(conv, sum[0], o.window);
    store_packed(window_of(conv, state, r, c), v.moved);
    y.row(r)[c] = from_float<bf16>(v.output);
  }
};

/// The same where half of the columns are channels.
template <bool kScales_>
struct HalfChannels {
  static constexpr bool kScales = kScales_;
  using Operand = KeptWindow;
  using Result = Advanced;
  using First = ChannelParameters;

  conv::Conv<bf16> conv;
  const bf16* bias;  // of the projection, or null
  DeviceRows<bf16> y;
  float* state;
  RowScale scale;

  __device__ __forceinline__ First first(int c) const {
    First own;
    own.load(conv, bias, c);
    return own;
  }
  __device__ __forceinline__ Operand load_first(int r, int c) const {
    Operand o;
    o.load(window_of(conv, state, r, c));
    return o;
  }
  __device__ __forceinline__ Result finish_first(float sum, const First& own,
                                                 const Operand& o) const {
    return own.advance(conv, sum, o);
  }
  __device__ __forceinline__ void store_first(int r, int c, const Result& v) const {
    store_packed(window_of(conv, state, r, c), v.moved);
    y.row(r)[c] = from_float<bf16>(v.output);
  }
  template <int N>
  __device__ __forceinline__ void finish_second(int r, int c, float (&sum)[N]) const {
    if (bias != nullptr) {
      Packed<bf16, N> b;
      b.load_constant(bias + c);
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] += b.get(e);
    }
    store_packed(y.row(r) + c, sum);
  }
};

using ManyRows = Tile<128, 1, 2, 10, 8, true>;

/// Whether the halves of the columns are channels and others, in whole tiles.
bool has_halves(const ProjectedConv1dStep& a) {
  const std::int64_t columns = a.projection.dim(0);
  return columns == 2 * a.weight.dim(0) && columns % ManyRows::kColumns == 0 &&
         parts_of(static_cast<int>(columns), ceil_div(a.x.dim(1), kPanel)) < kMaxParts &&
         allows_vectors(a.y.data<bf16>(), columns, detail::row_stride(a.y), 4) &&
         (!a.projection_bias || allows_vectors(a.projection_bias.data<bf16>(), columns, 0, 4));
}

/// Whether this kernel can address all operands.
bool addressable(const ProjectedConv1dStep& a) {
  return !a.side_y && applies(a.x, a.projection) &&
         conv::has_usual_windows(conv::step_conv<bf16>(a), a.state.data<float>());
}

template <bool kScales>
void launch_halves(Context& ctx, const ProjectedConv1dStep& a, const RowScale& scale,
                   bool weight_once) {
  launch<ManyRows>(
      ctx.stream().handle,
      Product{.x = a.x, .weight = a.projection, .stable_weight = true, .weight_once = weight_once},
      HalfChannels<kScales>{.conv = conv::step_conv<bf16>(a),
                            .bias = a.projection_bias ? a.projection_bias.data<bf16>() : nullptr,
                            .y = device_rows<bf16>(a.y),
                            .state = a.state.data<float>(),
                            .scale = scale});
}

}  // namespace

bool scales_rows(const ProjectedConv1dStep& a) {
  const std::int64_t rows = a.x.dim(0);
  return addressable(a) && rows > 64 && rows <= ManyRows::kRows && has_halves(a);
}

// Where the windows do not delay the product more than a launch would: they come while products are
// formed, or a block has a few for each thread (64 rows are the most for the threads of a tile). In
// the latter case the sums of a large weight, half of whose blocks have windows, wait for them.
bool takes(const ProjectedConv1dStep& a) {
  if (!addressable(a)) return false;
  if (scales_rows(a)) return true;
  const std::int64_t rows = a.x.dim(0);
  if (a.projection.numel() >= 2 * kSmallWeight) return rows <= 8;
  if (few_rows::applies<bf16>(a.x, a.projection)) return streams(a.projection);
  return (rows <= 32 || rows > 64) && pays(rows, a.projection, a.y);
}

void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& a) {
  const Product product{.x = a.x, .weight = a.projection, .stable_weight = true};
  if (a.x.dim(0) > 64 && has_halves(a)) return launch_halves<false>(ctx, a, {}, false);
  launch(ctx.stream().handle, product,
         Channel{.conv = conv::step_conv<bf16>(a),
                 .bias = a.projection_bias ? a.projection_bias.data<bf16>() : nullptr,
                 .y = device_rows<bf16>(a.y),
                 .state = a.state.data<float>()});
}

void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& a, const RowScale& scale,
                           bool weight_once) {
  if (scale.squares == nullptr) return launch_halves<false>(ctx, a, scale, weight_once);
  launch_halves<true>(ctx, a, scale, weight_once);
}

}  // namespace lrnn::cuda::linear_sm90
