/// What the Hopper kernels of attention share: sizes and roles of a block, tails of tiles, results.
#pragma once

#include "common/attention_mma.cuh"
#include "common/attention_sm90.cuh"
#include "common/wgmma.cuh"

namespace lrnn::cuda::attention {

/// Compile-time sizes: padded head dimension, warpgroups that compute, of 64 rows each, streamed
/// rows of a tile, buffers.
template <int kDim_, int kConsumers_, int kCols_, int kStages_>
struct TileSizes {
  static constexpr int kDim = kDim_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kCols = kCols_;
  static constexpr int kStages = kStages_;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kPanels = kDim / kPanel;
  static constexpr int kColTiles = kCols / 8;
  static constexpr int kDimTiles = kDim / 8;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  // Of a thread; together they are the registers the block starts with.
  static constexpr int kCopyRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kProductRegisters = kConsumers == 2 ? 240 : 160;
};

/// This thread's warpgroup, in a form that the compiler knows to be the same in a warp.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

/// Shares a block out: one thread of its first warpgroup calls copy(), the other warpgroups
/// compute(number among them).
template <class Z, class Shared, class Copy, class Compute>
__device__ __forceinline__ void share_out(const Shared& mem, Copy&& copy, Compute&& compute) {
  if (threadIdx.x == 0) mem.init_barriers();
  __syncthreads();
  const int group = warpgroup();
  if (group == 0) {
    give_registers<Z::kCopyRegisters>();
    if (threadIdx.x == 0) copy();
  } else {
    take_registers<Z::kProductRegisters>();
    compute(group - 1);
  }
}

/// Copies one head's rows from `row` on: kPanels boxes of kPanelBytes.
template <int kPanels, int kPanelBytes>
__device__ __forceinline__ void copy_rows(std::uint32_t to, const CUtensorMap* map,
                                          std::uint32_t barrier, int head, int row, int b) {
#pragma unroll
  for (int p = 0; p < kPanels; ++p)
    copy_box(to + static_cast<std::uint32_t>(p * kPanelBytes), map, barrier, p * kPanel, head, row,
             b);
}

/// Clears the rows of a tile from row `valid` on; `thread` of a warpgroup. Values at padding may be
/// anything, and 0 times infinity is no 0.
template <int kPanels, int kPanelBytes>
__device__ __forceinline__ void clear_tail(std::uint32_t tile, int valid, int thread) {
#pragma unroll
  for (int p = 0; p < kPanels; ++p)
    for (int at = valid * kPanelRowBytes + thread * 16; at < kPanelBytes; at += kWarpgroup * 16)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                       tile + static_cast<std::uint32_t>(p * kPanelBytes + at)),
                   "r"(0)
                   : "memory");
}

/// Fragments of all columns of C tiles.
template <int kTiles>
__device__ __forceinline__ void pack_tiles(std::uint32_t (&a)[kTiles / 2][4],
                                           const float (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles / 2; ++i) pack_fragment(a[i], c, i);
}

template <int kTiles>
__device__ __forceinline__ void clear_tiles(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0.0F;
}

/// Starts c = a b^T; `a` and `b` are tiles of kPanels panels. The caller commits.
template <int kPanels, int kPanelBytesA, int kPanelBytesB, int kTiles>
__device__ __forceinline__ void start_product_transposed(float (&c)[kTiles][4], std::uint32_t a,
                                                         std::uint32_t b) {
  const std::uint64_t left = panel_descriptor(a, 16);
  const std::uint64_t right = panel_descriptor(b, 16);
#pragma unroll
  for (int step = 0; step < 4 * kPanels; ++step)
    multiply_shared<false, false>(c, advance(left, step / 4 * kPanelBytesA + step % 4 * 32),
                                  advance(right, step / 4 * kPanelBytesB + step % 4 * 32),
                                  step > 0);
}

/// Starts c += a b; `a` are fragments, `b` a tile of 16 kSteps rows. The caller commits.
template <int kPanelBytes, int kSteps, int kTiles>
__device__ __forceinline__ void start_product(float (&c)[kTiles][4],
                                              const std::uint32_t (&a)[kSteps][4],
                                              std::uint32_t b) {
  const std::uint64_t right = panel_descriptor(b, kPanelBytes);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    multiply_registers(c, a[step], advance(right, step * 16 * kPanelRowBytes));
}

/// Writes 16 rows of a warp, the first of which is `row`: rows[row + i] = c[i] factor[i], zero from
/// row `valid` on, nothing from row `limit` on.
template <int kTiles>
__device__ __forceinline__ void store_rows(const DeviceRows<bf16>& rows, int row, int valid,
                                           int limit, int dim, const float (&c)[kTiles][4],
                                           const float (&factor)[2], int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + half * 8 + lane / 4;
    if (r >= limit) continue;
    bf16* const to = rows.row(r) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (n * 8 < dim)
        *reinterpret_cast<std::uint32_t*>(to + n * 8) =
            r < valid ? pack_bf16(c[n][2 * half] * factor[half], c[n][2 * half + 1] * factor[half])
                      : 0U;
  }
}

}  // namespace lrnn::cuda::attention
