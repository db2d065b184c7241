// The backward pass in float with the discretization of Mamba, after
// selective_scan_float_kernel.hpp, once per instruction set: see common/isa.hpp.
#include "selective_scan_float_kernel.hpp"
namespace LRNN_ISA {

constexpr float kLn2 = 0.6931471805599453F;

// A vector of channels in a group. A is times log2(e); A, g and dA are [N, kLanes].
struct BackwardChannels {
  std::int64_t first, count;
  std::int64_t at;  // of the first in the group
  float *A, *g, *dA;
  Vec bias, D, dbias, dD;
};

// Scratch of a group, then of one chunk of a vector of its channels, then the parts of dB and dC
// that its channels have added so far.
struct Work {
  float *A, *g, *dA;  // [kFloatGroup, N]
  float *dbias, *dD;  // [kFloatGroup]
  float* h;           // [kSelectiveScanChunk + 1, N, kLanes]; h[0] enters the chunk
  float* a;           // [kSelectiveScanChunk, N, kLanes]
  float *y, *delta;   // [kSelectiveScanChunk, kLanes]
  float* rows;        // [7, kSelectiveScanChunk, kRowStride]: see rows_of()
  float* dBC;         // [kSelectiveScanChunk / kTokens, N, kFloatParts]: see add_lanes()
};

// The rows of a chunk of all channels of the group, read before and written after it.
enum Operand { kU, kDt, kZ, kDy, kDu, kDdt, kDz };
inline float* rows_of(const Work& w, Operand operand) {
  return w.rows + operand * kSelectiveScanChunk * kRowStride;
}
inline float* row_of(const Work& w, Operand operand, const BackwardChannels& c, std::int64_t i) {
  return rows_of(w, operand) + i * kRowStride + c.at;
}

inline float* take(float*& from, std::int64_t count) {
  float* const p = from;
  from += count;
  return p;
}
// Group `index` of an item of `groups`, which use the scratch of a chunk in turn.
inline Work divide(float* scratch, std::int64_t dstate, std::int64_t index, std::int64_t groups) {
  const std::int64_t vector = dstate * kLanes;
  float* group = scratch + index * group_scratch(dstate);
  scratch += groups * group_scratch(dstate);
  Work w;
  w.A = take(group, kFloatGroup * dstate);
  w.g = take(group, kFloatGroup * dstate);
  w.dA = take(group, kFloatGroup * dstate);
  w.dbias = take(group, kFloatGroup);
  w.dD = take(group, kFloatGroup);
  w.h = take(scratch, (kSelectiveScanChunk + 1) * vector);
  w.a = take(scratch, kSelectiveScanChunk * vector);
  w.y = take(scratch, kSelectiveScanChunk * kLanes);
  w.delta = take(scratch, kSelectiveScanChunk * kLanes);
  w.rows = take(scratch, 7 * kSelectiveScanChunk * kRowStride);
  take(scratch, kFloatSkew);
  w.dBC = take(scratch, kSelectiveScanChunk / kTokens * dstate * kFloatParts);
  return w;
}

// Element (channel, n) of [E, N], or zeros.
inline void gather(const float* from, const BackwardChannels& c, std::int64_t dstate, float* to) {
  for (std::int64_t n = 0; n < dstate; ++n)
    for (std::int64_t i = 0; i < kLanes; ++i)
      to[n * kLanes + i] = i < c.count && from != nullptr ? from[(c.first + i) * dstate + n] : 0.0F;
}
inline void scatter(const float* from, const BackwardChannels& c, std::int64_t dstate, float* to) {
  for (std::int64_t i = 0; i < c.count; ++i)
    for (std::int64_t n = 0; n < dstate; ++n) to[(c.first + i) * dstate + n] = from[n * kLanes + i];
}

inline BackwardChannels channels_of(const FloatScanBackward& p, const Work& w, std::int64_t first,
                                    std::int64_t at) {
  const FloatScan& in = p.in;
  const std::int64_t left = in.channels - (first + at);
  BackwardChannels c;
  c.first = first + at;
  c.at = at;
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
LRNN_INLINE void recompute(const FloatScan& in, const Work& w, const BackwardChannels& c,
                           std::int64_t row, std::int64_t i, const int count) {
  const std::int64_t vector = in.dstate * kLanes;
  const float* const B = in.B + row * in.B_stride;
  const float* const C = in.C + row * in.C_stride;
  Vec delta[kTokens];
  Vec drive[kTokens];
  Vec y[kTokens];
  LRNN_EACH
  delta[j] = load(row_of(w, kDt, c, i + j)) + c.bias;
  softplus(delta, count);
  LRNN_EACH {
    const Vec u = load(row_of(w, kU, c, i + j));
    drive[j] = delta[j] * u;
    y[j] = c.D * u;
    store(w.delta + (i + j) * kLanes, delta[j]);
  }
  for (std::int64_t n = 0; n < in.dstate; ++n) {
    const Vec A = load(c.A + n * kLanes);
    float* const h = w.h + i * vector + n * kLanes;
    float* const kept = w.a + i * vector + n * kLanes;
    Vec state = load(h);
    Vec a[kTokens];
    LRNN_EACH a[j] = delta[j] * A;
    exp2_of_negative(a, count, false);
    LRNN_EACH {
      state = a[j] * state + drive[j] * B[j * in.B_stride + n];
      y[j] += state * C[j * in.C_stride + n];
      store(kept + j * vector, a[j]);
      store(h + (j + 1) * vector, state);
    }
  }
  LRNN_EACH store(w.y + (i + j) * kLanes, y[j]);
}

// The gradients of y before the gate; writes those of z.
LRNN_INLINE void ungate(const FloatScanBackward& p, const Work& w, const BackwardChannels& c,
                        std::int64_t i, Vec* dy, const int count) {
  LRNN_EACH dy[j] = load(row_of(w, kDy, c, i + j));
  if (p.dz == nullptr) return;
  Vec z[kTokens];
  Vec s[kTokens];
  LRNN_EACH s[j] = z[j] = load(row_of(w, kZ, c, i + j));
  sigmoid(s, count);
  LRNN_EACH {
    const Vec y = load(w.y + (i + j) * kLanes);
    store(row_of(w, kDz, c, i + j), dy[j] * y * s[j] * (1.0F + z[j] * (1.0F - s[j])));
    dy[j] *= z[j] * s[j];
  }
}

// `count` tokens backward. g holds a_{t+1} g_{t+1} of the token after them on entry, and that of
// the first of them on return.
LRNN_INLINE void retrace(const FloatScanBackward& p, const Work& w, BackwardChannels& c,
                         std::int64_t row, std::int64_t i, const int count) {
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
  ungate(p, w, c, i, dy, count);
  LRNN_EACH {
    u[j] = load(row_of(w, kU, c, i + j));
    delta[j] = load(w.delta + (i + j) * kLanes);
    drive[j] = delta[j] * u[j];
    ddrive[j] = Vec{};
    dlog[j] = Vec{};
  }
  for (std::int64_t n = 0; n < in.dstate; ++n) {
    const Vec A = load(c.A + n * kLanes);
    const float* const a = w.a + i * vector + n * kLanes;
    const float* const h = w.h + i * vector + n * kLanes;
    Vec parts[2 * kTokens] = {};  // of dB, then of dC
    Vec g = load(c.g + n * kLanes);
    Vec dA = load(c.dA + n * kLanes);
    Vec after = load(h + count * vector);
    LRNN_UNROLL
    for (int j = count - 1; j >= 0; --j) {
      const Vec before = load(h + j * vector);
      g += dy[j] * C[j * in.C_stride + n];
      parts[kTokens + j] = dy[j] * after;
      parts[j] = g * drive[j];
      ddrive[j] += g * B[j * in.B_stride + n];
      g *= load(a + j * vector);
      const Vec dexponent = g * before;
      dlog[j] += dexponent * A;
      dA += dexponent * delta[j];
      after = before;
    }
    store(c.g + n * kLanes, g);
    store(c.dA + n * kLanes, dA);
    // A single token is token i % kTokens of its group.
    float* const sums = w.dBC + (i / kTokens * in.dstate + n) * kFloatParts;
    add_lanes(parts, sums + 4 * (i % kTokens), count);
  }
  Vec slope[kTokens];  // of softplus
  LRNN_EACH slope[j] = load(row_of(w, kDt, c, i + j)) + c.bias;
  sigmoid(slope, count);
  LRNN_UNROLL
  for (int j = count - 1; j >= 0; --j) {
    const Vec ddt = (u[j] * ddrive[j] + dlog[j] * kLn2) * slope[j];
    store(row_of(w, kDdt, c, i + j), ddt);
    store(row_of(w, kDu, c, i + j), c.D * dy[j] + delta[j] * ddrive[j]);
    c.dbias += ddt;
    c.dD += dy[j] * u[j];
  }
}

// Tokens [t, t + count) of a chunk that starts at t, through one vector of channels.
inline void chunk_of_channels(const FloatScanBackward& p, const Work& w, BackwardChannels& c,
                              std::int64_t b, std::int64_t t, std::int64_t count) {
  const FloatScan& in = p.in;
  const std::int64_t row = b * in.seqlen + t;
  const std::int64_t chunk = b * in.chunks + t / kSelectiveScanChunk;
  gather(p.chunk_states + chunk * in.channels * in.dstate, c, in.dstate, w.h);
  std::int64_t i = 0;
  for (; i + kTokens <= count; i += kTokens) {
    recompute(in, w, c, row + i, i, kTokens);
  }
  for (; i < count; ++i) recompute(in, w, c, row + i, i, 1);
  for (; i % kTokens != 0; --i) retrace(p, w, c, row + i - 1, i - 1, 1);
  for (; i > 0; i -= kTokens) retrace(p, w, c, row + i - kTokens, i - kTokens, kTokens);
}

// The sums over the channels of the group for `count` tokens.
inline void write_parts(const Work& w, std::int64_t count, std::int64_t dstate, float* dBC) {
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t n = 0; n < dstate; ++n) {
      const float* const sums =
          w.dBC + (i / kTokens * dstate + n) * kFloatParts + 4 * (i % kTokens);
      dBC[i * 2 * dstate + n] = sums[0] + sums[1];
      dBC[(i * 2 + 1) * dstate + n] = sums[2] + sums[3];
    }
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

// Calls f of every vector of channels of group `group`, and keeps the sums in it.
template <class F>
void for_each_vector(const FloatScanBackward& p, const Work& w, std::int64_t group, const F& f) {
  const std::int64_t first = group * kFloatGroup;
  for (std::int64_t at = 0; at < kFloatGroup && first + at < p.in.channels; at += kLanes) {
    BackwardChannels c = channels_of(p, w, first, at);
    f(c);
    store(w.dbias + at, c.dbias);
    store(w.dD + at, c.dD);
  }
}

inline void begin_group(const FloatScanBackward& p, const Work& w, std::int64_t b,
                        std::int64_t group) {
  const FloatScan& in = p.in;
  const float* const dstate_out =
      p.dstate_out == nullptr ? nullptr : p.dstate_out + b * in.channels * in.dstate;
  for (std::int64_t e = 0; e < kFloatGroup; ++e) w.dbias[e] = w.dD[e] = 0.0F;
  for_each_vector(p, w, group, [&](const BackwardChannels& c) {
    gather(in.A_log, c, in.dstate, c.A);
    gather(dstate_out, c, in.dstate, c.g);
    gather(nullptr, c, in.dstate, c.dA);
    rates(c.A, in.dstate * kLanes);
  });
}

// Between the operands and the scratch of the group whose first channel is `first`.
inline void copy_chunk(const FloatScanBackward& p, const Work& w, bool in, std::int64_t row,
                       std::int64_t tokens, std::int64_t first) {
  const std::int64_t left = p.in.channels - first;
  const std::int64_t channels = left < kFloatGroup ? left : kFloatGroup;
  const auto read = [&](Operand operand, const float* from, std::int64_t stride) {
    if (from != nullptr && in)
      copy_in(from + row * stride + first, stride, tokens, channels, rows_of(w, operand),
              kRowStride);
  };
  const auto write = [&](Operand operand, float* to, std::int64_t stride) {
    if (to != nullptr && !in)
      copy_out(rows_of(w, operand), kRowStride, tokens, channels, to + row * stride + first,
               stride);
  };
  read(kU, p.in.u, p.in.u_stride);
  read(kDt, p.in.dt, p.in.dt_stride);
  read(kZ, p.in.z, p.in.z_stride);
  read(kDy, p.dy, p.dy_stride);
  write(kDu, p.du, p.du_stride);
  write(kDdt, p.ddt, p.ddt_stride);
  write(kDz, p.dz, p.dz_stride);
}

// The `count` tokens of the chunk that begins at t.
inline void run_chunk(const FloatScanBackward& p, const Work& w, std::int64_t b, std::int64_t group,
                      std::int64_t t, std::int64_t count) {
  const std::int64_t dstate = p.in.dstate;
  const std::int64_t groups_of_tokens = (count + kTokens - 1) / kTokens;
  for (std::int64_t i = 0; i < groups_of_tokens * dstate * kFloatParts; ++i) w.dBC[i] = 0.0F;
  const std::int64_t row = b * p.in.seqlen + t;
  copy_chunk(p, w, true, row, count, group * kFloatGroup);
  for_each_vector(p, w, group,
                  [&](BackwardChannels& c) { chunk_of_channels(p, w, c, b, t, count); });
  copy_chunk(p, w, false, row, count, group * kFloatGroup);
  write_parts(w, count, dstate, p.dBC + ((b * p.groups + group) * p.in.seqlen + t) * 2 * dstate);
}

inline void end_group(const FloatScanBackward& p, const Work& w, std::int64_t b,
                      std::int64_t group) {
  const FloatScan& in = p.in;
  const std::int64_t state = b * in.channels * in.dstate;
  for_each_vector(p, w, group, [&](const BackwardChannels& c) {
    for (std::int64_t i = 0; i < in.dstate * kLanes; i += kLanes)  // dA_log = dA A
      store(c.dA + i, load(c.dA + i) * load(c.A + i) * kLn2);
    scatter(c.dA, c, in.dstate, p.dA_log + state);
    if (p.dstate_in != nullptr) scatter(c.g, c, in.dstate, p.dstate_in + state);
    store_some(p.dvectors + b * 3 * in.channels + c.first, c.dbias, c.count);
    store_some(p.dvectors + (b * 3 + 1) * in.channels + c.first, c.dD, c.count);
  });
}

// Sequence b, `groups` groups of channels from `first` on, chunk by chunk: see run().
void run_backward(const FloatScanBackward& p, std::int64_t b, std::int64_t first,
                  std::int64_t groups, float* scratch) {
  const FloatScan& in = p.in;
  const std::int64_t length = in.lengths != nullptr ? in.lengths[b] : in.seqlen;
  const auto work = [&](std::int64_t g) { return divide(scratch, in.dstate, g, groups); };
  for (std::int64_t g = 0; g < groups; ++g) {
    begin_group(p, work(g), b, first + g);
    clear_padding(p, (first + g) * kFloatGroup, b * in.seqlen + length, (b + 1) * in.seqlen);
  }
  for (std::int64_t t = (length - 1) / kSelectiveScanChunk * kSelectiveScanChunk; t >= 0;
       t -= kSelectiveScanChunk) {
    const std::int64_t left = length - t;
    const std::int64_t count = left < kSelectiveScanChunk ? left : kSelectiveScanChunk;
    for (std::int64_t g = 0; g < groups; ++g) run_chunk(p, work(g), b, first + g, t, count);
  }
  for (std::int64_t g = 0; g < groups; ++g) end_group(p, work(g), b, first + g);
}

}  // namespace LRNN_ISA
