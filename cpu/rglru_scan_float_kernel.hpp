// Both passes of rglru_scan in float, once per instruction set: see common/isa.hpp.
namespace LRNN_ISA {

constexpr int kTokens = kMost;
constexpr std::int64_t kChunk = kRglruScanChunk;
constexpr std::int64_t kTile = 4 * kTokens;  // tokens through all channels before the next ones
constexpr int kGroupVectors = static_cast<int>(kGroup) / kLanes;
static_assert(kChunk % kTile == 0);

// What the gates of a few tokens give; `rest` of a gate is 1 less the gate.
struct Gates {
  Vec log_a[kTokens], a[kTokens], m[kTokens];
  Vec rest_r[kTokens];
  Vec i[kTokens], rest_i[kTokens];
};

// A vector of channels.
struct Channels {
  std::int64_t first, count;
  Vec rate;  // c softplus(-a_log)
};
inline Channels channels_at(const FloatGatedScan& p, std::int64_t first, std::int64_t end) {
  Channels c;
  c.first = first;
  c.count = end - first < kLanes ? end - first : kLanes;
  c.rate = -load_some(p.a_log + first, c.count);
  softplus(&c.rate, 1);
  c.rate *= p.c;
  return c;
}

LRNN_INLINE void load_rows(const float* rows, std::int64_t stride, std::int64_t row,
                           const Channels& c, Vec* v, const int count) {
  LRNN_EACH v[j] = load_some(rows + (row + j) * stride + c.first, c.count);
}
LRNN_INLINE void store_rows(float* rows, std::int64_t stride, std::int64_t row, const Channels& c,
                            const Vec* v, const int count) {
  LRNN_EACH store_some(rows + (row + j) * stride + c.first, v[j], c.count);
}

LRNN_INLINE void read_gates(const FloatGatedScan& p, const Channels& c, std::int64_t row, Gates& g,
                            const int count) {
  load_rows(p.pre_r, p.pre_r_stride, row, c, g.log_a, count);
  sigmoid(g.log_a, g.rest_r, count);
  LRNN_EACH g.a[j] = g.m[j] = g.log_a[j] *= -c.rate;
  exp(g.a, count);
  root_of_rest(g.m, g.a, count);
  load_rows(p.pre_i, p.pre_i_stride, row, c, g.i, count);
  sigmoid(g.i, g.rest_i, count);
}

// `count` tokens from row `row` on; returns the state after them.
LRNN_INLINE Vec forward_tokens(const FloatGatedScanForward& p, const Channels& c, std::int64_t row,
                               Vec h, const int count) {
  Gates g;
  Vec v[kTokens];
  read_gates(p.in, c, row, g, count);
  load_rows(p.in.v, p.in.v_stride, row, c, v, count);
  LRNN_EACH v[j] = h = g.a[j] * h + g.m[j] * (g.i[j] * v[j]);
  store_rows(p.h, p.h_stride, row, c, v, count);
  return h;
}

// The tokens [t, end) of sequence b.
inline Vec forward_tile(const FloatGatedScanForward& p, const Channels& c, std::int64_t b,
                        std::int64_t t, std::int64_t end, Vec h) {
  const std::int64_t length = p.in.lengths != nullptr ? p.in.lengths[b] : p.in.seqlen;
  const std::int64_t valid = end < length ? end : length;
  const std::int64_t row = b * p.in.seqlen;
  for (; t + kTokens <= valid; t += kTokens) h = forward_tokens(p, c, row + t, h, kTokens);
  for (; t < valid; ++t) h = forward_tokens(p, c, row + t, h, 1);
  for (; t < end; ++t) store_some(p.h + (row + t) * p.h_stride + c.first, Vec{}, c.count);
  return h;
}

// Sequence b, `channels` channels from `first` on.
void run(const FloatGatedScanForward& p, std::int64_t b, std::int64_t first,
         std::int64_t channels) {
  const FloatGatedScan& in = p.in;
  const int vectors = static_cast<int>((channels + kLanes - 1) / kLanes);
  Channels c[kGroupVectors];
  Vec h[kGroupVectors];
  for (int k = 0; k < vectors; ++k) {
    c[k] = channels_at(in, first + k * kLanes, first + channels);
    h[k] = in.state_in == nullptr
               ? Vec{}
               : load_some(in.state_in + b * in.channels + c[k].first, c[k].count);
  }
  for (std::int64_t t = 0; t < in.seqlen; t += kTile) {
    const std::int64_t end = t + kTile < in.seqlen ? t + kTile : in.seqlen;
    const std::int64_t next = b * in.seqlen + t + kTile;
    const std::int64_t ahead = in.seqlen - end < kTile ? in.seqlen - end : kTile;
    float* const chunk = p.chunk_states == nullptr || t % kChunk != 0
                             ? nullptr
                             : p.chunk_states + (b * in.chunks + t / kChunk) * in.channels;
    for (int k = 0; k < vectors; ++k) {
      if (chunk != nullptr) store_some(chunk + c[k].first, h[k], c[k].count);
      prefetch_rows(in.v + next * in.v_stride + c[k].first, in.v_stride, ahead);
      prefetch_rows(in.pre_r + next * in.pre_r_stride + c[k].first, in.pre_r_stride, ahead);
      prefetch_rows(in.pre_i + next * in.pre_i_stride + c[k].first, in.pre_i_stride, ahead);
      prefetch_rows(p.h + next * p.h_stride + c[k].first, p.h_stride, ahead);
      h[k] = forward_tile(p, c[k], b, t, end, h[k]);
    }
  }
  for (int k = 0; k < vectors && p.state_out != nullptr; ++k)
    store_some(p.state_out + b * in.channels + c[k].first, h[k], c[k].count);
}

// One chunk of one vector of channels: the gates, and the states before its tokens.
struct Kept {
  Gates gates[kChunk / kTokens];
  Vec before[kChunk];
};

LRNN_INLINE Vec recompute(const FloatGatedScan& p, const Channels& c, std::int64_t row, Gates& g,
                          Vec* before, Vec h, const int count) {
  Vec v[kTokens];
  read_gates(p, c, row, g, count);
  load_rows(p.v, p.v_stride, row, c, v, count);
  LRNN_EACH {
    before[j] = h;
    h = g.a[j] * h + g.m[j] * (g.i[j] * v[j]);
  }
  return h;
}

// carry holds a_{t+1} g_{t+1} of the token after these on entry, a_t g_t of the first on return.
LRNN_INLINE void retrace(const FloatGatedScanBackward& p, const Channels& c, std::int64_t row,
                         const Gates& gates, const Vec* before, Vec& carry, Vec& sum,
                         const int count) {
  Vec v[kTokens];
  Vec dh[kTokens];
  Vec dpre_r[kTokens];
  Vec dpre_i[kTokens];
  load_rows(p.in.v, p.in.v_stride, row, c, v, count);
  load_rows(p.dh, p.dh_stride, row, c, dh, count);
  LRNN_UNROLL
  for (int j = count - 1; j >= 0; --j) {
    const Vec m = gates.m[j];
    const Vec a = gates.a[j];
    const Vec log_a = gates.log_a[j];
    const Vec g = dh[j] + carry;
    carry = a * g;
    const Vec q = m > 0.0F ? log_a / m : Vec{};
    const Vec gated = gates.i[j] * v[j];
    const Vec term = g * (log_a * a * before[j] - gated * (a * a) * q);
    sum += term;
    dpre_r[j] = term * gates.rest_r[j];
    dpre_i[j] = g * m * gated * gates.rest_i[j];
    v[j] = g * m * gates.i[j];
  }
  store_rows(p.dv, p.dv_stride, row, c, v, count);
  store_rows(p.dpre_r, p.dpre_r_stride, row, c, dpre_r, count);
  store_rows(p.dpre_i, p.dpre_i_stride, row, c, dpre_i, count);
}

// What the backward pass reads and writes of kTokens rows.
inline void prefetch_tokens(const FloatGatedScanBackward& p, std::int64_t row, std::int64_t first) {
  const FloatGatedScan& in = p.in;
  const auto ahead = [&](const float* from, std::int64_t stride) {
    prefetch_rows(from + row * stride + first, stride, kTokens);
  };
  ahead(in.v, in.v_stride);
  ahead(in.pre_r, in.pre_r_stride);
  ahead(in.pre_i, in.pre_i_stride);
  ahead(p.dh, p.dh_stride);
  ahead(p.dv, p.dv_stride);
  ahead(p.dpre_r, p.dpre_r_stride);
  ahead(p.dpre_i, p.dpre_i_stride);
}

// The `count` tokens of the chunk that begins at row `row`; returns their part of dlog. Prefetches
// as many from row `next` and channel `next_first` on.
inline Vec backward_chunk(const FloatGatedScanBackward& p, const Channels& c, std::int64_t row,
                          std::int64_t count, std::int64_t next, std::int64_t next_first, Vec h,
                          Vec& carry) {
  Kept kept;
  const std::int64_t whole = count / kTokens * kTokens;
  const int rest = static_cast<int>(count - whole);
  for (std::int64_t i = 0; i < whole; i += kTokens) {
    prefetch_tokens(p, next + i, next_first);
    h = recompute(p.in, c, row + i, kept.gates[i / kTokens], kept.before + i, h, kTokens);
  }
  Gates last[kTokens];
  for (int i = 0; i < rest; ++i)
    h = recompute(p.in, c, row + whole + i, last[i], kept.before + whole + i, h, 1);
  Vec sum{};
  for (int i = rest - 1; i >= 0; --i)
    retrace(p, c, row + whole + i, last[i], kept.before + whole + i, carry, sum, 1);
  for (std::int64_t i = whole - kTokens; i >= 0; i -= kTokens)
    retrace(p, c, row + i, kept.gates[i / kTokens], kept.before + i, carry, sum, kTokens);
  return sum;
}

inline void clear_padding(const FloatGatedScanBackward& p, const Channels& c, std::int64_t row,
                          std::int64_t end) {
  for (; row < end; ++row) {
    store_some(p.dv + row * p.dv_stride + c.first, Vec{}, c.count);
    store_some(p.dpre_r + row * p.dpre_r_stride + c.first, Vec{}, c.count);
    store_some(p.dpre_i + row * p.dpre_i_stride + c.first, Vec{}, c.count);
  }
}

void run_backward(const FloatGatedScanBackward& p, std::int64_t b, std::int64_t first,
                  std::int64_t channels) {
  const FloatGatedScan& in = p.in;
  const int vectors = static_cast<int>((channels + kLanes - 1) / kLanes);
  const std::int64_t length = in.lengths != nullptr ? in.lengths[b] : in.seqlen;
  Channels c[kGroupVectors];
  Vec carry[kGroupVectors];
  Vec sum[kGroupVectors];
  for (int k = 0; k < vectors; ++k) {
    c[k] = channels_at(in, first + k * kLanes, first + channels);
    sum[k] = carry[k] = Vec{};
    if (p.dstate_out != nullptr)
      carry[k] = load_some(p.dstate_out + b * in.channels + c[k].first, c[k].count);
    clear_padding(p, c[k], b * in.seqlen + length, (b + 1) * in.seqlen);
  }
  for (std::int64_t t = (length - 1) / kChunk * kChunk; t >= 0; t -= kChunk) {
    const std::int64_t count = length - t < kChunk ? length - t : kChunk;
    const float* const states = p.chunk_states + (b * in.chunks + t / kChunk) * in.channels;
    for (int k = 0; k < vectors; ++k) {
      const std::int64_t row = b * in.seqlen + t;
      const bool last = k + 1 == vectors;
      // Sums of chunks first: two short sums round less than one long one.
      sum[k] += backward_chunk(p, c[k], row, count, last && t > 0 ? row - kChunk : row,
                               c[last ? 0 : k + 1].first,
                               load_some(states + c[k].first, c[k].count), carry[k]);
    }
  }
  for (int k = 0; k < vectors; ++k) {
    const std::int64_t at = b * in.channels + c[k].first;
    store_some(p.dlog + at, sum[k], c[k].count);
    if (p.dstate_in != nullptr) store_some(p.dstate_in + at, carry[k], c[k].count);
  }
}

}  // namespace LRNN_ISA
