// Sums over tokens of dplr_scan backward, by whole chunks on tensor cores.
//
// Given the state X that enters a chunk, the adjoint a of its last state, and u, g = dy of its
// tokens, the products s_j = <k, x_{j-1}> and r_j = <w, q_j> follow by maps. With them known, every
// state is a diagonal recurrence of its own,
//   x_j = d^(j+1) X + sum_{i<=j} d^(j-i) (b u_i - w s_i),
//   q_j = conj(d)^(Q-1-j) a + sum_{i>=j} conj(d)^(i-j) c g_i - sum_{i>j} conj(d)^(i-1-j) k r_i,
// c = 2 conj(C), so that all gradients are polynomials in d whose coefficients are the sums over
// chunks of a (u, s)^T, X (g, r)^T, (u, s) (g, r)^T along its diagonals, and a conj(X).
//
// One block owns one head and a share of the chunks, kGroup of them at a time, as columns of
// operands in shared memory. Four warps load and split what comes from memory, four compute s and r
// of the columns before, eight add up the products of those before these. Bound by the latency of a
// step: 358 us of B8 L2048 H768 N64 in float32 on an H200, with 864 mma for 16 chunks.
#include "common/check.cuh"
#include "common/dplr_scan_chunk.cuh"

namespace lrnn::cuda::dplr {
namespace {

constexpr int kGroup = 16;  // chunks at a time
constexpr int kMapWarps = 4;
constexpr int kSumWarps = 8;
constexpr int kLoadWarps = 4;
constexpr int kThreads = 32 * (kMapWarps + kSumWarps + kLoadWarps);
enum Role { kMapRole, kSumRole, kLoadRole, kRoles };
constexpr int kColumnsPerWarp = kGroup / kLoadWarps;
constexpr int kStages = 3;
constexpr int kFlush = 8;  // groups whose products are added up before they join the totals
constexpr std::int64_t kBlocksWanted = 512;

/// Rows of an operand: those of the map to s, of the map to r, and both results.
template <int kStates>
struct Rows {
  static constexpr int kMap = kChunk + 2 * kStates;
  static constexpr int kU = 0;
  static constexpr int kX = kChunk;
  static constexpr int kG = kMap;
  static constexpr int kA = kMap + kChunk;
  static constexpr int kS = 2 * kMap;
  static constexpr int kR = 2 * kMap + kChunk;
  static constexpr int kPitch = 2 * kMap + 2 * kChunk + 8;  // of rows read side by side
};

template <int kStates>
struct Operand {
  bf16 part[3][kGroup][Rows<kStates>::kPitch];

  /// Rows `row` and `row` + 1 of a column, `row` even.
  __device__ __forceinline__ void store(int column, int row, float v0, float v1) {
    const Split s = split(v0, v1);
#pragma unroll
    for (int i = 0; i < 3; ++i)
      *reinterpret_cast<std::uint32_t*>(&part[i][column][row]) = s.part[i];
  }
};

// The maps to s and r, split.
template <int kStates>
struct ProductMaps {
  static constexpr int kMap = Rows<kStates>::kMap;
  bf16 part[3][2 * kChunk][kMap + 8];

  __device__ void load(const float* maps, int thread) {
    for (int i = thread; i < kChunk * kMap; i += kThreads) {
      const int row = i / (kMap / 2);
      const int column = i % (kMap / 2) * 2;
      const auto v = *reinterpret_cast<const float2*>(maps + row * kMap + column);
      const Split s = split(v.x, v.y);
#pragma unroll
      for (int j = 0; j < 3; ++j)
        *reinterpret_cast<std::uint32_t*>(&part[j][row][column]) = s.part[j];
    }
  }
};

// Sums over chunks, [rows, 64] each: of a (u, s), X (g, r), (u, s) (g, r).
constexpr int kPairs = 2 * kChunk;
constexpr int kTotalPitch = kPairs + 1;
template <int kStates>
struct Totals {
  float a[2 * kStates][kTotalPitch];
  float x[2 * kStates][kTotalPitch];
  float lags[kPairs][kTotalPitch];
};
struct Fields {
  float2 e, b, w, k, C;
};
template <int kStates>
struct Shared {
  Operand<kStates> operands[kStages];
  ProductMaps<kStates> maps;
  Totals<kStates> totals;
  float2 a_conj_x[kLoadWarps][32];
  float diagonals[2][2][kChunk + 1];  // of (u, s) and (g, r), by lag; one past the last is 0
  Fields fields[kSumWarps][32];
};

template <class T>
struct KernelArgs {
  ChunkSumArgs<T> sums;
  const float* maps;
  std::int64_t groups;  // of a sequence
};

// Walks the groups of a block.
template <class T>
struct Groups {
  const KernelArgs<T>& a;
  std::int64_t share;
  int count;

  __device__ Groups(const KernelArgs<T>& args, std::int64_t row) : a(args), share(row) {
    const std::int64_t all = a.sums.sizes.batch * a.groups;
    count = static_cast<int>((all - row + a.sums.rows - 1) / a.sums.rows);
  }
  // Chunk of a column, [B, chunks], and those from it on that are whole, both of one group.
  struct Place {
    std::int64_t first;
    int whole;
  };
  [[nodiscard]] __device__ Place place(int group) const {
    if (group >= count) return {0, 0};
    const Sizes& s = a.sums.sizes;
    const int index = static_cast<int>(share) + group * static_cast<int>(a.sums.rows);
    const int batch = index / static_cast<int>(a.groups);
    const int first = index % static_cast<int>(a.groups) * kGroup;
    const int length =
        a.sums.lengths == nullptr ? static_cast<int>(s.seqlen) : a.sums.lengths[batch];
    return {batch * s.chunks + first, length / kChunk - first};
  }
};

// Lanes of the lower half hold real parts or u, the others imaginary parts or g, two each. Loads
// two groups ahead, into alternate registers. No branches: columns and states that do not exist are
// read from where others are, and become 0.
template <class T, int kStates>
class Loader {
 public:
  __device__ Loader(const Groups<T>& groups, std::int64_t head, int warp, int lane)
      : groups_(groups),
        head_(head),
        first_(warp * kColumnsPerWarp),
        half_(lane / 16),
        pair_(lane % 16 * 2),
        exists_{pair_ < groups.a.sums.sizes.states, pair_ + 1 < groups.a.sums.sizes.states} {}

  template <int kSlot>
  __device__ __forceinline__ void load(int group) {
    const ChunkSumArgs<T>& a = groups_.a.sums;
    const Sizes& s = a.sizes;
    const auto place = groups_.place(group);
    whole_[kSlot] = place.whole - first_;
    const std::int64_t state = half_ * s.plane + head_ * s.states + (exists_[0] ? pair_ : 0);
    const T* const tokens = (half_ == 0 ? a.u : a.dy) + head_ * kChunk + pair_;
    std::int64_t chunk[kColumnsPerWarp];
#pragma unroll
    for (int i = 0; i < kColumnsPerWarp; ++i)
      chunk[i] = i < whole_[kSlot] ? place.first + first_ + i : 0;
    if (s.states % 2 == 0) {  // then pairs are aligned
#pragma unroll
      for (int i = 0; i < kColumnsPerWarp; ++i) {
        const std::int64_t at = chunk[i] * 2 * s.plane + state;
        x_[kSlot][i] = *reinterpret_cast<const float2*>(a.chunk_states + at);
        adjoint_[kSlot][i] = *reinterpret_cast<const float2*>(a.adjoints + at);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumnsPerWarp; ++i) {
        const std::int64_t at = chunk[i] * 2 * s.plane + state;
        const int second = exists_[1] ? 1 : 0;
        x_[kSlot][i] = {a.chunk_states[at], a.chunk_states[at + second]};
        adjoint_[kSlot][i] = {a.adjoints[at], a.adjoints[at + second]};
      }
    }
#pragma unroll
    for (int i = 0; i < kColumnsPerWarp; ++i)
      token_[kSlot][i] = load_tokens(tokens + chunk[i] * s.heads * kChunk);
  }
  template <int kSlot>
  __device__ __forceinline__ void hand_over(Operand<kStates>& operand) {
    using R = Rows<kStates>;
#pragma unroll
    for (int i = 0; i < kColumnsPerWarp; ++i) {
      const bool whole = i < whole_[kSlot];
      const bool valid[2] = {whole && exists_[0], whole && exists_[1]};
      const float2 x = only(x_[kSlot][i], valid);
      const float2 adjoint = only(adjoint_[kSlot][i], valid);
      const bool both[2] = {whole, whole};
      const float2 token = only(token_[kSlot][i], both);
      const int column = first_ + i;
      operand.store(column, (half_ == 0 ? R::kU : R::kG) + pair_, token.x, token.y);
      if (kStates == 32 || pair_ < kStates) {
        operand.store(column, R::kX + half_ * kStates + pair_, x.x, x.y);
        operand.store(column, R::kA + half_ * kStates + pair_, adjoint.x, adjoint.y);
      }
      const float2 other{__shfl_xor_sync(kAll, x.x, 16), __shfl_xor_sync(kAll, x.y, 16)};
      same_.x = fmaf(adjoint.x, x.x, same_.x);
      same_.y = fmaf(adjoint.y, x.y, same_.y);
      cross_.x = fmaf(adjoint.x, other.x, cross_.x);
      cross_.y = fmaf(adjoint.y, other.y, cross_.y);
    }
  }
  // a conj(X), state by state.
  __device__ __forceinline__ void finish(float2* out) const {
    const float2 same{__shfl_xor_sync(kAll, same_.x, 16), __shfl_xor_sync(kAll, same_.y, 16)};
    const float2 cross{__shfl_xor_sync(kAll, cross_.x, 16), __shfl_xor_sync(kAll, cross_.y, 16)};
    if (half_ != 0) return;
    out[pair_] = {same_.x + same.x, cross.x - cross_.x};
    out[pair_ + 1] = {same_.y + same.y, cross.y - cross_.y};
  }

 private:
  [[nodiscard]] static __device__ __forceinline__ float2 only(float2 v, const bool (&valid)[2]) {
    return {valid[0] ? v.x : 0.0F, valid[1] ? v.y : 0.0F};
  }
  [[nodiscard]] static __device__ __forceinline__ float2 load_tokens(const T* at) {
    if constexpr (sizeof(T) == 4) {
      return *reinterpret_cast<const float2*>(at);
    } else {
      const auto v = *reinterpret_cast<const __nv_bfloat162*>(at);
      return {to_float(v.x), to_float(v.y)};
    }
  }

  const Groups<T>& groups_;
  std::int64_t head_;
  int first_;  // column
  int half_;
  int pair_;
  bool exists_[2];
  int whole_[2];  // own columns that are, at least, by group % 2
  float2 x_[2][kColumnsPerWarp];
  float2 adjoint_[2][kColumnsPerWarp];
  float2 token_[2][kColumnsPerWarp];
  float2 same_{0.0F, 0.0F};
  float2 cross_{0.0F, 0.0F};
};

// 16 rows of s or r.
template <int kStates>
class ProductRows {
 public:
  __device__ ProductRows(const ProductMaps<kStates>& maps, int warp, int lane)
      : maps_(maps),
        lane_(lane),
        row_(warp * 16),
        first_(warp / 2 * Rows<kStates>::kMap),
        result_(Rows<kStates>::kS + warp * 16) {}

  __device__ __forceinline__ void apply(Operand<kStates>& operand) const {
    float sum[3][2][4] = {};  // by size, for both halves of the columns
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      std::uint32_t left[3][4];
      std::uint32_t right[3][4];
#pragma unroll
      for (int j = 0; j < 3; ++j)
        load_matrices(left[j], &maps_.part[j][row_ + lane_ % 16][t * 16 + lane_ / 16 * 8]);
#pragma unroll
      for (int j = 0; j < 3; ++j)
        load_matrices(
            right[j],
            &operand.part[j][lane_ % 8 + lane_ / 16 * 8][first_ + t * 16 + lane_ / 8 % 2 * 8]);
#pragma unroll
      for (int size = 0; size < 3; ++size)
#pragma unroll
        for (int j = 0; j <= size; ++j)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            multiply_add(sum[size][n], left[size - j], right[j][2 * n], right[j][2 * n + 1]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = (sum[2][n][i] + sum[1][n][i]) + sum[0][n][i];
      store(operand, n * 8, v);
    }
  }

 private:
  static constexpr int kTiles = Rows<kStates>::kMap / 16;

  // Neighbouring rows lie in lanes 4 apart: even ones gather the first column, odd ones the second.
  __device__ __forceinline__ void store(Operand<kStates>& operand, int first_column,
                                        const float (&v)[4]) const {
    const int g = lane_ / 4;
    const bool odd = g % 2 != 0;
    const int column = first_column + lane_ % 4 * 2 + (odd ? 1 : 0);
    const int row = result_ + g - (odd ? 1 : 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float other = __shfl_xor_sync(kAll, odd ? v[2 * half] : v[2 * half + 1], 4);
      operand.store(column, row + 8 * half, odd ? other : v[2 * half],
                    odd ? v[2 * half + 1] : other);
    }
  }

  const ProductMaps<kStates>& maps_;
  int lane_;
  int row_;     // of the maps
  int first_;   // row of the operand
  int result_;  // row of the operand
};

// 16 rows times kTiles tiles of 8 columns of one of the sums of products.
template <int kStates, int kTiles>
struct ProductTiles {
  float sum[kTiles][4] = {};

  // Rows of the operand from `left` on, times those from `right`, the second half of the tiles
  // those from `second` on.
  __device__ __forceinline__ void add(const Operand<kStates>& operand, int left, int right,
                                      int second, int lane) {
    std::uint32_t a[3][4];
#pragma unroll
    for (int j = 0; j < 3; ++j)
      load_matrices_transposed(a[j],
                               &operand.part[j][lane / 16 * 8 + lane % 8][left + lane / 8 % 2 * 8]);
#pragma unroll
    for (int n = 0; n < kTiles; n += 4) {
      std::uint32_t b[2][3][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int tile = n + 2 * i;
        const int row = tile < kTiles / 2 ? right + tile * 8 : second + (tile - kTiles / 2) * 8;
#pragma unroll
        for (int j = 0; j < 3; ++j)
          load_matrices_transposed(
              b[i][j], &operand.part[j][lane / 8 % 2 * 8 + lane % 8][row + lane / 16 * 8]);
      }
#pragma unroll
      for (int size = 2; size >= 0; --size)
#pragma unroll
        for (int j = 0; j <= size; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            multiply_add(sum[n + i], a[size - j], b[i / 2][j][i % 2 * 2],
                         b[i / 2][j][i % 2 * 2 + 1]);
    }
  }
  // Joins totals from `first` on.
  __device__ __forceinline__ void flush(float* first, int lane, bool overwrite) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* const at =
            first + (lane / 4 + i / 2 * 8) * kTotalPitch + n * 8 + lane % 4 * 2 + i % 2;
        *at = overwrite ? sum[n][i] : *at + sum[n][i];
        sum[n][i] = 0.0F;
      }
  }
};

__device__ __forceinline__ float2 operator+(float2 a, float2 b) {
  return {a.x + b.x, a.y + b.y};
}
__device__ __forceinline__ float2 operator-(float2 a) {
  return {-a.x, -a.y};
}
__device__ __forceinline__ float2 operator*(float2 a, float2 b) {
  return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}
__device__ __forceinline__ float2 conj(float2 a) {
  return {a.x, -a.y};
}
__device__ __forceinline__ float2 twice(float2 a) {
  return {2.0F * a.x, 2.0F * a.y};
}

struct Polynomial {
  float2 value{0.0F, 0.0F};       // sum_i p^i v_i
  float2 derivative{0.0F, 0.0F};  // sum_i i p^(i-1) v_i
};
// v(i) for i in [0, Q]; powers of d = 1 + e.
template <class F>
__device__ __forceinline__ Polynomial polynomial(float2 e, F&& v) {
  Polynomial p;
  float2 power{1.0F, 0.0F};
  float2 before{0.0F, 0.0F};
  for (int i = 0; i <= kChunk; ++i) {
    const float2 c = v(i);
    const auto factor = static_cast<float>(i);
    p.value = p.value + power * c;
    p.derivative = p.derivative + before * float2{factor * c.x, factor * c.y};
    before = power;
    power = power + e * power;
  }
  return p;
}

// Gradients of state n from one of the eight sums.
template <class T, int kStates>
__device__ Fields fields_of(const ChunkSumArgs<T>& a, const Shared<kStates>& shared,
                            std::int64_t head, int which, int n) {
  const Sizes& s = a.sizes;
  Fields f{};
  if (n >= s.states) return f;
  const std::int64_t at = head * s.states + n;
  const auto plane = [&](const float* p) { return float2{p[at], p[s.plane + at]}; };
  const float2 e = plane(a.parameters.e);
  const float2 b = plane(a.parameters.b);
  const float2 w = plane(a.parameters.w);
  const float2 k = plane(a.parameters.k);
  const float2 c{2.0F * a.parameters.C[2 * at], -2.0F * a.parameters.C[2 * at + 1]};
  const bool of_s = which % 4 / 2 != 0;   // of lags: the left factor
  const int second = which % 2 * kChunk;  // u or s, g or r
  if (which < 2) {                        // a (u, s)
    const auto p = polynomial(e, [&](int i) {
      if (i == kChunk) return float2{0.0F, 0.0F};
      const int column = second + kChunk - 1 - i;
      return float2{shared.totals.a[n][column], -shared.totals.a[kStates + n][column]};
    });
    (which == 0 ? f.b : f.w) = which == 0 ? conj(p.value) : -conj(p.value);
    f.e = which == 0 ? conj(b * p.derivative) : -conj(w * p.derivative);
    return f;
  }
  if (which < 4) {  // X (g, r)
    const int shift = which == 2 ? 1 : 0;
    const auto p = polynomial(e, [&](int i) {
      const int token = i - shift;
      if (token < 0 || token >= kChunk) return float2{0.0F, 0.0F};
      return float2{shared.totals.x[n][second + token],
                    shared.totals.x[kStates + n][second + token]};
    });
    if (which == 2) {
      f.C = twice(conj(p.value));
      f.e = c * conj(p.derivative);
      return f;
    }
    f.k = -p.value;
    float2 power{1.0F, 0.0F};  // d^(Q-1)
    for (int i = 1; i < kChunk; ++i) power = power + e * power;
    float2 product{0.0F, 0.0F};
    for (int i = 0; i < kLoadWarps; ++i) product = product + shared.a_conj_x[i][n];
    const auto count = static_cast<float>(kChunk);
    f.e = -(k * conj(p.derivative)) + conj(power) * float2{count * product.x, count * product.y};
    return f;
  }
  const bool of_r = which % 2 != 0;
  const auto p = polynomial(e, [&](int i) {
    const int lag = of_r ? min(i + 1, kChunk) : i;
    return float2{shared.diagonals[of_s ? 1 : 0][of_r ? 1 : 0][lag], 0.0F};
  });
  const float2 input = of_s ? -w : b;
  const float2 output = of_r ? -k : c;
  const float2 forward = of_s ? -conj(p.value) : conj(p.value);
  (of_s ? f.w : f.b) = output * forward;
  if (of_r)
    f.k = -(input * p.value);
  else
    f.C = twice(conj(input * p.value));
  f.e = output * conj(input * p.derivative);
  return f;
}

template <class T, int kStates>
__device__ void write_fields(const ChunkSumArgs<T>& a, const Shared<kStates>& shared,
                             std::int64_t head, std::int64_t row, int thread) {
  const Sizes& s = a.sizes;
  constexpr int kFields = 5;
  for (int i = thread; i < kFields * 2 * 32; i += kThreads) {
    const int n = i % 32;
    const int value = i / 32;  // field and part
    if (n >= s.states) continue;
    float sum = 0.0F;
    for (int warp = 0; warp < kSumWarps; ++warp)
      sum += reinterpret_cast<const float*>(&shared.fields[warp][n])[value];
    a.partial[(row * kFields * 2 + value) * s.plane + head * s.states + n] = sum;
  }
  if (a.partial_skip != nullptr && thread == 0)
    a.partial_skip[row * s.heads + head] = shared.diagonals[0][0][0];
}

template <class T, int kStates>
__global__ __launch_bounds__(kThreads, 1) void dplr_chunk_sum_kernel(KernelArgs<T> a) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kStates>*>(memory);
  using R = Rows<kStates>;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const std::int64_t head = blockIdx.x % a.sums.sizes.heads;
  const std::int64_t row = blockIdx.x / a.sums.sizes.heads;
  const Groups<T> groups(a, row);
  shared.maps.load(a.maps + head * 2 * kChunk * R::kMap, thread);
  // In step i group i + 1 is loaded, i mapped and i - 1 summed.
  if (warp < kMapWarps) {
    const ProductRows<kStates> map(shared.maps, warp, lane);
    meet<kThreads, kMapRole, kRoles>(0);
    for (int i = 0; i <= groups.count; ++i) {
      if (i < groups.count) map.apply(shared.operands[i % kStages]);
      meet<kThreads, kMapRole, kRoles>(i + 1);
    }
  } else if (warp < kMapWarps + kSumWarps) {
    constexpr int kStateTiles = 2 * kStates / 16;
    const int own = warp - kMapWarps;
    const int tile = own % 4;
    const bool of_x = own / 4 != 0;
    const bool has_states = tile < kStateTiles;
    ProductTiles<kStates, 8> states;
    ProductTiles<kStates, 4> lags;
    float* const state_totals =
        (of_x ? &shared.totals.x[0][0] : &shared.totals.a[0][0]) + tile * 16 * kTotalPitch;
    float* const lag_totals = &shared.totals.lags[own / 2 * 16][own % 2 * kChunk];
    // Rows of (u, s) or (g, r) lie apart.
    const int states_left = (of_x ? R::kX : R::kA) + tile * 16;
    const int first_right = of_x ? R::kG : R::kU;
    const int second_right = of_x ? R::kR : R::kS;
    const int lag_left = (own / 4 == 0 ? R::kU : R::kS) + own / 2 % 2 * 16;
    const int lag_right = own % 2 == 0 ? R::kG : R::kR;
    meet<kThreads, kSumRole, kRoles>(0);
    for (int i = 0; i <= groups.count; ++i) {
      if (i > 0) {
        const auto& operand = shared.operands[(i - 1) % kStages];
        if (has_states) states.add(operand, states_left, first_right, second_right, lane);
        lags.add(operand, lag_left, lag_right, lag_right + kChunk / 2, lane);
        if (i % kFlush == 0 || i == groups.count) {
          const bool overwrite = i <= kFlush;
          if (has_states) states.flush(state_totals, lane, overwrite);
          lags.flush(lag_totals, lane, overwrite);
        }
      }
      meet<kThreads, kSumRole, kRoles>(i + 1);
    }
  } else {
    Loader<T, kStates> loader(groups, head, warp - kMapWarps - kSumWarps, lane);
    loader.template load<0>(0);
    loader.template load<1>(1);
    loader.template hand_over<0>(shared.operands[0]);
    meet<kThreads, kLoadRole, kRoles>(0);
    for (int i = 0; i <= groups.count; i += 2) {
      loader.template load<0>(i + 2);
      loader.template hand_over<1>(shared.operands[(i + 1) % kStages]);
      meet<kThreads, kLoadRole, kRoles>(1);
      if (i == groups.count) break;
      loader.template load<1>(i + 3);
      loader.template hand_over<0>(shared.operands[(i + 2) % kStages]);
      meet<kThreads, kLoadRole, kRoles>(0);
    }
    loader.finish(shared.a_conj_x[warp - kMapWarps - kSumWarps]);
  }
  __syncthreads();
  for (int i = thread; i < 2 * 2 * (kChunk + 1); i += kThreads) {
    const int lag = i % (kChunk + 1);
    const int left = i / (kChunk + 1) / 2;
    const int right = i / (kChunk + 1) % 2;
    float sum = 0.0F;
    for (int j = 0; j + lag < kChunk; ++j)
      sum += shared.totals.lags[left * kChunk + j][right * kChunk + j + lag];
    shared.diagonals[left][right][lag] = sum;
  }
  __syncthreads();
  if (warp < kSumWarps) shared.fields[warp][lane] = fields_of(a.sums, shared, head, warp, lane);
  __syncthreads();
  write_fields(a.sums, shared, head, row, thread);
}

}  // namespace

bool can_sum_chunks(std::int64_t states) {
  bool can = false;
  visit_padded_states(states, [&](auto padded) {
    can = shared_memory_per_block() >= static_cast<int>(sizeof(Shared<padded()>));
  });
  return can;
}

std::int64_t chunk_sum_rows(const Sizes& s) {
  const std::int64_t groups = s.batch * ((s.chunks + kGroup - 1) / kGroup);
  const std::int64_t wanted = (kBlocksWanted + s.heads - 1) / s.heads;
  return std::max<std::int64_t>(1, std::min(wanted, groups / 4));
}

template <class T>
void sum_chunks(Context& ctx, const ChunkSumArgs<T>& args) {
  const Sizes& s = args.sizes;
  Tensor maps = make_product_maps(ctx, s, args.parameters);
  const KernelArgs<T> a{args, maps.view().data<float>(), (s.chunks + kGroup - 1) / kGroup};
  visit_padded_states(s.states, [&](auto states) {
    constexpr auto kBytes = static_cast<int>(sizeof(Shared<states()>));
    const auto kernel = dplr_chunk_sum_kernel<T, states()>;
    LRNN_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    kernel<<<static_cast<unsigned>(s.heads * args.rows), kThreads, kBytes, ctx.stream().handle>>>(
        a);
  });
  LRNN_CUDA_CHECK_LAUNCH();
}
template void sum_chunks(Context&, const ChunkSumArgs<float>&);
template void sum_chunks(Context&, const ChunkSumArgs<__nv_bfloat16>&);

}  // namespace lrnn::cuda::dplr
