// Both passes of rglru_scan in float, once per instruction set: see common/isa.hpp.
namespace LRNN_ISA {

constexpr int kTokens = kMost;
constexpr std::int64_t kChunk = kRglruScanChunk;
constexpr int kGroupVectors = static_cast<int>(kGroup) / kLanes;
static_assert(kTile % kChunk == 0 && kSpan % kChunk == 0);

// What the gates of a few tokens give; `rest` of a gate is 1 less the gate.
struct Gates {
  Vec log_a[kTokens], a[kTokens], m[kTokens];
  Vec rest_r[kTokens];
  Vec i[kTokens], rest_i[kTokens];
};

// A vector of channels.
struct Channels {
  std::int64_t first, count;
  std::int64_t at;  // of the first in the group, whose rows are in scratch
  Vec rate;         // c softplus(-a_log)
};
inline Channels channels_at(const FloatGatedScan& p, std::int64_t first, std::int64_t at,
                            std::int64_t end) {
  Channels c;
  c.first = first + at;
  c.count = end - c.first < kLanes ? end - c.first : kLanes;
  c.at = at;
  c.rate = -load_some(p.a_log + c.first, c.count);
  softplus(&c.rate, 1);
  c.rate *= p.c;
  return c;
}

// Tokens `row`, .. of rows in scratch.
LRNN_INLINE void load_rows(const float* rows, std::int64_t row, const Channels& c, Vec* v,
                           const int count) {
  LRNN_EACH v[j] = load(rows + (row + j) * kRowStride + c.at);
}
LRNN_INLINE void store_rows(float* rows, std::int64_t row, const Channels& c, const Vec* v,
                            const int count) {
  LRNN_EACH store(rows + (row + j) * kRowStride + c.at, v[j]);
}

// Makes `tile` have `tokens` rows from `row` on at these places in scratch.
inline void read_rows(const FloatGatedScan& p, std::int64_t row, std::int64_t tokens,
                      std::int64_t first, std::int64_t channels, float* v, float* pre_r,
                      float* pre_i, FloatGatedScan& tile) {
  copy_in(p.v + row * p.v_stride + first, p.v_stride, tokens, channels, v, kRowStride);
  copy_in(p.pre_r + row * p.pre_r_stride + first, p.pre_r_stride, tokens, channels, pre_r,
          kRowStride);
  copy_in(p.pre_i + row * p.pre_i_stride + first, p.pre_i_stride, tokens, channels, pre_i,
          kRowStride);
  tile.v = v;
  tile.pre_r = pre_r;
  tile.pre_i = pre_i;
}
inline void clear_rows(float* rows, std::int64_t stride, std::int64_t begin, std::int64_t end,
                       std::int64_t channels) {
  for (std::int64_t t = begin; t < end; ++t)
    for (std::int64_t e = 0; e < channels; ++e) rows[t * stride + e] = 0.0F;
}

LRNN_INLINE void read_gates(const FloatGatedScan& p, const Channels& c, std::int64_t row, Gates& g,
                            const int count) {
  load_rows(p.pre_r, row, c, g.log_a, count);
  sigmoid(g.log_a, g.rest_r, count);
  LRNN_EACH g.a[j] = g.m[j] = g.log_a[j] *= -c.rate;
  exp(g.a, count);
  root_of_rest(g.m, g.a, count);
  load_rows(p.pre_i, row, c, g.i, count);
  sigmoid(g.i, g.rest_i, count);
}

// `count` tokens from `row` on; returns the state after them.
LRNN_INLINE Vec forward_tokens(const FloatGatedScanForward& p, const Channels& c, std::int64_t row,
                               Vec h, const int count) {
  Gates g;
  Vec v[kTokens];
  read_gates(p.in, c, row, g, count);
  load_rows(p.in.v, row, c, v, count);
  LRNN_EACH v[j] = h = g.a[j] * h + g.m[j] * (g.i[j] * v[j]);
  store_rows(p.h, row, c, v, count);
  return h;
}

// Tokens [i, end) in scratch.
inline Vec forward_range(const FloatGatedScanForward& p, const Channels& c, std::int64_t i,
                         std::int64_t end, Vec h) {
  for (; i + kTokens <= end; i += kTokens) h = forward_tokens(p, c, i, h, kTokens);
  for (; i < end; ++i) h = forward_tokens(p, c, i, h, 1);
  return h;
}

// The first `valid` of `tokens` tokens in scratch. The state before each chunk goes to `chunk`.
inline Vec forward_tile(const FloatGatedScanForward& p, const Channels& c, std::int64_t tokens,
                        std::int64_t valid, float* chunk, Vec h) {
  for (std::int64_t i = 0; i < tokens; i += kChunk) {
    if (chunk != nullptr)
      store_some(chunk + i / kChunk * p.in.channels + c.first, h, c.count);
    h = forward_range(p, c, i, valid < i + kChunk ? valid : i + kChunk, h);
  }
  return h;
}

// Sequence b, `channels` channels from `first` on.
void run(const FloatGatedScanForward& p, std::int64_t b, std::int64_t first, std::int64_t channels,
         float* scratch) {
  const FloatGatedScan& in = p.in;
  const std::int64_t length = in.lengths != nullptr ? in.lengths[b] : in.seqlen;
  const int vectors = static_cast<int>((channels + kLanes - 1) / kLanes);
  Channels c[kGroupVectors];
  Vec h[kGroupVectors];
  for (int k = 0; k < vectors; ++k) {
    c[k] = channels_at(in, first, k * kLanes, first + channels);
    h[k] = in.state_in == nullptr
               ? Vec{}
               : load_some(in.state_in + b * in.channels + c[k].first, c[k].count);
  }
  const auto rows = [&](int operand) { return scratch + operand * kTile * kRowStride; };
  FloatGatedScanForward tile = p;
  tile.h = rows(3);
  for (std::int64_t t = 0; t < in.seqlen; t += kTile) {
    const std::int64_t tokens = in.seqlen - t < kTile ? in.seqlen - t : kTile;
    const std::int64_t left = length - t;
    const std::int64_t valid = left < 0 ? 0 : left < tokens ? left : tokens;
    read_rows(in, b * in.seqlen + t, valid, first, channels, rows(0), rows(1), rows(2), tile.in);
    float* const chunk = p.chunk_states == nullptr
                             ? nullptr
                             : p.chunk_states + (b * in.chunks + t / kChunk) * in.channels;
    for (int k = 0; k < vectors; ++k) h[k] = forward_tile(tile, c[k], tokens, valid, chunk, h[k]);
    float* const out = p.h + (b * in.seqlen + t) * p.h_stride + first;
    copy_out(tile.h, kRowStride, valid, channels, out, p.h_stride);
    clear_rows(out, p.h_stride, valid, tokens, channels);
  }
  for (int k = 0; k < vectors && p.state_out != nullptr; ++k)
    store_some(p.state_out + b * in.channels + c[k].first, h[k], c[k].count);
}

// One span of one vector of channels: the gates, and the states before its tokens.
struct Kept {
  Gates gates[kSpan / kTokens];
  Vec before[kSpan];
};

LRNN_INLINE Vec recompute(const FloatGatedScan& p, const Channels& c, std::int64_t row, Gates& g,
                          Vec* before, Vec h, const int count) {
  Vec v[kTokens];
  read_gates(p, c, row, g, count);
  load_rows(p.v, row, c, v, count);
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
  load_rows(p.in.v, row, c, v, count);
  load_rows(p.dh, row, c, dh, count);
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
  store_rows(p.dv, row, c, v, count);
  store_rows(p.dpre_r, row, c, dpre_r, count);
  store_rows(p.dpre_i, row, c, dpre_i, count);
}

// The `count` tokens of a span in scratch; returns their part of dlog.
inline Vec backward_span(const FloatGatedScanBackward& p, const Channels& c, std::int64_t count,
                          Vec h, Vec& carry) {
  Kept kept;
  const std::int64_t whole = count / kTokens * kTokens;
  for (std::int64_t i = 0; i < whole; i += kTokens)
    h = recompute(p.in, c, i, kept.gates[i / kTokens], kept.before + i, h, kTokens);
  Gates last[kTokens];
  for (std::int64_t i = whole; i < count; ++i)
    h = recompute(p.in, c, i, last[i - whole], kept.before + i, h, 1);
  Vec sum{};
  for (std::int64_t i = count - 1; i >= whole; --i)
    retrace(p, c, i, last[i - whole], kept.before + i, carry, sum, 1);
  for (std::int64_t i = whole - kTokens; i >= 0; i -= kTokens)
    retrace(p, c, i, kept.gates[i / kTokens], kept.before + i, carry, sum, kTokens);
  return sum;
}

void run_backward(const FloatGatedScanBackward& p, std::int64_t b, std::int64_t first,
                  std::int64_t channels, float* scratch) {
  const FloatGatedScan& in = p.in;
  const int vectors = static_cast<int>((channels + kLanes - 1) / kLanes);
  const std::int64_t length = in.lengths != nullptr ? in.lengths[b] : in.seqlen;
  Channels c[kGroupVectors];
  Vec carry[kGroupVectors];
  Vec sum[kGroupVectors];
  for (int k = 0; k < vectors; ++k) {
    c[k] = channels_at(in, first, k * kLanes, first + channels);
    sum[k] = carry[k] = Vec{};
    if (p.dstate_out != nullptr)
      carry[k] = load_some(p.dstate_out + b * in.channels + c[k].first, c[k].count);
  }
  const auto rows = [&](int operand) { return scratch + operand * kSpan * kRowStride; };
  FloatGatedScanBackward tile = p;
  tile.dh = rows(3);
  tile.dv = rows(4);
  tile.dpre_r = rows(5);
  tile.dpre_i = rows(6);
  const auto write = [&](const float* from, float* to, std::int64_t stride, std::int64_t row,
                         std::int64_t tokens) {
    copy_out(from, kRowStride, tokens, channels, to + row * stride + first, stride);
  };
  for (std::int64_t t = (length - 1) / kSpan * kSpan; t >= 0; t -= kSpan) {
    const std::int64_t row = b * in.seqlen + t;
    const std::int64_t count = length - t < kSpan ? length - t : kSpan;
    const float* const states = p.chunk_states + (b * in.chunks + t / kChunk) * in.channels;
    read_rows(in, row, count, first, channels, rows(0), rows(1), rows(2), tile.in);
    copy_in(p.dh + row * p.dh_stride + first, p.dh_stride, count, channels, rows(3), kRowStride);
    for (int k = 0; k < vectors; ++k)  // sums of spans first: two short sums round less
      sum[k] +=
          backward_span(tile, c[k], count, load_some(states + c[k].first, c[k].count), carry[k]);
    write(tile.dv, p.dv, p.dv_stride, row, count);
    write(tile.dpre_r, p.dpre_r, p.dpre_r_stride, row, count);
    write(tile.dpre_i, p.dpre_i, p.dpre_i_stride, row, count);
  }
  for (int k = 0; k < vectors; ++k) {
    const std::int64_t at = b * in.channels + c[k].first;
    store_some(p.dlog + at, sum[k], c[k].count);
    if (p.dstate_in != nullptr) store_some(p.dstate_in + at, carry[k], c[k].count);
  }
  const auto clear = [&](float* to, std::int64_t stride) {
    clear_rows(to + b * in.seqlen * stride + first, stride, length, in.seqlen, channels);
  };
  clear(p.dv, p.dv_stride);
  clear(p.dpre_r, p.dpre_r_stride);
  clear(p.dpre_i, p.dpre_i_stride);
}

}  // namespace LRNN_ISA
