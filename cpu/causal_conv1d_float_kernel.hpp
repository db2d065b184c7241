// Both passes of causal_conv1d in float, once per instruction set: see common/isa.hpp.
namespace LRNN_ISA {

constexpr int kTokens = kMost;
static_assert(kGroup % kLanes == 0 && kTile % kTokens == 0);

// A vector of channels and its scratch, of rows of kLanes floats.
struct Taps {
  std::int64_t first, count;
  Vec bias;
  float* weight;   // [width]
  float* before;   // [width]: the inputs before the first
  float* inputs;   // [width - 1 + kTile]: those of a tile, after those before it
  float* dpre;     // [kTile + width - 1]: of a tile, before those after it
  float* dweight;  // [width]
  float* dafter;   // [width]: gradients of the final window
};

// Columns of [.., width] rows of the channels; null: zeros.
inline void gather(const float* from, const Taps& c, std::int64_t width, float* to) {
  for (std::int64_t k = 0; k < width; ++k)
    for (std::int64_t i = 0; i < kLanes; ++i)
      to[k * kLanes + i] = from != nullptr && i < c.count ? from[i * width + k] : 0.0F;
}
inline const float* window(const FloatConv& p, const float* states, std::int64_t b,
                           std::int64_t first) {
  return states == nullptr ? nullptr : states + (b * p.channels + first) * p.width;
}

// Channels from `first` on, before `end`; `scratch` is that of the group, `at` the place in it.
inline Taps taps_at(const FloatConv& p, std::int64_t first, std::int64_t at, std::int64_t end,
                    float* scratch) {
  float* free = scratch + scratch_size(p.width, at);
  const auto take = [&](std::int64_t rows) {
    float* const rows_begin = free;
    free += rows * kLanes;
    return rows_begin;
  };
  Taps c;
  c.first = first + at;
  c.count = end - c.first < kLanes ? end - c.first : kLanes;
  c.bias = p.bias == nullptr ? Vec{} : load_some(p.bias + c.first, c.count);
  c.weight = take(p.width);
  c.before = take(p.width);
  c.inputs = take(p.width - 1 + kTile);
  c.dpre = take(p.width - 1 + kTile);
  c.dweight = take(p.width);
  c.dafter = take(p.width);
  return c;
}
inline void begin_channels(const FloatConv& p, const Taps& c, std::int64_t b) {
  gather(p.weight + c.first * p.width, c, p.width, c.weight);
  gather(window(p, p.state_in, b, c.first), c, p.width, c.before);
}

// The inputs of `count` tokens from t on, and the width - 1 before them.
inline void read_inputs(const FloatConv& p, const Taps& c, std::int64_t b, std::int64_t t,
                        std::int64_t count) {
  const float* const x = p.x + b * p.seqlen * p.x_stride + c.first;
  float* to = c.inputs;
  for (std::int64_t r = t - (p.width - 1); r < t + count; ++r, to += kLanes)
    store(to,
          r < 0 ? load(c.before + (p.width + r) * kLanes) : load_some(x + r * p.x_stride, c.count));
}

// What tokens i, .. of the tile are before the activation.
LRNN_INLINE void convolve(const FloatConv& p, const Taps& c, std::int64_t i, Vec* pre,
                          const int count) {
  LRNN_EACH pre[j] = c.bias;
  for (std::int64_t k = 0; k < p.width; ++k) {
    const Vec weight = load(c.weight + k * kLanes);
    const float* const inputs = c.inputs + (i + k) * kLanes;
    LRNN_EACH pre[j] += weight * load(inputs + j * kLanes);
  }
}

LRNN_INLINE void write_tokens(const FloatConvForward& p, const Taps& c, std::int64_t row,
                              std::int64_t i, const int count) {
  Vec pre[kTokens];
  convolve(p.in, c, i, pre, count);
  if (p.in.silu) {
    Vec gate[kTokens];
    LRNN_EACH gate[j] = pre[j];
    sigmoid(gate, count);
    LRNN_EACH pre[j] *= gate[j];
  }
  LRNN_EACH store_some(p.y + (row + i + j) * p.y_stride + c.first, pre[j], c.count);
}

inline std::int64_t between(std::int64_t v, std::int64_t most) {
  return v < 0 ? 0 : v < most ? v : most;
}

// Sequence b, `channels` channels from `first` on.
void run(const FloatConvForward& p, std::int64_t b, std::int64_t first, std::int64_t channels,
         float* scratch) {
  const FloatConv& in = p.in;
  const std::int64_t length = in.lengths != nullptr ? in.lengths[b] : in.seqlen;
  const auto each = [&](const auto& f) {
    for (std::int64_t at = 0; at < channels; at += kLanes)
      f(taps_at(in, first, at, first + channels, scratch));
  };
  each([&](const Taps& c) { begin_channels(in, c, b); });
  for (std::int64_t t = 0; t < in.seqlen; t += kTile) {
    const std::int64_t row = b * in.seqlen + t;
    const std::int64_t tokens = between(in.seqlen - t, kTile);
    const std::int64_t valid = between(length - t, kTile);
    const std::int64_t next = between(in.seqlen - t - kTile, kTile);
    each([&](const Taps& c) {
      prefetch_rows(in.x + (row + kTile) * in.x_stride + c.first, in.x_stride, next);
      prefetch_rows(p.y + (row + kTile) * p.y_stride + c.first, p.y_stride, next);
      read_inputs(in, c, b, t, valid);
      std::int64_t i = 0;
      for (; i + kTokens <= valid; i += kTokens) write_tokens(p, c, row, i, kTokens);
      for (; i < valid; ++i) write_tokens(p, c, row, i, 1);
      for (; i < tokens; ++i) store_some(p.y + (row + i) * p.y_stride + c.first, Vec{}, c.count);
    });
  }
}

// The gradients before the activation of tokens i, .. of the tile, and their parts of the sums.
LRNN_INLINE Vec read_gradients(const FloatConvBackward& p, const Taps& c, std::int64_t row,
                               std::int64_t i, const int count) {
  Vec d[kTokens];
  LRNN_EACH d[j] = load_some(p.dy + (row + i + j) * p.dy_stride + c.first, c.count);
  if (p.in.silu) {
    Vec pre[kTokens];
    Vec gate[kTokens];
    Vec rest[kTokens];
    convolve(p.in, c, i, pre, count);
    LRNN_EACH gate[j] = pre[j];
    sigmoid(gate, rest, count);
    LRNN_EACH d[j] *= gate[j] * (1.0F + pre[j] * rest[j]);
  }
  Vec sum{};
  LRNN_EACH {
    store(c.dpre + (i + j) * kLanes, d[j]);
    sum += d[j];
  }
  for (std::int64_t k = 0; k < p.in.width; ++k) {
    const float* const inputs = c.inputs + (i + k) * kLanes;
    Vec part = load(c.dweight + k * kLanes);
    LRNN_EACH part += d[j] * load(inputs + j * kLanes);
    store(c.dweight + k * kLanes, part);
  }
  return sum;
}

// The gradients of inputs i, .. of the tile.
LRNN_INLINE void spread(const FloatConv& p, const Taps& c, std::int64_t i, Vec* dx,
                        const int count) {
  LRNN_EACH dx[j] = Vec{};
  for (std::int64_t k = 0; k < p.width; ++k) {
    const Vec weight = load(c.weight + (p.width - 1 - k) * kLanes);
    const float* const dpre = c.dpre + (i + k) * kLanes;
    LRNN_EACH dx[j] += weight * load(dpre + j * kLanes);
  }
}
LRNN_INLINE void write_gradients(const FloatConvBackward& p, const Taps& c, std::int64_t row,
                                 std::int64_t i, std::int64_t slot, const int count) {
  Vec dx[kTokens];
  spread(p.in, c, i, dx, count);
  LRNN_EACH {
    if (slot + j >= 0) dx[j] += load(c.dafter + (slot + j) * kLanes);
    store_some(p.dx + (row + i + j) * p.dx_stride + c.first, dx[j], c.count);
  }
}

// The gradients of the inputs before the first; dpre is that of the first tile.
inline void write_dstate(const FloatConvBackward& p, const Taps& c, std::int64_t b,
                         std::int64_t length) {
  const std::int64_t width = p.in.width;
  float* const to = p.dstate_in + (b * p.in.channels + c.first) * width;
  for (std::int64_t k = 0; k < width; ++k) {
    Vec d = k >= length ? load(c.dafter + (k - length) * kLanes) : Vec{};
    for (std::int64_t t = 0; t < k && t < length; ++t)
      d += load(c.weight + (k - 1 - t) * kLanes) * load(c.dpre + t * kLanes);
    for (std::int64_t i = 0; i < c.count; ++i) to[i * width + k] = d[i];
  }
}

// The `count` tokens from t on, of which the sequence has `length`. dpre holds that of the tokens
// after them on entry.
inline Vec backward_tile(const FloatConvBackward& p, const Taps& c, std::int64_t b, std::int64_t t,
                         std::int64_t count, std::int64_t length) {
  const FloatConv& in = p.in;
  const std::int64_t row = b * in.seqlen + t;
  const std::int64_t slot = t - (length - in.width);  // of the final window, for the first token
  for (std::int64_t k = in.width - 2; k >= 0; --k)
    store(c.dpre + (count + k) * kLanes, load(c.dpre + k * kLanes));
  read_inputs(in, c, b, t, count);
  Vec sum{};
  std::int64_t i = 0;
  for (; i + kTokens <= count; i += kTokens) sum += read_gradients(p, c, row, i, kTokens);
  for (; i < count; ++i) sum += read_gradients(p, c, row, i, 1);
  i = 0;
  for (; i + kTokens <= count; i += kTokens) write_gradients(p, c, row, i, slot + i, kTokens);
  for (; i < count; ++i) write_gradients(p, c, row, i, slot + i, 1);
  return sum;
}

void run_backward(const FloatConvBackward& p, std::int64_t b, std::int64_t first,
                  std::int64_t channels, float* scratch) {
  const FloatConv& in = p.in;
  const std::int64_t length = in.lengths != nullptr ? in.lengths[b] : in.seqlen;
  Vec dbias[kGroup / kLanes] = {};
  const auto each = [&](const auto& f) {
    for (std::int64_t at = 0; at < channels; at += kLanes)
      f(taps_at(in, first, at, first + channels, scratch), dbias[at / kLanes]);
  };
  each([&](const Taps& c, const Vec&) {
    begin_channels(in, c, b);
    gather(window(in, p.dstate_out, b, c.first), c, in.width, c.dafter);
    gather(nullptr, c, in.width, c.dweight);
    for (std::int64_t k = 0; k < in.width - 1 + kTile; ++k) store(c.dpre + k * kLanes, Vec{});
    for (std::int64_t t = length; t < in.seqlen; ++t)
      store_some(p.dx + (b * in.seqlen + t) * p.dx_stride + c.first, Vec{}, c.count);
  });
  for (std::int64_t t = (length - 1) / kTile * kTile; t >= 0 && length > 0; t -= kTile)
    each([&](const Taps& c, Vec& sum) {
      const std::int64_t row = b * in.seqlen + t - kTile;
      const std::int64_t next = t > 0 ? kTile : 0;
      prefetch_rows(in.x + row * in.x_stride + c.first, in.x_stride, next);
      prefetch_rows(p.dy + row * p.dy_stride + c.first, p.dy_stride, next);
      prefetch_rows(p.dx + row * p.dx_stride + c.first, p.dx_stride, next);
      sum += backward_tile(p, c, b, t, between(length - t, kTile), length);
    });
  each([&](const Taps& c, const Vec& sum) {
    if (p.dstate_in != nullptr) write_dstate(p, c, b, length);
    for (std::int64_t i = 0; i < c.count; ++i) {
      float* const to = p.sums + (b * in.channels + c.first + i) * (in.width + 1);
      for (std::int64_t k = 0; k < in.width; ++k) to[k] = c.dweight[k * kLanes + i];
      to[in.width] = sum[i];
    }
  });
}

}  // namespace LRNN_ISA
