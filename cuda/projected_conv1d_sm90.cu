// The product as common/linear_sm90_product.cuh tells; the thread that has a sum moves the window
// of its channel on. Bound by reading the projection, with many sequences next to the windows.
#include "common/linear_sm90_product.cuh"
#include "common/projected_conv1d.cuh"

namespace lrnn::cuda::linear_sm90 {
namespace {

/// What becomes of a sum: a channel of the convolution, or a column that is stored.
struct Channel {
  using Window = conv::Window<bf16, conv::kUsualWidth>;
  static constexpr bool kNarrow = true;  // neighbouring lanes have neighbouring windows

  conv::Conv<bf16> conv;
  const bf16* bias;  // of the projection, or null
  DeviceRows<bf16> y;
  float* state;

  [[nodiscard]] bool allows(int, std::int64_t) const { return true; }
  template <int N>
  struct Operands {
    Window window;
    Packed<bf16, 1> bias;
  };
  __device__ __forceinline__ void prefetch(int r, int c) const {
    constexpr int kPerLine = 128 / static_cast<int>(sizeof(Window::values));
    if (c < conv.channels && c % kPerLine == 0)
      prefetch_to_l2(state + (std::int64_t{r} * conv.channels + c) * conv::kUsualWidth);
  }
  template <int N>
  __device__ __forceinline__ Operands<N> load(int r, int c) const {
    static_assert(N == 1);
    Operands<N> o{};
    if (bias != nullptr) o.bias.load_constant(bias + c);
    // The last channel stands for the columns beside.
    o.window.load(conv, r, min(c, static_cast<int>(conv.channels) - 1), state);
    return o;
  }
  template <int N>
  __device__ __forceinline__ void finish(int r, int c, float (&sum)[N], Operands<N>& o) const {
    float v = sum[0] + o.bias.get(0);
    if (c < conv.channels) v = o.window.advance(conv, r, c, to_float(from_float<bf16>(v)), state);
    y.row(r)[c] = from_float<bf16>(v);
  }
};

}  // namespace

// Where the windows do not delay the product more than a launch would: a block has a few for each
// thread (64 rows are the most for the threads of a tile), and the sums of a large weight, half of
// whose blocks have windows, wait for them.
bool takes(const ProjectedConv1dStep& a) {
  if (a.side_y || !applies(a.x, a.projection)) return false;
  if (!conv::has_usual_windows(conv::step_conv<bf16>(a), a.state.data<float>())) return false;
  const std::int64_t rows = a.x.dim(0);
  if (a.projection.numel() >= 2 * kSmallWeight) return rows <= 8;
  if (few_rows::applies<bf16>(a.x, a.projection)) return streams(a.projection);
  return (rows <= 32 || rows > 64) && pays(rows, a.projection, a.y);
}

void projected_conv1d_step(Context& ctx, const ProjectedConv1dStep& a) {
  launch(ctx.stream().handle, Product{.x = a.x, .weight = a.projection, .stable_weight = true},
         Channel{.conv = conv::step_conv<bf16>(a),
                 .bias = a.projection_bias ? a.projection_bias.data<bf16>() : nullptr,
                 .y = device_rows<bf16>(a.y),
                 .state = a.state.data<float>()});
}

}  // namespace lrnn::cuda::linear_sm90
