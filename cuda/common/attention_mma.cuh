/// Tiles of the tensor core kernels of attention: bfloat16 rows in shared memory.
#pragma once

#include "common/attention.cuh"
#include "common/mma.cuh"

namespace lrnn::cuda::attention {

constexpr float kLog2e = 1.44269504088896340736F;
constexpr float kLn2 = 0.69314718055994530942F;

/// Row distance in elements: 16 bytes more than a row, so that the eight rows of a matrix load hit
/// different banks for every supported kDim.
template <int kDim>
constexpr int kPitch = kDim + 8;

/// Starts loading rows [first, first + kRows), zero from row `limit` and column `dim` on. Complete
/// after a commit, a wait and a barrier.
template <int kRows, int kDim, int kThreads>
__device__ __forceinline__ void load_tile(bf16* tile, const DeviceRows<const bf16>& rows, int first,
                                          int limit, int dim, bool vectors) {
  constexpr int kChunks = kDim / 8;
  static_assert(kRows * kChunks % kThreads == 0 || kRows * kChunks < kThreads || kDim % 32 == 0);
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks;
    const int c = i % kChunks * 8;
    bf16* const to = tile + r * kPitch<kDim> + c;
    const bool valid = first + r < limit && c < dim;
    const bf16* const from = valid ? rows.row(first + r) + c : rows.data;
    if (vectors) {
      copy_async_16(to, from, valid);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        to[e] = valid && c + e < dim ? from[e] : __float2bfloat16_rn(0.0F);
    }
  }
}

/// Writes the C tiles of one warp, whose first row is `row`: rows[row + i] = c[i] factor[i], zero
/// from row `valid` on, nothing from row `limit` on. `col` is the first column.
template <int kRows, int kCols>
__device__ __forceinline__ void store_tiles(const DeviceRows<bf16>& rows, int row, int valid,
                                            int limit, int col, int dim, bool vectors,
                                            const float (&c)[kRows][kCols][4],
                                            const float (&factor)[kRows][2], int lane) {
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + m * 16 + half * 8 + lane / 4;
      if (r >= limit) continue;
      bf16* const to = rows.row(r);
#pragma unroll
      for (int n = 0; n < kCols; ++n) {
        const int d = col + n * 8 + lane % 4 * 2;
        const float x = r < valid ? c[m][n][2 * half] * factor[m][half] : 0.0F;
        const float y = r < valid ? c[m][n][2 * half + 1] * factor[m][half] : 0.0F;
        if (vectors) {
          if (d < dim) *reinterpret_cast<std::uint32_t*>(to + d) = pack_bf16(x, y);
        } else {
          if (d < dim) to[d] = __float2bfloat16_rn(x);
          if (d + 1 < dim) to[d + 1] = __float2bfloat16_rn(y);
        }
      }
    }
}

template <int kRows, int kCols>
__device__ __forceinline__ void clear(float (&c)[kRows][kCols][4]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int n = 0; n < kCols; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0.0F;
}

/// Maximum and sum over the four lanes that share a row of a C tile.
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFU, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xFFFFFFFFU, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xFFFFFFFFU, v, 1);
  return v + __shfl_xor_sync(0xFFFFFFFFU, v, 2);
}

}  // namespace lrnn::cuda::attention
