// The backward pass in float with the discretization of Mamba, after
// selective_scan_float_kernel.hpp, once per instruction set: see common/isa.hpp.
#include "selective_scan_float_kernel.hpp"
namespace LRNN_ISA {

constexpr float kLn2 = 0.6931471805599453F;
// Tokens that retrace() takes through a state: as many as it has registers for.
constexpr int kRetraced = kLanes == 8 ? 2 : kTokens;

// A vector of channels in a group. A is times log2(e); A, g and dA are [N, kLanes].
struct BackwardChannels {
  std::int64_t first, count;
  std::int64_t at;  // of the first in the group
  float *A, *g, *dA;
  Vec D, dbias, dD;
};

// Scratch of a group, then of one chunk of a vector of its channels, then the parts of dB and dC
// that its channels have added so far.
struct Work {
  float *A, *g, *dA;  // [kFloatGroup, N]
  float *dbias, *dD;  // [kFloatGroup]
  float* h;           // [kSelectiveScanChunk + 1, N, kLanes]; h[0] enters the chunk
  float* a;           // [kSelectiveScanChunk, N, kLanes]
  float* rows;        // [7, kSelectiveScanChunk, kRowStride]: see rows_of()
  float* dBC;         // [kSelectiveScanChunk / kTokens, N, kFloatParts]: see add_lanes()
};

// The rows of a chunk of all channels of the group. kSlope is that of softplus; kDy lies before the
// gate; kDz begins as the gradient of the gate without its factor y.
enum Operand { kU, kDelta, kSlope, kDy, kDu, kDdt, kDz };
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
  c.D = in.D == nullptr ? Vec{} : load_some(in.D + c.first, c.count);
  c.dbias = load(w.dbias + at);
  c.dD = load(w.dD + at);
  return c;
}

// Operands of a row, before what recompute() finds; see walk_rows().
LRNN_INLINE void read_vectors(const FloatScanBackward& p, const Work& w, const Place& at,
                              const int count) {
  const FloatScan& in = p.in;
  const auto to = [&](Operand operand, int j)
                      LRNN_INLINE_LAMBDA { return rows_of(w, operand) + at.at + j * kLanes; };
  Vec delta[kMost];
  Vec e[kMost];
  Vec u[kMost];
  Vec dy[kMost];
  load_steps(in, at, delta, count);
  load_vectors(in.u + at.row * in.u_stride + at.first, at, u, count);
  load_vectors(p.dy + at.row * p.dy_stride + at.first, at, dy, count);
  LRNN_EACH {
    e[j] = load(to(kSlope, j));
    store(to(kSlope, j), (delta[j] > 0.0F ? 1.0F - Vec{} : e[j]) / (1.0F + e[j]));
    store(to(kU, j), u[j]);
  }
  softplus(delta, e, count);
  LRNN_EACH store(to(kDelta, j), delta[j]);
  if (in.z != nullptr) {
    Vec z[kMost];
    load_vectors(in.z + at.row * in.z_stride + at.first, at, z, count);
    LRNN_EACH {
      const Vec rest = load(to(kDz, j));
      const Vec s = 1.0F / (1.0F + rest);
      store(to(kDz, j), dy[j] * s * (1.0F + z[j] * (rest * s)));
      dy[j] *= z[j] * s;
    }
  }
  LRNN_EACH store(to(kDy, j), dy[j]);
}

// Runs `count` tokens from row `row`, token i of the chunk, forward and keeps all that retrace()
// reads.
LRNN_INLINE void recompute(const FloatScan& in, const Work& w, const BackwardChannels& c,
                           std::int64_t row, std::int64_t i, const int count) {
  const std::int64_t dstate = in.dstate;
  const std::int64_t vector = dstate * kLanes;
  const float* B[kTokens];
  const float* C[kTokens];
  Vec delta[kTokens];
  Vec drive[kTokens];
  Vec y[kTokens];
  LRNN_EACH {
    B[j] = in.B + (row + j) * in.B_stride;
    C[j] = in.C + (row + j) * in.C_stride;
    const Vec u = load(row_of(w, kU, c, i + j));
    delta[j] = load(row_of(w, kDelta, c, i + j));
    drive[j] = delta[j] * u;
    y[j] = c.D * u;
  }
  const float* const rates = c.A;
  float* const states = w.h + i * vector;
  float* const decays = w.a + i * vector;
  for (std::int64_t n = 0; n < dstate; ++n) {
    const Vec A = load(rates + n * kLanes);
    float* const h = states + n * kLanes;
    float* const kept = decays + n * kLanes;
    Vec state = load(h);
    LRNN_EACH {  // one after the other: see advance_tokens()
      Vec a = delta[j] * A;
      exp2_of_negative(&a, 1, false);
      state = a * state + drive[j] * B[j][n];
      y[j] += state * C[j][n];
      store(kept + j * vector, a);
      store(h + (j + 1) * vector, state);
    }
  }
  if (in.z == nullptr) return;
  LRNN_EACH {
    float* const dz = row_of(w, kDz, c, i + j);
    store(dz, load(dz) * y[j]);
  }
}

// `count` tokens backward. g holds a_{t+1} g_{t+1} of the token after them on entry, and that of
// the first of them on return.
LRNN_INLINE void retrace(const FloatScanBackward& p, const Work& w, BackwardChannels& c,
                         std::int64_t row, std::int64_t i, const int count) {
  const FloatScan& in = p.in;
  const std::int64_t dstate = in.dstate;
  const std::int64_t vector = dstate * kLanes;
  const float* B[kTokens];
  const float* C[kTokens];
  Vec dy[kTokens];
  Vec u[kTokens];
  Vec delta[kTokens];
  Vec drive[kTokens];
  Vec ddrive[kTokens];  // sum over n of g B
  Vec dlog[kTokens];    // sum over n of the gradient of delta A, times A
  LRNN_EACH {
    B[j] = in.B + (row + j) * in.B_stride;
    C[j] = in.C + (row + j) * in.C_stride;
    dy[j] = load(row_of(w, kDy, c, i + j));
    u[j] = load(row_of(w, kU, c, i + j));
    delta[j] = load(row_of(w, kDelta, c, i + j));
    drive[j] = delta[j] * u[j];
    ddrive[j] = Vec{};
    dlog[j] = Vec{};
  }
  const float* const rates = c.A;
  const float* a = w.a + i * vector;
  const float* h = w.h + i * vector;
  float* gs = c.g;
  float* dAs = c.dA;
  float* sums = w.dBC + i / kTokens * dstate * kFloatParts + 4 * (i % kTokens);
  for (std::int64_t n = 0; n < dstate; ++n) {
    const Vec A = load(rates + n * kLanes);
    Vec parts[2 * kTokens] = {};  // of dB, then of dC
    Vec g = load(gs + n * kLanes) + dy[count - 1] * C[count - 1][n];
    Vec dA = load(dAs + n * kLanes);
    Vec after = load(h + count * vector + n * kLanes);
    LRNN_UNROLL
    for (int j = count - 1; j >= 0; --j) {
      const Vec before = load(h + j * vector + n * kLanes);
      const Vec decay = load(a + j * vector + n * kLanes);
      const Vec decayed = g * decay;
      parts[kTokens + j] = dy[j] * after;
      parts[j] = g * drive[j];
      ddrive[j] += g * B[j][n];
      const Vec dexponent = decayed * before;
      dlog[j] += dexponent * A;
      dA += dexponent * delta[j];
      after = before;
      // Not from `decayed`: tokens would wait for two operations each.
      if (j > 0)
        g = multiply_add(g, decay, dy[j - 1] * C[j - 1][n]);
      else
        store(gs + n * kLanes, decayed);
    }
    store(dAs + n * kLanes, dA);
    add_lanes(parts, sums + n * kFloatParts, count);
  }
  LRNN_UNROLL
  for (int j = count - 1; j >= 0; --j) {
    const Vec ddt = (u[j] * ddrive[j] + dlog[j] * kLn2) * load(row_of(w, kSlope, c, i + j));
    store(row_of(w, kDdt, c, i + j), ddt);
    store(row_of(w, kDu, c, i + j), c.D * dy[j] + delta[j] * ddrive[j]);
    c.dbias += ddt;
    c.dD += dy[j] * u[j];
  }
}

// The tokens of a chunk through one vector of channels. Fetches what lies there in the next piece,
// in both directions: the processor waits when it has asked for too many lines.
inline void chunk_of_channels(const FloatScanBackward& p, const Work& w, BackwardChannels& c,
                              const float* chunk_states, const Piece& piece, const Piece& next) {
  const FloatScan& in = p.in;
  const std::int64_t row = piece.row;
  const Fetched inputs[] = {
      {in.u, in.u_stride}, {in.dt, in.dt_stride}, {in.z, in.z_stride}, {p.dy, p.dy_stride}};
  const Fetched outputs[] = {{p.du, p.du_stride}, {p.ddt, p.ddt_stride}, {p.dz, p.dz_stride}};
  gather(chunk_states, c, in.dstate, w.h);
  std::int64_t i = 0;
  for (; i + kTokens <= piece.tokens; i += kTokens) {
    fetch(inputs, 4, next, c.at, i, kTokens);
    recompute(in, w, c, row + i, i, kTokens);
  }
  for (; i < piece.tokens; ++i) recompute(in, w, c, row + i, i, 1);
  for (; i % kRetraced != 0; --i) retrace(p, w, c, row + i - 1, i - 1, 1);
  for (; i > 0; i -= kRetraced) {
    fetch(outputs, 3, next, c.at, i - kRetraced, kRetraced);
    retrace(p, w, c, row + i - kRetraced, i - kRetraced, kRetraced);
  }
}

// The sums over the channels of the group for `count` tokens.
inline void write_parts(const Work& w, std::int64_t count, std::int64_t dstate, float* dBC) {
  for (std::int64_t i = 0; i < count; i += kTokens)
    for (std::int64_t n = 0; n < dstate; ++n) {
      const float* const sums = w.dBC + (i / kTokens * dstate + n) * kFloatParts;
      LRNN_UNROLL
      for (int j = 0; j < kTokens; ++j) {
        if (i + j == count) break;
        float* const to = dBC + (i + j) * 2 * dstate + n;
        to[0] = sums[4 * j] + sums[4 * j + 1];
        to[dstate] = sums[4 * j + 2] + sums[4 * j + 3];
      }
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

inline void read_rows(const FloatScanBackward& p, const Work& w, const Piece& piece) {
  walk_rows(piece, kRowStride,
            [&](const Place& at, const bool second, const int count) LRNN_INLINE_LAMBDA {
              if (second) return read_vectors(p, w, at, count);
              exponentials_of_steps(p.in, at, rows_of(w, kSlope), count);
              exponentials_of_gates(p.in, at, rows_of(w, kDz), count);
            });
}
inline void write_rows(const FloatScanBackward& p, const Work& w, const Piece& piece) {
  const auto write = [&](Operand operand, float* to, std::int64_t stride) {
    if (to != nullptr)
      copy_out(rows_of(w, operand), kRowStride, piece.tokens, piece.channels,
               to + piece.row * stride + piece.first, stride);
  };
  write(kDu, p.du, p.du_stride);
  write(kDdt, p.ddt, p.ddt_stride);
  write(kDz, p.dz, p.dz_stride);
}

// `chunk_states` are those of all channels before the piece.
inline void run_chunk(const FloatScanBackward& p, const Work& w, std::int64_t group,
                      const float* chunk_states, const Piece& piece, const Piece& next,
                      float* dBC) {
  const std::int64_t dstate = p.in.dstate;
  const std::int64_t groups_of_tokens = (piece.tokens + kTokens - 1) / kTokens;
  for (std::int64_t i = 0; i < groups_of_tokens * dstate * kFloatParts; ++i) w.dBC[i] = 0.0F;
  read_rows(p, w, piece);
  for_each_vector(p, w, group, [&](BackwardChannels& c) {
    chunk_of_channels(p, w, c, chunk_states, piece, next);
  });
  write_rows(p, w, piece);
  write_parts(w, piece.tokens, dstate, dBC);
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

// A chunk of a group, of those of sequence b from the end of time on; empty before the first.
inline Piece chunk_of(const FloatScanBackward& p, std::int64_t b, std::int64_t chunk,
                      std::int64_t group) {
  const std::int64_t length = p.in.lengths != nullptr ? p.in.lengths[b] : p.in.seqlen;
  const std::int64_t t = chunk * kSelectiveScanChunk;
  const std::int64_t tokens = chunk < 0 ? 0 : length - t;
  const std::int64_t first = group * kFloatGroup;
  const std::int64_t channels = p.in.channels - first;
  return {.row = b * p.in.seqlen + t,
          .first = first,
          .channels = channels < kFloatGroup ? channels : kFloatGroup,
          .tokens = static_cast<int>(tokens < kSelectiveScanChunk ? tokens : kSelectiveScanChunk)};
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
  const std::int64_t chunks = (length + kSelectiveScanChunk - 1) / kSelectiveScanChunk;
  for (std::int64_t chunk = chunks - 1; chunk >= 0; --chunk)
    for (std::int64_t g = 0; g < groups; ++g) {
      const bool last = g + 1 == groups;
      const std::int64_t t = chunk * kSelectiveScanChunk;
      const float* const states =
          p.chunk_states + (b * in.chunks + chunk) * in.channels * in.dstate;
      float* const dBC = p.dBC + ((b * p.groups + first + g) * in.seqlen + t) * 2 * in.dstate;
      run_chunk(p, work(g), first + g, states, chunk_of(p, b, chunk, first + g),
                chunk_of(p, b, last ? chunk - 1 : chunk, first + (last ? 0 : g + 1)), dBC);
    }
  for (std::int64_t g = 0; g < groups; ++g) end_group(p, work(g), b, first + g);
}

}  // namespace LRNN_ISA
