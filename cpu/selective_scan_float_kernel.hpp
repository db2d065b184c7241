// The forward pass in float with the discretization of Mamba, for vectors of LRNN_LANES floats.
// No include guard: selective_scan_float.cpp includes it once per instruction set, with LRNN_LANES,
// the namespace LRNN_ISA and LRNN_MAX(a, b), which is b if one is NaN, and picks one at run time.
// It therefore uses no template and no inline function from elsewhere: the linker might keep a copy
// for the wrong instruction set.
namespace LRNN_ISA {

constexpr int kLanes = LRNN_LANES;
constexpr int kVectors = kFloatChannels / kLanes;
constexpr int kTokens = 4;                    // pass through a state while it is in a register
constexpr std::int64_t kAhead = 4 * kTokens;  // tokens from a prefetch to its use

using Vec = float __attribute__((vector_size(sizeof(float) * kLanes)));
using Int = std::int32_t __attribute__((vector_size(sizeof(float) * kLanes)));

// Rounds to the nearest integer what is below 2^22 in magnitude, which its low bits then hold.
constexpr float kRound = 12582912.0F;
constexpr float kLog2e = 1.4426950408889634F;

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
// A bound keeps NaN.
inline Vec at_least(Vec v, float low) {
  return LRNN_MAX(low - Vec{}, v);
}
inline Vec at_most(Vec v, float high) {
  return -LRNN_MAX(-high - Vec{}, -v);
}
// p 2^n, where n is in the low bits of `rounded`.
inline Vec scale(Vec p, Vec rounded) {
  return reinterpret_cast<Vec>(reinterpret_cast<Int>(p) + (reinterpret_cast<Int>(rounded) << 23));
}

// 2^x for x <= 0; relative error of the polynomial 2e-9. 2^-125 for all below.
inline Vec exp2_of_negative(Vec x) {
  const Vec v = at_least(x, -125.0F);
  const Vec n = v + kRound;
  const Vec f = v - (n - kRound);
  Vec p = f * 1.5353362e-4F + 1.3398874e-3F;
  p = p * f + 9.618437e-3F;
  p = p * f + 5.5503324e-2F;
  p = p * f + 2.4022648e-1F;
  p = p * f + 6.931472e-1F;
  return scale(p * f + 1.0F, n);
}

// e^x, with ln 2 in two parts; relative error of the polynomial 5e-11.
inline Vec exp(Vec x) {
  const Vec v = at_most(at_least(x, -86.0F), 86.0F);
  const Vec n = v * kLog2e + kRound;
  const Vec k = n - kRound;
  const Vec f = (v - k * 0.693359375F) + k * 2.12194440e-4F;
  Vec p = f * 1.9767632e-4F + 1.3945906e-3F;
  p = p * f + 8.333569e-3F;
  p = p * f + 4.1666273e-2F;
  p = p * f + 1.6666666e-1F;
  p = p * f + 0.5F;
  p = p * f + 1.0F;
  return scale(p * f + 1.0F, n);
}

// max(x, 0) + log1p(e), e = exp(-|x|), by log1p(e) = 2 atanh(s), s = e / (2 + e): a polynomial in
// s^2 <= 1/9 with relative error 4e-9.
inline Vec softplus(Vec x) {
  const Vec e = exp(x > 0.0F ? -x : x);
  const Vec s = e / (2.0F + e);
  const Vec w = s * s;
  Vec p = w * 0.281577784F + 0.279651577F;
  p = p * w + 0.400245952F;
  p = p * w + 0.666663216F;
  p = p * w + 2.0F;
  return p * s + at_least(x, 0.0F);
}

// Runs `count` <= kTokens tokens from row `row` on through all states of a vector of channels and
// leaves sum C h in y. A is times log2(e). Inlined, so that `count` is a constant.
__attribute__((always_inline)) inline void advance(const FloatScan& p, std::int64_t row,
                                                   const int count, const float* A, float* h,
                                                   const Vec* delta, const Vec* drive, Vec* y) {
  const float* const B = p.B + row * p.B_stride;
  const float* const C = p.C + row * p.C_stride;
  for (int j = 0; j < count; ++j) y[j] = Vec{};
  for (std::int64_t n = 0; n < p.dstate; ++n) {
    const Vec a = load(A + n * kFloatChannels);
    Vec state = load(h + n * kFloatChannels);
    for (int j = 0; j < count; ++j) {
      state = exp2_of_negative(delta[j] * a) * state + drive[j] * B[j * p.B_stride + n];
      y[j] += state * C[j * p.C_stride + n];
    }
    store(h + n * kFloatChannels, state);
  }
}

// `count` <= kLanes floats; the rest is zero.
inline Vec load_some(const float* p, std::int64_t count) {
  if (count >= kLanes) return load(p);
  float v[kLanes] = {};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return load(v);
}
inline void store_some(float* p, Vec v, std::int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int i = 0; i < count; ++i) p[i] = v[i];
}

// The tokens [t, t + count) of `channels` channels from `first` on; A and h begin with these.
__attribute__((always_inline)) inline void run_tokens(const FloatScan& p, std::int64_t row,
                                                      const int count, std::int64_t first,
                                                      std::int64_t channels, const float* A,
                                                      float* h) {
  const Vec bias = load_some(p.dt_bias + first, channels);
  const Vec D = p.D == nullptr ? Vec{} : load_some(p.D + first, channels);
  Vec delta[kTokens];
  Vec u[kTokens];
  Vec drive[kTokens];
  Vec y[kTokens];
  for (int j = 0; j < count; ++j) {
    delta[j] = softplus(load_some(p.dt + (row + j) * p.dt_stride + first, channels) + bias);
    u[j] = load_some(p.u + (row + j) * p.u_stride + first, channels);
    drive[j] = delta[j] * u[j];
  }
  advance(p, row, count, A, h, delta, drive, y);
  for (int j = 0; j < count; ++j) {
    Vec out = y[j] + D * u[j];
    if (p.z != nullptr) {
      const Vec z = load_some(p.z + (row + j) * p.z_stride + first, channels);
      out *= z / (1.0F + exp(-z));
    }
    store_some(p.y + (row + j) * p.y_stride + first, out, channels);
  }
}

// Rows are further apart than pages are long, so that the hardware fetches none ahead.
inline void prefetch_rows(const float* p, std::int64_t stride, std::int64_t first, std::int64_t row,
                          std::int64_t end) {
  if (p == nullptr) return;
  for (std::int64_t r = row; r < row + kTokens && r < end; ++r)
    __builtin_prefetch(p + r * stride + first);
}

// States of `channels` channels, to [E, N].
inline void write_states(const FloatScan& p, const float* h, std::int64_t channels, float* to) {
  for (std::int64_t i = 0; i < channels; ++i)
    for (std::int64_t n = 0; n < p.dstate; ++n) to[i * p.dstate + n] = h[n * kFloatChannels + i];
}

inline std::int64_t channels_of(const FloatScan& p, std::int64_t first) {
  const std::int64_t left = p.channels - first;
  return left < kFloatChannels ? left : kFloatChannels;
}

// A times log2(e) and the first states of sequence b, for the channels from `first` on.
inline void begin_group(const FloatScan& p, std::int64_t b, std::int64_t first, float* A, float* h) {
  const std::int64_t channels = channels_of(p, first);
  const std::int64_t begin = first * p.dstate;
  for (std::int64_t i = 0; i < kFloatChannels; ++i)
    for (std::int64_t n = 0; n < p.dstate; ++n) {
      const std::int64_t from = begin + i * p.dstate + n;
      A[n * kFloatChannels + i] = i < channels ? p.A_log[from] : 0.0F;
      h[n * kFloatChannels + i] = i < channels && p.state_in != nullptr
                                      ? p.state_in[b * p.channels * p.dstate + from]
                                      : 0.0F;
    }
  for (std::int64_t i = 0; i < p.dstate * kFloatChannels; i += kLanes)
    store(A + i, -exp(load(A + i)) * kLog2e);
}

// The tokens [t, end) of sequence b and the channels from `first` on. `t` is a multiple of kTokens.
inline void run_group(const FloatScan& p, std::int64_t b, std::int64_t first, std::int64_t t,
                      std::int64_t end, const float* A, float* h) {
  const std::int64_t channels = channels_of(p, first);
  const std::int64_t length = p.lengths != nullptr ? p.lengths[b] : p.seqlen;
  while (t < end) {
    if (p.chunk_states != nullptr && t % kSelectiveScanChunk == 0)
      write_states(p, h, channels,
                   p.chunk_states +
                       ((b * p.chunks + t / kSelectiveScanChunk) * p.channels + first) * p.dstate);
    const std::int64_t row = b * p.seqlen + t;
    const bool full = t + kTokens <= length;
    if (t >= length) {
      for (std::int64_t i = 0; i < channels; ++i) p.y[row * p.y_stride + first + i] = 0.0F;
    } else {
      const std::int64_t rows = (b + 1) * p.seqlen;
      prefetch_rows(p.u, p.u_stride, first, row + kAhead, rows);
      prefetch_rows(p.dt, p.dt_stride, first, row + kAhead, rows);
      prefetch_rows(p.z, p.z_stride, first, row + kAhead, rows);
      prefetch_rows(p.y, p.y_stride, first, row + kAhead, rows);
      for (int v = 0; v < kVectors && v * kLanes < channels; ++v) {
        const int at = v * kLanes;
        if (full)
          run_tokens(p, row, kTokens, first + at, channels - at, A + at, h + at);
        else
          run_tokens(p, row, 1, first + at, channels - at, A + at, h + at);
      }
    }
    t += full ? kTokens : 1;
  }
}

// Sequence b, `groups` times kFloatChannels channels from `first` on. Tokens lie kilobytes apart, so
// that each operand of each token is on a page of its own: a tile of tokens goes through all groups
// before the next one, and the pages stay known. `scratch` has room for two times N kFloatChannels
// per group.
void run(const FloatScan& p, std::int64_t b, std::int64_t first, std::int64_t groups,
         float* scratch) {
  constexpr std::int64_t kTile = kAhead;  // its prefetches are for the next tile
  static_assert(kSelectiveScanChunk % kTile == 0);
  const std::int64_t size = p.dstate * kFloatChannels;
  for (std::int64_t g = 0; g < groups; ++g)
    begin_group(p, b, first + g * kFloatChannels, scratch + 2 * g * size,
                scratch + (2 * g + 1) * size);
  for (std::int64_t t = 0; t < p.seqlen; t += kTile) {
    const std::int64_t end = t + kTile < p.seqlen ? t + kTile : p.seqlen;
    for (std::int64_t g = 0; g < groups; ++g)
      run_group(p, b, first + g * kFloatChannels, t, end, scratch + 2 * g * size,
                scratch + (2 * g + 1) * size);
  }
  if (p.state_out == nullptr) return;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t from = first + g * kFloatChannels;
    write_states(p, scratch + (2 * g + 1) * size, channels_of(p, from),
                 p.state_out + (b * p.channels + from) * p.dstate);
  }
}

}  // namespace LRNN_ISA
