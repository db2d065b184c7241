// The backward pass in float with the discretization of Mamba, after
// selective_scan_float_kernel.hpp, once per instruction set, under the same rules.
namespace LRNN_ISA {

constexpr float kLn2 = 0.6931471805599453F;

// A vector of channels in a group. A is times log2(e); A, g and dA are [N, kLanes].
struct Channels {
  std::int64_t first, count;
  float *A, *g, *dA;
  Vec bias, D, dbias, dD;
};

// Scratch of a work item: of the group, then of one chunk of a vector of channels, then the parts
// of dB and dC that its channels have added so far.
struct Work {
  float *A, *g, *dA;  // [kFloatGroup, N]
  float *dbias, *dD;  // [kFloatGroup]
  float* h;           // [kSelectiveScanChunk + 1, N, kLanes]; h[0] enters the chunk
  float* a;           // [kSelectiveScanChunk, N, kLanes]
  float *y, *delta;   // [kSelectiveScanChunk, kLanes]
  float* dBC;         // [kSelectiveScanChunk, 2 N, kLanes]
};

inline float* take(float*& from, std::int64_t count) {
  float* const p = from;
  from += count;
  return p;
}
inline Work divide(float* scratch, std::int64_t dstate) {
  const std::int64_t vector = dstate * kLanes;
  Work w;
  w.A = take(scratch, kFloatGroup * dstate);
  w.g = take(scratch, kFloatGroup * dstate);
  w.dA = take(scratch, kFloatGroup * dstate);
  w.dbias = take(scratch, kFloatGroup);
  w.dD = take(scratch, kFloatGroup);
  w.h = take(scratch, (kSelectiveScanChunk + 1) * vector);
  w.a = take(scratch, kSelectiveScanChunk * vector);
  w.y = take(scratch, kSelectiveScanChunk * kLanes);
  w.delta = take(scratch, kSelectiveScanChunk * kLanes);
  take(scratch, kFloatSkew);
  w.dBC = take(scratch, kSelectiveScanChunk * 2 * vector);
  return w;
}

// Element (channel, n) of [E, N], or zeros.
inline void gather(const float* from, const Channels& c, std::int64_t dstate, float* to) {
  for (std::int64_t n = 0; n < dstate; ++n)
    for (std::int64_t i = 0; i < kLanes; ++i)
      to[n * kLanes + i] = i < c.count && from != nullptr ? from[(c.first + i) * dstate + n] : 0.0F;
}
inline void scatter(const float* from, const Channels& c, std::int64_t dstate, float* to) {
  for (std::int64_t i = 0; i < c.count; ++i)
    for (std::int64_t n = 0; n < dstate; ++n) to[(c.first + i) * dstate + n] = from[n * kLanes + i];
}

inline Channels channels_of(const FloatScanBackward& p, const Work& w, std::int64_t first,
                            std::int64_t at) {
  const FloatScan& in = p.in;
  const std::int64_t left = in.channels - (first + at);
  Channels c;
  c.first = first + at;
  c.count = left < kLanes ? left : kLanes;
  c.A = w.A + at * in.dstate;
  c.g = w.g + at * in.dstate;
  c.dA = w.dA + at * in.dstate;
  c.bias = load_some(in.dt_bias + c.first, c.count);
  c.D = in.D == nullptr ? Vec{} : load_some(in.D + c.first, c.count);
  c.dbias = load(w.dbias + at);
  c.dD = load(w.dD + at);
  return c;
}

// Runs `count` tokens from row `row`, token i of the chunk, forward and keeps all that retrace()
// reads.
__attribute__((always_inline)) inline void recompute(const FloatScan& in, const Work& w,
                                                     const Channels& c, std::int64_t row,
                                                     std::int64_t i, const int count) {
  const std::int64_t vector = in.dstate * kLanes;
  const float* const B = in.B + row * in.B_stride;
  const float* const C = in.C + row * in.C_stride;
  Vec delta[kTokens];
  Vec drive[kTokens];
  Vec y[kTokens];
  LRNN_UNROLL
  for (int j = 0; j < count; ++j) {
    const Vec u = load_some(in.u + (row + j) * in.u_stride + c.first, c.count);
    delta[j] = softplus(load_some(in.dt + (row + j) * in.dt_stride + c.first, c.count) + c.bias);
    drive[j] = delta[j] * u;
    y[j] = c.D * u;
    store(w.delta + (i + j) * kLanes, delta[j]);
  }
  for (std::int64_t n = 0; n < in.dstate; ++n) {
    const Vec A = load(c.A + n * kLanes);
    float* const h = w.h + i * vector + n * kLanes;
    float* const kept = w.a + i * vector + n * kLanes;
    Vec state = load(h);
    LRNN_UNROLL
    for (int j = 0; j < count; ++j) {
      const Vec a = exp2_of_negative(delta[j] * A);
      state = a * state + drive[j] * B[j * in.B_stride + n];
      y[j] += state * C[j * in.C_stride + n];
      store(kept + j * vector, a);
      store(h + (j + 1) * vector, state);
    }
  }
  LRNN_UNROLL
  for (int j = 0; j < count; ++j) store(w.y + (i + j) * kLanes, y[j]);
}

// The gradient of y before the gate; writes that of z.
inline Vec ungate(const FloatScanBackward& p, const Work& w, const Channels& c, std::int64_t row,
                  std::int64_t i) {
  const Vec dy = load_some(p.dy + row * p.dy_stride + c.first, c.count);
  if (p.dz == nullptr) return dy;
  const Vec z = load_some(p.in.z + row * p.in.z_stride + c.first, c.count);
  const Vec s = 1.0F / (1.0F + exp(-z));
  store_some(p.dz + row * p.dz_stride + c.first,
             dy * load(w.y + i * kLanes) * s * (1.0F + z * (1.0F - s)), c.count);
  return dy * (z * s);
}

// `count` tokens backward. g holds a_{t+1} g_{t+1} of the token after them on entry, and that of
// the first of them on return.
__attribute__((always_inline)) inline void retrace(const FloatScanBackward& p, const Work& w,
                                                   Channels& c, std::int64_t row, std::int64_t i,
                                                   const int count) {
  const FloatScan& in = p.in;
  const std::int64_t vector = in.dstate * kLanes;
  const float* const B = in.B + row * in.B_stride;
  const float* const C = in.C + row * in.C_stride;
  Vec dy[kTokens];
  Vec u[kTokens];
  Vec delta[kTokens];
  Vec drive[kTokens];
  Vec ddrive[kTokens];  // sum over n of g B
  Vec dlog[kTokens];    // sum over n of the gradient of delta A, times A
  LRNN_UNROLL
  for (int j = 0; j < count; ++j) {
    dy[j] = ungate(p, w, c, row + j, i + j);
    u[j] = load_some(in.u + (row + j) * in.u_stride + c.first, c.count);
    delta[j] = load(w.delta + (i + j) * kLanes);
    drive[j] = delta[j] * u[j];
    ddrive[j] = Vec{};
    dlog[j] = Vec{};
  }
  for (std::int64_t n = 0; n < in.dstate; ++n) {
    const Vec A = load(c.A + n * kLanes);
    const float* const a = w.a + i * vector + n * kLanes;
    const float* const h = w.h + i * vector + n * kLanes;
    float* const dB = w.dBC + i * 2 * vector + n * kLanes;
    float* const dC = dB + vector;
    Vec g = load(c.g + n * kLanes);
    Vec dA = load(c.dA + n * kLanes);
    Vec after = load(h + count * vector);
    LRNN_UNROLL
    for (int j = count - 1; j >= 0; --j) {
      const Vec before = load(h + j * vector);
      g += dy[j] * C[j * in.C_stride + n];
      store(dC + j * 2 * vector, load(dC + j * 2 * vector) + dy[j] * after);
      store(dB + j * 2 * vector, load(dB + j * 2 * vector) + g * drive[j]);
      ddrive[j] += g * B[j * in.B_stride + n];
      g *= load(a + j * vector);
      const Vec dexponent = g * before;
      dlog[j] += dexponent * A;
      dA += dexponent * delta[j];
      after = before;
    }
    store(c.g + n * kLanes, g);
    store(c.dA + n * kLanes, dA);
  }
  LRNN_UNROLL
  for (int j = count - 1; j >= 0; --j) {
    const Vec raw = load_some(in.dt + (row + j) * in.dt_stride + c.first, c.count) + c.bias;
    const Vec ddt = (u[j] * ddrive[j] + dlog[j] * kLn2) / (1.0F + exp(-raw));
    store_some(p.ddt + (row + j) * p.ddt_stride + c.first, ddt, c.count);
    store_some(p.du + (row + j) * p.du_stride + c.first, c.D * dy[j] + delta[j] * ddrive[j],
               c.count);
    c.dbias += ddt;
    c.dD += dy[j] * u[j];
  }
}

// Tokens [t, t + count) of a chunk that starts at t, through one vector of channels.
inline void chunk_of_channels(const FloatScanBackward& p, const Work& w, Channels& c,
                              std::int64_t b, std::int64_t t, std::int64_t count) {
  const FloatScan& in = p.in;
  const std::int64_t row = b * in.seqlen + t;
  const std::int64_t chunk = b * in.chunks + t / kSelectiveScanChunk;
  gather(p.chunk_states + chunk * in.channels * in.dstate, c, in.dstate, w.h);
  std::int64_t i = 0;
  for (; i + kTokens <= count; i += kTokens) recompute(in, w, c, row + i, i, kTokens);
  for (; i < count; ++i) recompute(in, w, c, row + i, i, 1);
  for (; i % kTokens != 0; --i) retrace(p, w, c, row + i - 1, i - 1, 1);
  for (; i > 0; i -= kTokens) retrace(p, w, c, row + i - kTokens, i - kTokens, kTokens);
}

// `count` groups of 2 `half` floats at `from` become groups of `half` at `to`, which may be `from`.
__attribute__((always_inline)) inline void add_halves(const float* from, float* to,
                                                      std::int64_t count, const int half) {
  for (std::int64_t i = 0; i < count; ++i) {
    float sums[kLanes];
    for (int l = 0; l < half; ++l) sums[l] = from[2 * i * half + l] + from[(2 * i + 1) * half + l];
    for (int l = 0; l < half; ++l) to[i * half + l] = sums[l];
  }
}

// Adds up the lanes of the parts of dB and dC of `count` tokens.
inline void write_parts(const Work& w, std::int64_t count, std::int64_t dstate, float* dBC) {
  const std::int64_t sums = count * 2 * dstate;
  if (kLanes >= 16) add_halves(w.dBC, w.dBC, sums, 8);
  if (kLanes >= 8) add_halves(w.dBC, w.dBC, sums, 4);
  add_halves(w.dBC, w.dBC, sums, 2);
  add_halves(w.dBC, dBC, sums, 1);
}

inline void clear_padding(const FloatScanBackward& p, std::int64_t first, std::int64_t row,
                          std::int64_t end) {
  const std::int64_t left = p.in.channels - first;
  const std::int64_t last = first + (left < kFloatGroup ? left : kFloatGroup);
  for (; row < end; ++row)
    for (std::int64_t e = first; e < last; ++e) {
      p.du[row * p.du_stride + e] = 0.0F;
      p.ddt[row * p.ddt_stride + e] = 0.0F;
      if (p.dz != nullptr) p.dz[row * p.dz_stride + e] = 0.0F;
    }
}

// Sequence b, group `group` of channels.
void run_backward(const FloatScanBackward& p, std::int64_t b, std::int64_t group, float* scratch) {
  const FloatScan& in = p.in;
  const Work w = divide(scratch, in.dstate);
  const std::int64_t first = group * kFloatGroup;
  const std::int64_t state = b * in.channels * in.dstate;
  const std::int64_t part = (b * p.groups + group) * in.seqlen;
  const std::int64_t length = in.lengths != nullptr ? in.lengths[b] : in.seqlen;
  const auto each = [&](const auto& f) {
    for (std::int64_t at = 0; at < kFloatGroup && first + at < in.channels; at += kLanes) {
      Channels c = channels_of(p, w, first, at);
      f(c);
      store(w.dbias + at, c.dbias);
      store(w.dD + at, c.dD);
    }
  };
  for (std::int64_t e = 0; e < kFloatGroup; ++e) w.dbias[e] = w.dD[e] = 0.0F;
  each([&](const Channels& c) {
    gather(in.A_log, c, in.dstate, c.A);
    gather(p.dstate_out == nullptr ? nullptr : p.dstate_out + state, c, in.dstate, c.g);
    gather(nullptr, c, in.dstate, c.dA);
    for (std::int64_t i = 0; i < in.dstate * kLanes; i += kLanes)
      store(c.A + i, -exp(load(c.A + i)) * kLog2e);
  });
  clear_padding(p, first, b * in.seqlen + length, (b + 1) * in.seqlen);
  for (std::int64_t t = (length - 1) / kSelectiveScanChunk * kSelectiveScanChunk; t >= 0;
       t -= kSelectiveScanChunk) {
    const std::int64_t left = length - t;
    const std::int64_t count = left < kSelectiveScanChunk ? left : kSelectiveScanChunk;
    for (std::int64_t i = 0; i < count * 2 * in.dstate; ++i) store(w.dBC + i * kLanes, Vec{});
    each([&](Channels& c) { chunk_of_channels(p, w, c, b, t, count); });
    write_parts(w, count, in.dstate, p.dBC + (part + t) * 2 * in.dstate);
  }
  each([&](const Channels& c) {
    for (std::int64_t i = 0; i < in.dstate * kLanes; i += kLanes)  // dA_log = dA A
      store(c.dA + i, load(c.dA + i) * load(c.A + i) * kLn2);
    scatter(c.dA, c, in.dstate, p.dA_log + state);
    if (p.dstate_in != nullptr) scatter(c.g, c, in.dstate, p.dstate_in + state);
    store_some(p.dvectors + b * 3 * in.channels + c.first, c.dbias, c.count);
    store_some(p.dvectors + (b * 3 + 1) * in.channels + c.first, c.dD, c.count);
  });
}

}  // namespace LRNN_ISA
