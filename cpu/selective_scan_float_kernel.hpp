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

// The tokens of a tile in scratch, [kTile, kPieceStride] each: some channels of their rows.
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

// Before softplus.
LRNN_INLINE void load_steps(const FloatScan& p, const Place& at, Vec* v, const int count) {
  Vec bias[kMost];
  load_vectors(p.dt + at.row * p.dt_stride + at.first, at, v, count);
  load_vectors(p.dt_bias + at.first, at, bias, count);
  LRNN_EACH v[j] += bias[j];
}
// Steps and gates take two passes along a row: e^x first, then what becomes of it. The chain of
// all operations would be twice as long, and the processor sees few of them at once.
LRNN_INLINE void exponentials_of_steps(const FloatScan& p, const Place& at, float* to,
                                       const int count) {
  Vec e[kMost];
  load_steps(p, at, e, count);
  exp_of_magnitude(e, count);
  LRNN_EACH store(to + at.at + j * kLanes, e[j]);
}
LRNN_INLINE void exponentials_of_gates(const FloatScan& p, const Place& at, float* to,
                                       const int count) {
  if (p.z == nullptr) return;
  Vec e[kMost];
  load_vectors(p.z + at.row * p.z_stride + at.first, at, e, count);
  LRNN_EACH e[j] = -e[j];
  exp(e, count);
  LRNN_EACH store(to + at.at + j * kLanes, e[j]);
}
LRNN_INLINE void read_vectors(const FloatScan& p, const Tile& tile, const Place& at,
                              const int count) {
  Vec delta[kMost];
  Vec e[kMost];
  Vec u[kMost];
  Vec D[kMost] = {};
  load_steps(p, at, delta, count);
  LRNN_EACH e[j] = load(tile.delta + at.at + j * kLanes);
  softplus(delta, e, count);
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
    load_vectors(p.z + at.row * p.z_stride + at.first, at, z, count);
    LRNN_EACH y[j] *= z[j] / (1.0F + load(tile.delta + at.at + j * kLanes));
  }
  store_vectors(p.y + at.row * p.y_stride + at.first, at, y, count);
}

// Some channels of a tile of tokens; `tokens` of them come before the end of the sequence.
struct Piece {
  std::int64_t row, first, channels;
  int tokens;
};
// Calls pass(at, second, count) of all rows, the second passes a row behind the first ones: neither
// waits for the other. Inlined, so that `second` and `count` are constants.
template <class F>
LRNN_INLINE void walk_rows(const Piece& piece, std::int64_t stride, const F& pass) {
  const auto at = [&](std::int64_t i, std::int64_t e) LRNN_INLINE_LAMBDA {
    return Place{piece.row + i, piece.first + e, piece.channels - e, e + i * stride};
  };
  for (int i = 0; i <= piece.tokens; ++i) {
    std::int64_t e = 0;
    for (; e + kMost * kLanes <= piece.channels; e += kMost * kLanes) {
      if (i < piece.tokens) pass(at(i, e), false, kMost);
      if (i > 0) pass(at(i - 1, e), true, kMost);
    }
    for (; e < piece.channels; e += kLanes) {
      if (i < piece.tokens) pass(at(i, e), false, 1);
      if (i > 0) pass(at(i - 1, e), true, 1);
    }
  }
}
inline void read_rows(const FloatScan& p, const Tile& tile, const Piece& piece) {
  walk_rows(piece, kPieceStride,
            [&](const Place& at, const bool second, const int count) LRNN_INLINE_LAMBDA {
              if (second)
                read_vectors(p, tile, at, count);
              else
                exponentials_of_steps(p, at, tile.delta, count);
            });
}
// The exponentials take the place of the steps.
inline void write_rows(const FloatScan& p, const Tile& tile, const Piece& piece) {
  walk_rows(piece, kPieceStride,
            [&](const Place& at, const bool second, const int count) LRNN_INLINE_LAMBDA {
              if (second)
                write_vectors(p, tile, at, count);
              else
                exponentials_of_gates(p, at, tile.delta, count);
            });
}

struct Fetched {
  const float* rows;
  std::int64_t stride;
};
// Fetches, of tokens [i, i + count) of a piece, the cache lines at channel e: each vector of a line
// takes a share of the operands. Rows lie too far apart for the hardware to do so.
LRNN_INLINE void fetch(const Fetched* operands, const int size, const Piece& piece, std::int64_t e,
                       std::int64_t i, const int count) {
  constexpr std::int64_t kShares = kFloatChannels / kLanes;
  if (e >= piece.channels || i + count > piece.tokens) return;
  for (std::int64_t k = e / kLanes % kShares; k < size; k += kShares) {
    const Fetched o = operands[k];
    if (o.rows == nullptr) continue;
    const float* const at = o.rows + (piece.row + i) * o.stride + piece.first + e;
    LRNN_EACH __builtin_prefetch(at + j * o.stride, 0, 2);
  }
}

// Runs `count` tokens from token i of a piece on through all states of its vector of channels at e.
// Inlined, so that `count` and `in_range` are constants.
LRNN_INLINE void advance_tokens(const FloatScan& p, const Piece& piece, std::int64_t e, int i,
                                const float* A, float* h, const Tile& tile, const int count,
                                const bool in_range) {
  const std::int64_t dstate = p.dstate;
  const std::int64_t at = e + i * kPieceStride;
  const float* B[kTokens];
  const float* C[kTokens];
  Vec delta[kTokens];
  Vec drive[kTokens];
  Vec y[kTokens];
  LRNN_EACH {
    B[j] = p.B + (piece.row + i + j) * p.B_stride;
    C[j] = p.C + (piece.row + i + j) * p.C_stride;
    delta[j] = load(tile.delta + at + j * kPieceStride);
    drive[j] = load(tile.drive + at + j * kPieceStride);
    y[j] = load(tile.y + at + j * kPieceStride);
  }
  for (std::int64_t n = 0; n < dstate; ++n) {
    const Vec log_a = load(A + n * kFloatChannels);
    Vec state = load(h + n * kFloatChannels);
    // One after the other: what waits for its operands fills the scheduler of a processor.
    LRNN_EACH {
      Vec a = delta[j] * log_a;
      if (j % 2 == 0) a = unfused(a);
      exp2_of_negative(&a, 1, in_range);
      state = a * state + drive[j] * B[j][n];
      y[j] += state * C[j][n];
    }
    store(h + n * kFloatChannels, state);
  }
  LRNN_EACH store(tile.y + at + j * kPieceStride, y[j]);
}
// Takes the vector of channels at e of a piece through its tokens, and fetches what lies there in
// the next one. A, times log2(e) and with the least of all N after them, and h are
// [N + 1, kFloatChannels] and begin with these.
LRNN_INLINE void advance_vector(const FloatScan& p, const Piece& piece, const Piece& next,
                                std::int64_t e, const float* A, float* h, const Tile& tile,
                                const bool in_range) {
  const Fetched operands[] = {
      {p.u, p.u_stride}, {p.dt, p.dt_stride}, {p.z, p.z_stride}, {p.y, p.y_stride}};
  int i = 0;
  for (; i + kTokens <= piece.tokens; i += kTokens) {
    fetch(operands, 4, next, e, i, kTokens);
    advance_tokens(p, piece, e, i, A, h, tile, kTokens, in_range);
  }
  for (; i < piece.tokens; ++i) advance_tokens(p, piece, e, i, A, h, tile, 1, in_range);
}
// The bound of exponents is a fifteenth of the work of a state, and models seldom reach it.
inline void advance(const FloatScan& p, const Piece& piece, const Piece& next, std::int64_t e,
                    const float* A, float* h, const Tile& tile) {
  Vec longest = {};
  for (int i = 0; i < piece.tokens; ++i)
    longest = LRNN_MAX(longest, load(tile.delta + e + i * kPieceStride));
  if (all_at_least(longest * load(A + p.dstate * kFloatChannels), kLeastExponent))
    advance_vector(p, piece, next, e, A, h, tile, true);
  else
    advance_vector(p, piece, next, e, A, h, tile, false);
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

// `groups` times kFloatChannels channels of sequence b from `first` on.
struct Item {
  std::int64_t b, first, groups;
};
constexpr std::int64_t kPieceGroups = kFloatPiece / kFloatChannels;
inline std::int64_t pieces_of_tile(const Item& item) {
  return (item.groups + kPieceGroups - 1) / kPieceGroups;
}
// Tile by tile.
inline Piece piece_of(const FloatScan& p, const Item& item, std::int64_t index) {
  const std::int64_t t = index / pieces_of_tile(item) * kTile;
  const std::int64_t first = item.first + index % pieces_of_tile(item) * kFloatPiece;
  const std::int64_t end = item.first + item.groups * kFloatChannels;
  const std::int64_t left = (end < p.channels ? end : p.channels) - first;
  const std::int64_t length = p.lengths != nullptr ? p.lengths[item.b] : p.seqlen;
  const std::int64_t tokens = length - t < kTile ? length - t : kTile;
  return {.row = item.b * p.seqlen + t,
          .first = first,
          .channels = left < kFloatPiece ? left : kFloatPiece,
          .tokens = static_cast<int>(tokens < 0 ? 0 : tokens)};
}

// `states` are those of the item, `chunk` where those before the piece go to, if anywhere.
inline void run_piece(const FloatScan& p, const Item& item, const Piece& piece, const Piece& next,
                      float* states, const Tile& tile, float* chunk) {
  read_rows(p, tile, piece);
  for (std::int64_t e = 0; e < piece.channels; e += kFloatChannels) {
    const std::int64_t first = piece.first + e;
    float* const A = states_of(p, states, (first - item.first) / kFloatChannels);
    float* const h = A + (p.dstate + 1) * kFloatChannels;
    if (chunk != nullptr) write_states(p, h, channels_of(p, first), chunk + first * p.dstate);
    for (std::int64_t v = 0; v < kFloatChannels && e + v < piece.channels; v += kLanes)
      advance(p, piece, next, e + v, A + v, h + v, tile);
  }
  write_rows(p, tile, piece);
}

inline void clear_padding(const FloatScan& p, const Item& item) {
  if (p.lengths == nullptr) return;
  const std::int64_t end = item.first + item.groups * kFloatChannels;
  for (std::int64_t t = p.lengths[item.b]; t < p.seqlen; ++t)
    for (std::int64_t e = item.first; e < end && e < p.channels; ++e)
      p.y[(item.b * p.seqlen + t) * p.y_stride + e] = 0.0F;
}

// Sequence b, `groups` times kFloatChannels channels from `first` on. Tokens lie kilobytes apart,
// so that each operand of each token is on a page of its own: a tile of tokens goes through all
// pieces before the next one, and the pages stay known. More tokens in a tile have more pages than
// the processor knows. `scratch` has room for a tile, and two times N + 1 kFloatChannels per group.
void run(const FloatScan& p, std::int64_t b, std::int64_t first, std::int64_t groups,
         float* scratch) {
  const Item item = {b, first, groups};
  const Tile tile = {scratch, scratch + kTile * kPieceStride, scratch + 2 * kTile * kPieceStride};
  float* const states = scratch + 3 * kTile * kPieceStride;
  const std::int64_t size = (p.dstate + 1) * kFloatChannels;
  for (std::int64_t g = 0; g < groups; ++g) {
    float* const A = states_of(p, states, g);
    begin_group(p, b, first + g * kFloatChannels, A, A + size);
  }
  const std::int64_t tiles = (p.seqlen + kTile - 1) / kTile;
  const std::int64_t pieces = pieces_of_tile(item);
  for (std::int64_t i = 0; i < tiles * pieces; ++i) {
    const std::int64_t t = i / pieces * kTile;
    const bool kept = p.chunk_states != nullptr && t % kSelectiveScanChunk == 0;
    float* const chunk =
        kept ? p.chunk_states + (b * p.chunks + t / kSelectiveScanChunk) * p.channels * p.dstate
             : nullptr;
    run_piece(p, item, piece_of(p, item, i), piece_of(p, item, i + 1), states, tile, chunk);
  }
  clear_padding(p, item);
  if (p.state_out == nullptr) return;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t from = first + g * kFloatChannels;
    write_states(p, states_of(p, states, g) + size, channels_of(p, from),
                 p.state_out + (b * p.channels + from) * p.dstate);
  }
}

}  // namespace LRNN_ISA
