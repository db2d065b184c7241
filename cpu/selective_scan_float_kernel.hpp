// The forward pass in float with the discretization of Mamba, once per instruction set: see
// common/isa.hpp.
namespace LRNN_ISA {

constexpr int kTokens = kMost;     // pass through a state while it is in a register
constexpr int kTile = kFloatTile;  // go through all channels before the next ones
static_assert(kSelectiveScanChunk % kTile == 0 && kTile % kTokens == 0);

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

// The tokens of a tile in scratch, [kTile, kRowStride] each: some channels of their rows.
struct Tile {
  float *delta, *drive, *y;
};

// Neighbouring vectors of channels of a row, `channels` of them left.
struct Place {
  std::int64_t row, first, channels;
  std::int64_t at;  // in the tile
};
// A single vector may be the last of a row, with fewer channels than it has room for.
LRNN_INLINE void load_vectors(const float* from, const Place& at, Vec* v, const int count) {
  LRNN_EACH v[j] = count == 1 ? load_some(from, at.channels) : load(from + j * kLanes);
}
LRNN_INLINE void store_vectors(float* to, const Place& at, const Vec* v, const int count) {
  if (count == 1) return store_some(to, v[0], at.channels);
  LRNN_EACH store(to + j * kLanes, v[j]);
}

LRNN_INLINE void read_vectors(const FloatScan& p, const Tile& tile, const Place& at,
                              const int count) {
  Vec delta[kMost];
  Vec bias[kMost];
  Vec u[kMost];
  Vec D[kMost] = {};
  load_vectors(p.dt + at.row * p.dt_stride + at.first, at, delta, count);
  load_vectors(p.dt_bias + at.first, at, bias, count);
  LRNN_EACH delta[j] += bias[j];
  softplus(delta, count);
  load_vectors(p.u + at.row * p.u_stride + at.first, at, u, count);
  if (p.D != nullptr) load_vectors(p.D + at.first, at, D, count);
  LRNN_EACH {
    store(tile.delta + at.at + j * kLanes, delta[j]);
    store(tile.drive + at.at + j * kLanes, delta[j] * u[j]);
    store(tile.y + at.at + j * kLanes, D[j] * u[j]);
  }
}
LRNN_INLINE void write_vectors(const FloatScan& p, const Tile& tile, const Place& at,
                               const int count) {
  Vec y[kMost];
  LRNN_EACH y[j] = load(tile.y + at.at + j * kLanes);
  if (p.z != nullptr) {
    Vec z[kMost];
    Vec gate[kMost];
    load_vectors(p.z + at.row * p.z_stride + at.first, at, z, count);
    LRNN_EACH gate[j] = z[j];
    sigmoid(gate, count);
    LRNN_EACH y[j] *= z[j] * gate[j];
  }
  store_vectors(p.y + at.row * p.y_stride + at.first, at, y, count);
}
// Reads into the tile or writes from it along `tokens` rows from `row` on, for `channels` channels
// from `first` on. Inlined, so that `reading` is a constant.
LRNN_INLINE void walk_rows(const FloatScan& p, const Tile& tile, const bool reading,
                           std::int64_t row, int tokens, std::int64_t first,
                           std::int64_t channels) {
  for (int i = 0; i < tokens; ++i) {
    Place at = {row + i, first, channels, i * kRowStride};
    while (at.channels > 0) {
      const int count = at.channels >= kMost * kLanes ? kMost : 1;
      if (reading && count > 1)
        read_vectors(p, tile, at, kMost);
      else if (reading)
        read_vectors(p, tile, at, 1);
      else if (count > 1)
        write_vectors(p, tile, at, kMost);
      else
        write_vectors(p, tile, at, 1);
      at.first += count * kLanes;
      at.channels -= count * kLanes;
      at.at += count * kLanes;
    }
  }
}

LRNN_INLINE void advance_tokens(const FloatScan& p, std::int64_t row, const float* A, float* h,
                                const Tile& tile, std::int64_t at, const int count) {
  Vec delta[kTokens];
  Vec drive[kTokens];
  Vec y[kTokens];
  LRNN_EACH {
    delta[j] = load(tile.delta + at + j * kRowStride);
    drive[j] = load(tile.drive + at + j * kRowStride);
    y[j] = load(tile.y + at + j * kRowStride);
  }
  advance(p, row, count, A, h, delta, drive, y);
  LRNN_EACH store(tile.y + at + j * kRowStride, y[j]);
}
// Takes a vector of channels, at `at` in the tile, through `tokens` tokens. A, times log2(e) and
// with the least of all N after them, and h are [N + 1, kFloatChannels] and begin with these.
inline void advance_vector(const FloatScan& p, std::int64_t row, int tokens, const float* A,
                           float* h, const Tile& tile, std::int64_t at) {
  int i = 0;
  for (; i + kTokens <= tokens; i += kTokens)
    advance_tokens(p, row + i, A, h, tile, at + i * kRowStride, kTokens);
  for (; i < tokens; ++i) advance_tokens(p, row + i, A, h, tile, at + i * kRowStride, 1);
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

// A, then h, of group g, of kFloatChannels channels.
inline float* states_of(const FloatScan& p, float* states, std::int64_t g) {
  return states + 2 * g * (p.dstate + 1) * kFloatChannels;
}

// The tile that begins at token t of sequence b, for `channels` channels from `first` on, whose
// states are given.
inline void run_piece(const FloatScan& p, std::int64_t b, std::int64_t first, std::int64_t channels,
                      std::int64_t t, float* states, const Tile& tile) {
  const std::int64_t row = b * p.seqlen + t;
  const auto tokens_before = [&](std::int64_t end) {
    const std::int64_t left = end - t;
    return static_cast<int>(left < 0 ? 0 : left < kTile ? left : kTile);
  };
  const int tokens = tokens_before(p.seqlen);
  const int valid = tokens_before(p.lengths != nullptr ? p.lengths[b] : p.seqlen);
  walk_rows(p, tile, true, row, valid, first, channels);
  for (std::int64_t e = 0; e < channels; e += kFloatChannels) {
    float* const A = states_of(p, states, e / kFloatChannels);
    float* const h = A + (p.dstate + 1) * kFloatChannels;
    if (p.chunk_states != nullptr && t % kSelectiveScanChunk == 0)
      write_states(
          p, h, channels_of(p, first + e),
          p.chunk_states +
              ((b * p.chunks + t / kSelectiveScanChunk) * p.channels + first + e) * p.dstate);
    for (std::int64_t v = 0; v < kFloatChannels && e + v < channels; v += kLanes)
      advance_vector(p, row, valid, A + v, h + v, tile, e + v);
  }
  walk_rows(p, tile, false, row, valid, first, channels);
  for (int i = valid; i < tokens; ++i)
    for (std::int64_t e = first; e < first + channels; ++e) p.y[(row + i) * p.y_stride + e] = 0.0F;
}

// Sequence b, `groups` times kFloatChannels channels from `first` on. Tokens lie kilobytes apart,
// so that each operand of each token is on a page of its own: a tile of tokens goes through all
// pieces before the next one, and the pages stay known. More tokens in a tile have more pages than
// the processor knows. `scratch` has room for a tile, and two times N + 1 kFloatChannels per group.
void run(const FloatScan& p, std::int64_t b, std::int64_t first, std::int64_t groups,
         float* scratch) {
  const Tile tile = {scratch, scratch + kTile * kRowStride, scratch + 2 * kTile * kRowStride};
  float* const states = scratch + 3 * kTile * kRowStride;
  const std::int64_t size = (p.dstate + 1) * kFloatChannels;
  for (std::int64_t g = 0; g < groups; ++g) {
    float* const A = states_of(p, states, g);
    begin_group(p, b, first + g * kFloatChannels, A, A + size);
  }
  constexpr std::int64_t kPiece = kFloatGroup / kFloatChannels;
  for (std::int64_t t = 0; t < p.seqlen; t += kTile)
    for (std::int64_t g = 0; g < groups; g += kPiece) {
      const std::int64_t from = first + g * kFloatChannels;
      const std::int64_t left = p.channels - from;
      const std::int64_t room = (groups - g < kPiece ? groups - g : kPiece) * kFloatChannels;
      run_piece(p, b, from, left < room ? left : room, t, states_of(p, states, g), tile);
    }
  if (p.state_out == nullptr) return;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t from = first + g * kFloatChannels;
    write_states(p, states_of(p, states, g) + size, channels_of(p, from),
                 p.state_out + (b * p.channels + from) * p.dstate);
  }
}

}  // namespace LRNN_ISA
