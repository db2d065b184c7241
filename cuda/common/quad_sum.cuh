/// Sums over the four lanes of a quad, lanes 4 i .. 4 i + 3 of a warp, by tensor cores: products
/// with a matrix of zeros and ones cost one instruction for four numbers per lane, where shuffles
/// and selections need about 18.
///
/// Fragments of mma.m16n8k8 in TF32, with g = lane / 4 and c = lane % 4: A [16, 8] is (g, c),
/// (g + 8, c), (g, c + 4), (g + 8, c + 4); B [8, 8] is (c, g), (c + 4, g); D [16, 8] is (g, 2 c),
/// (g, 2 c + 1), (g + 8, 2 c), (g + 8, 2 c + 1). With the numbers of a lane as A, B picks the
/// columns of D that receive their sums, so that D collects those of four turns.
#pragma once

#include <cstdint>

namespace lrnn::cuda {

constexpr int kQuadTurns = 4;

/// d += a b, a in the order of four numbers per lane and turn.
__device__ __forceinline__ void add_quad_product(float (&d)[4], const float (&v)[4], float b0,
                                                 float b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(v[0])), "r"(__float_as_uint(v[2])), "r"(__float_as_uint(v[1])),
        "r"(__float_as_uint(v[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}

/// Adds v over the quad into `sum` of its lane `turn`, 0 <= turn < kQuadTurns. A product sees 11
/// bits of a number; kExact adds the rest in a second one, which leaves errors of 2^-22.
template <bool kExact>
__device__ __forceinline__ void add_quad(float (&sum)[4], const float (&v)[4], int turn) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#if __CUDA_ARCH__ >= 800
  const float b0 = lane / 4 == 2 * turn ? 1.0F : 0.0F;
  const float b1 = lane / 4 == 2 * turn + 1 ? 1.0F : 0.0F;
  if constexpr (kExact) {
    float high[4];
    float low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = __uint_as_float(__float_as_uint(v[i]) & 0xFFFFE000U);
      low[i] = v[i] - high[i];
    }
    add_quad_product(sum, low, b0, b1);
    add_quad_product(sum, high, b0, b1);
  } else {
    add_quad_product(sum, v, b0, b1);
  }
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float s = v[i] + __shfl_xor_sync(0xFFFFFFFFU, v[i], 1);
    s += __shfl_xor_sync(0xFFFFFFFFU, s, 2);
    if (lane % 4 == turn) sum[i] += s;
  }
#endif
}

}  // namespace lrnn::cuda
