/// Whole chunks of dplr_scan as products of matrices, on tensor cores.
///
/// Of a head, the transition is one matrix for all tokens and sequences. So over a chunk of Q
/// tokens, from the state X that enters it,
///   y  = T u + G X,    T_ji = 2 Re C M^(j-i) b (+ D if i = j),    G_j = 2 Re C M^(j+1),
///   X' = E u + M^Q X,  E_i = M^(Q-1-i) b,
/// where kColumns sequences or segments are the columns of u and X. Of M^Q = d^Q + R the diagonal
/// is applied in float32, as an increment like e, because slow states live by it;
///   R = -sum_j d^(Q-1-j) w <k, M^j .>.
/// All other maps, [Q + 2 N, Q + 2 N] for a head, are made in double.
///
/// A float32 is the sum of three bfloat16, 8 bits each; of the nine products the six largest are
/// added up, those of one size in an accumulator of their own.
///
/// N is padded to 8, 16 or 32. Rows and columns of the maps: tokens, then tiles of 16 of eight
/// states, first their real parts.
#pragma once

#include "common/dplr_scan.cuh"
#include "common/mma.cuh"

namespace lrnn::cuda::dplr {

constexpr int kTokenTiles = kChunk / 16;
constexpr int kTileStates = 8;  // of a tile of 16 rows

template <int kStates>
constexpr int kMapTiles = kTokenTiles + kStates / kTileStates;
template <int kStates>
constexpr int kMapRows = 16 * kMapTiles<kStates>;

/// Calls f with the padded number of states.
template <class F>
void visit_padded_states(std::int64_t states, F&& f) {
  using std::integral_constant;
  if (states <= 8) return f(integral_constant<int, 8>{});
  if (states <= 16) return f(integral_constant<int, 16>{});
  return f(integral_constant<int, 32>{});
}

/// Of all heads.
struct ChunkTable {
  float* maps;       // [H, rows, rows]
  float4* diagonal;  // [H, padded N]: d^Q - 1 and what rounding took from it
};
/// Owns the memory of a table.
struct ChunkMemory {
  Tensor maps;
  Tensor diagonal;

  ChunkTable table() {
    return {maps.view().data<float>(), reinterpret_cast<float4*>(diagonal.view().data<float>())};
  }
};
/// `reverse`: all maps transposed, which take (dy, adjoint of X') to (du, adjoint of X).
ChunkMemory make_chunk_table(Context& ctx, const Sizes& s, const Parameters& parameters,
                             bool reverse);

/// Powers of the transition over a segment, in the direction of the table; see CarryArgs.
Tensor make_segment_powers(Context& ctx, const Sizes& s, const ChunkTable& table);

/// Maps, [2 Q, Q + 2 N] of every head, to the products of all tokens of a chunk: of
/// (u, X) to s_j = <k, x_{j-1}>, then of (dy, adjoint of X') to r_j = <w, q_j>. Columns: tokens,
/// then real, then imaginary parts.
Tensor make_product_maps(Context& ctx, const Sizes& s, const Parameters& parameters);

/// A barrier of all kThreads threads of a block whose warps reach it at different places of the
/// code, by their role. Each role waits at a hardware barrier of its own, where the others only
/// arrive: that all who wait do so at one place is what synccheck asks for, and what spares the
/// compiler the tests for diverged warps that it puts around barrier.sync. A role may be one turn
/// ahead of another, so that neighbouring turns have different barriers.
template <int kThreads, int kRole, int kRoles>
__device__ __forceinline__ void meet(int turn) {
  const int first = 1 + turn % 2 * kRoles;  // barrier 0 is that of __syncthreads()
#pragma unroll
  for (int role = 0; role < kRoles; ++role)
    if (role != kRole)
      asm volatile("bar.arrive %0, %1;" ::"r"(first + role), "n"(kThreads) : "memory");
  asm volatile("bar.sync %0, %1;" ::"r"(first + kRole), "n"(kThreads) : "memory");
}

/// Three bfloat16 whose sum is x, of two numbers each, the first in the low half.
struct Split {
  std::uint32_t part[3];
};
__device__ __forceinline__ float without_high_part(float x) {
  return x - __uint_as_float(__float_as_uint(x) & 0xFFFF0000U);
}
__device__ __forceinline__ Split split(float first, float second) {
  Split s;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    s.part[i] = __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
    if (i == 2) break;
    first = without_high_part(first);
    second = without_high_part(second);
  }
  return s;
}

/// One tile of 16 rows of the maps, in registers of a warp. Of every 16 columns, lane q of four
/// holds the neighbours 4 q .. 4 q + 3: the order of a sum over columns is free.
template <int kTiles>
struct MapTile {
  std::uint32_t part[kTiles][3][4];

  __device__ MapTile(const float* rows, int lane) {
    constexpr int kRows = 16 * kTiles;
    const float* const upper = rows + lane / 4 * kRows + lane % 4 * 4;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto v = *reinterpret_cast<const float4*>(upper + half * 8 * kRows + t * 16);
        const Split low = split(v.x, v.y);
        const Split high = split(v.z, v.w);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          part[t][i][half] = low.part[i];
          part[t][i][2 + half] = high.part[i];
        }
      }
    }
  }
};

/// What the maps are applied to, [16 kTiles, kColumns], in shared memory. Lane 4 c + q of a warp
/// reads rows 4 q .. 4 q + 3 of column c of a tile at once.
template <int kTiles>
struct MapOperand {
  uint4 high[kTiles][32];  // two parts of two pairs
  uint2 low[kTiles][32];   // the third

  // Place of a lane; neighbouring columns that a warp writes lie in different banks.
  static __device__ __forceinline__ int slot(int column, int quarter) {
    return (4 * column + quarter) ^ (column / 2);
  }
  /// Rows 4 quarter .. 4 quarter + 3 of a tile.
  __device__ __forceinline__ void store(int tile, int column, int quarter, const float (&v)[4]) {
    const Split first = split(v[0], v[1]);
    const Split second = split(v[2], v[3]);
    const int at = slot(column, quarter);
    high[tile][at] = {first.part[0], second.part[0], first.part[1], second.part[1]};
    low[tile][at] = {first.part[2], second.part[2]};
  }
  /// Rows `row` and `row` + 1 of a tile, `row` even.
  __device__ __forceinline__ void store(int tile, int column, int row, float v0, float v1) {
    const Split s = split(v0, v1);
    const int at = slot(column, row / 4);
    const int pair = row / 2 % 2;
    auto* const h = reinterpret_cast<std::uint32_t*>(&high[tile][at]);
    h[pair] = s.part[0];
    h[2 + pair] = s.part[1];
    reinterpret_cast<std::uint32_t*>(&low[tile][at])[pair] = s.part[2];
  }
};

/// map * operand, as a C tile of 16 rows and kColumns columns. kExact: tiles of the operand, the
/// first ones, whose numbers are bfloat16.
template <int kTiles, int kExact>
__device__ __forceinline__ void apply_map(float (&sum)[4], const MapTile<kTiles>& map,
                                          const MapOperand<kTiles>& operand, int lane) {
  float first[2][4] = {};  // even and odd tiles: truncation adds up along a chain of products
  float second[2][4] = {};
  float third[2][4] = {};
  const int at = MapOperand<kTiles>::slot(lane / 4, lane % 4);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const uint4 high = operand.high[t][at];
    multiply_add(first[t % 2], map.part[t][0], high.x, high.y);
    multiply_add(second[0], map.part[t][1], high.x, high.y);
    multiply_add(third[t % 2], map.part[t][2], high.x, high.y);
    if (t < kExact) continue;
    const uint2 low = operand.low[t][at];
    multiply_add(second[1], map.part[t][0], high.z, high.w);
    multiply_add(third[1 - t % 2], map.part[t][1], high.z, high.w);
    multiply_add(third[t % 2], map.part[t][0], low.x, low.y);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sum[i] =
        ((third[0][i] + third[1][i]) + (second[0][i] + second[1][i])) + first[0][i] + first[1][i];
}

}  // namespace lrnn::cuda::dplr
