/// Sums over warps and blocks in a fixed order.
#pragma once

#include <cstdint>

#include "common/check.cuh"

namespace lrnn::cuda {

/// The sum over a warp, in every lane. The butterfly adds the same pairs in every lane, so all
/// lanes hold the same bits.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFFU, v, offset);
  return v;
}

/// The sum over a block of whole warps, in every thread. `slots` holds one float per warp and is
/// used by no other sum of the kernel unless a barrier lies between.
__device__ __forceinline__ float block_sum(float v, float* slots) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.0F;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += slots[w];
  return sum;
}

/// Rows of partial sums and where their sum goes: out[c] += sum over rows of partial[row, c], for
/// every column c < width.
struct Partials {
  const float* partial = nullptr;
  std::int64_t width = 0;
  float* out = nullptr;

  [[nodiscard]] unsigned blocks() const { return static_cast<unsigned>((width + 31) / 32); }
};

/// Both sums have the same number of rows.
///
/// A block owns 32 columns. Thread (x, y) adds rows y, y + 32, ... of column x; the 32 sums of a
/// column are then added in order.
static __global__ __launch_bounds__(1024) void fold_partials_kernel(Partials first, Partials second,
                                                                    unsigned first_blocks,
                                                                    int rows) {
  __shared__ float sums[32][33];
  const bool is_first = blockIdx.x < first_blocks;
  const unsigned block = is_first ? blockIdx.x : blockIdx.x - first_blocks;
  const float* const partial = is_first ? first.partial : second.partial;
  const std::int64_t width = is_first ? first.width : second.width;
  const std::int64_t column = static_cast<std::int64_t>(block) * 32 + threadIdx.x;
  float sum = 0.0F;
  if (column < width) {
#pragma unroll 4
    for (int r = static_cast<int>(threadIdx.y); r < rows; r += 32)
      sum += partial[r * width + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  sum = 0.0F;
  for (int y = 0; y < 32; ++y) sum += sums[y][threadIdx.x];
  (is_first ? first.out : second.out)[column] += sum;
}

/// One launch for two sums of the same rows, say of a weight and of its bias.
inline void fold_partials(cudaStream_t stream, int rows, const Partials& first,
                          const Partials& second = {}) {
  fold_partials_kernel<<<first.blocks() + second.blocks(), dim3(32, 32), 0, stream>>>(
      first, second, first.blocks(), rows);
  LRNN_CUDA_CHECK_LAUNCH();
}

inline void fold_partials(cudaStream_t stream, const float* partial, int rows, std::int64_t width,
                          float* out) {
  fold_partials(stream, rows, {partial, width, out});
}

}  // namespace lrnn::cuda
