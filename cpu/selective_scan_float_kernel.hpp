// The forward pass in float with the discretization of Mamba, once per instruction set: see
// common/isa.hpp.
namespace LRNN_ISA {

constexpr int kVectors = kFloatChannels / kLanes;
constexpr int kTokens = kMost;      // pass through a state while it is in a register
constexpr int kTile = 4 * kTokens;  // go through all channels before the next ones
static_assert(kSelectiveScanChunk % kTile == 0);

// A_log becomes A times log2(e).
inline void rates(float* A, std::int64_t size) {
  for (std::int64_t i = 0; i < size; i += kLanes) {
    Vec v = load(A + i);
    exp(&v, 1);
    store(A + i, -v * kLog2e);
  }
}

// Runs `count` <= kTokens tokens from row `row` on through all states of a vector of channels and
// adds sum C h to y. Inlined, so that `count` and `in_range` are constants.
LRNN_INLINE void advance_states(const FloatScan& p, std::int64_t row, const int count,
                                const float* A, float* h, const Vec* delta, const Vec* drive,
                                Vec* y, const bool in_range) {
  const std::int64_t dstate = p.dstate;
  const float* B[kTokens];
  const float* C[kTokens];
  Vec sum[kTokens];
  LRNN_EACH {
    B[j] = p.B + (row + j) * p.B_stride;
    C[j] = p.C + (row + j) * p.C_stride;
    sum[j] = y[j];
  }
  for (std::int64_t n = 0; n < dstate; ++n) {
    const Vec log_a = load(A + n * kFloatChannels);
    Vec state = load(h + n * kFloatChannels);
    Vec a[kTokens];
    LRNN_EACH a[j] = delta[j] * log_a;
    exp2_of_negative(a, count, in_range);
    LRNN_EACH {
      state = a[j] * state + drive[j] * B[j][n];
      sum[j] += state * C[j][n];
    }
    store(h + n * kFloatChannels, state);
  }
  LRNN_EACH y[j] = sum[j];
}
// The bound of exponents is a fifteenth of the work of a state, and models seldom reach it.
LRNN_INLINE void advance(const FloatScan& p, std::int64_t row, const int count, const float* A,
                         float* h, const Vec* delta, const Vec* drive, Vec* y) {
  Vec longest = delta[0];
  LRNN_EACH longest = LRNN_MAX(longest, delta[j]);
  const Vec lowest = longest * load(A + p.dstate * kFloatChannels);
  if (all_at_least(lowest, kLeastExponent))
    advance_states(p, row, count, A, h, delta, drive, y, true);
  else
    advance_states(p, row, count, A, h, delta, drive, y, false);
}

// A vector of channels. A, times log2(e) and with the least of all N after them, and h are
// [N + 1, kFloatChannels] and begin with these.
struct Channels {
  std::int64_t first, count;
  const float* A;
  float* h;
};
// What the tokens of a tile bring, and what they leave.
struct Tile {
  Vec delta[kTile], drive[kTile], y[kTile];
};
enum class Stage { Read, Advance, Write };

LRNN_INLINE void read_tokens(const FloatScan& p, const Channels& c, std::int64_t row, Vec* delta,
                             Vec* drive, Vec* y, const int count) {
  const Vec bias = load_some(p.dt_bias + c.first, c.count);
  const Vec D = p.D == nullptr ? Vec{} : load_some(p.D + c.first, c.count);
  Vec v[kTokens];
  LRNN_EACH v[j] = load_some(p.dt + (row + j) * p.dt_stride + c.first, c.count) + bias;
  softplus(v, count);
  LRNN_EACH {
    const Vec u = load_some(p.u + (row + j) * p.u_stride + c.first, c.count);
    delta[j] = v[j];
    drive[j] = v[j] * u;
    y[j] = D * u;
  }
}
LRNN_INLINE void write_tokens(const FloatScan& p, const Channels& c, std::int64_t row, Vec* y,
                              const int count) {
  if (p.z != nullptr) {
    Vec z[kTokens];
    Vec gate[kTokens];
    LRNN_EACH gate[j] = z[j] = load_some(p.z + (row + j) * p.z_stride + c.first, c.count);
    sigmoid(gate, count);
    LRNN_EACH y[j] *= z[j] * gate[j];
  }
  LRNN_EACH store_some(p.y + (row + j) * p.y_stride + c.first, y[j], c.count);
}
LRNN_INLINE void run_stage(Stage stage, const FloatScan& p, const Channels& c, std::int64_t row,
                           Tile& tile, int i, const int count) {
  if (stage == Stage::Read)
    read_tokens(p, c, row, tile.delta + i, tile.drive + i, tile.y + i, count);
  else if (stage == Stage::Advance)
    advance(p, row, count, c.A, c.h, tile.delta + i, tile.drive + i, tile.y + i);
  else
    write_tokens(p, c, row, tile.y + i, count);
}
// `tokens` <= kTile of them from row `row` on. The stages go one after the other through all of
// them: each waits for long chains of its own, which those of other tokens hide.
inline void run_tile(const FloatScan& p, const Channels& c, std::int64_t row, int tokens) {
  Tile tile;
  for (const Stage stage : {Stage::Read, Stage::Advance, Stage::Write}) {
    int i = 0;
    for (; i + kTokens <= tokens; i += kTokens) run_stage(stage, p, c, row + i, tile, i, kTokens);
    for (; i < tokens; ++i) run_stage(stage, p, c, row + i, tile, i, 1);
  }
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
inline void begin_group(const FloatScan& p, std::int64_t b, std::int64_t first, float* A,
                        float* h) {
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
  rates(A, p.dstate * kFloatChannels);
  for (std::int64_t i = 0; i < kFloatChannels; ++i) {
    float least = 0.0F;
    for (std::int64_t n = 0; n < p.dstate; ++n)
      least = A[n * kFloatChannels + i] < least ? A[n * kFloatChannels + i] : least;
    A[p.dstate * kFloatChannels + i] = least;
  }
}

inline void prefetch_tile(const FloatScan& p, std::int64_t row, std::int64_t first,
                          std::int64_t tokens) {
  const auto ahead = [&](const float* rows, std::int64_t stride) {
    if (rows != nullptr) prefetch_rows(rows + row * stride + first, stride, tokens);
  };
  ahead(p.u, p.u_stride);
  ahead(p.dt, p.dt_stride);
  ahead(p.z, p.z_stride);
  ahead(p.y, p.y_stride);
}

// The tile that begins at token t of sequence b, for the channels from `first` on.
inline void run_group(const FloatScan& p, std::int64_t b, std::int64_t first, std::int64_t t,
                      const float* A, float* h) {
  const std::int64_t channels = channels_of(p, first);
  const std::int64_t row = b * p.seqlen + t;
  const auto tokens_before = [&](std::int64_t end) {
    const std::int64_t left = end - t;
    return static_cast<int>(left < 0 ? 0 : left < kTile ? left : kTile);
  };
  const int tokens = tokens_before(p.seqlen);
  const int valid = tokens_before(p.lengths != nullptr ? p.lengths[b] : p.seqlen);
  const int next = tokens_before(p.seqlen - kTile);
  if (p.chunk_states != nullptr && t % kSelectiveScanChunk == 0)
    write_states(p, h, channels,
                 p.chunk_states +
                     ((b * p.chunks + t / kSelectiveScanChunk) * p.channels + first) * p.dstate);
  prefetch_tile(p, row + kTile, first, next);
  for (int v = 0; v < kVectors && v * kLanes < channels; ++v) {
    const int at = v * kLanes;
    run_tile(p, {first + at, channels - at, A + at, h + at}, row, valid);
  }
  for (int i = valid; i < tokens; ++i)
    for (std::int64_t e = first; e < first + channels; ++e) p.y[(row + i) * p.y_stride + e] = 0.0F;
}

// Sequence b, `groups` times kFloatChannels channels from `first` on. Tokens lie kilobytes apart,
// so that each operand of each token is on a page of its own: a tile of tokens goes through all
// groups before the next one, and the pages stay known. `scratch` has room for two times N
// kFloatChannels per group.
void run(const FloatScan& p, std::int64_t b, std::int64_t first, std::int64_t groups,
         float* scratch) {
  const std::int64_t size = (p.dstate + 1) * kFloatChannels;
  const auto A = [&](std::int64_t g) { return scratch + 2 * g * size; };
  const auto h = [&](std::int64_t g) { return A(g) + size; };
  for (std::int64_t g = 0; g < groups; ++g)
    begin_group(p, b, first + g * kFloatChannels, A(g), h(g));
  for (std::int64_t t = 0; t < p.seqlen; t += kTile)
    for (std::int64_t g = 0; g < groups; ++g)
      run_group(p, b, first + g * kFloatChannels, t, A(g), h(g));
  if (p.state_out == nullptr) return;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t from = first + g * kFloatChannels;
    write_states(p, h(g), channels_of(p, from), p.state_out + (b * p.channels + from) * p.dstate);
  }
}

}  // namespace LRNN_ISA
