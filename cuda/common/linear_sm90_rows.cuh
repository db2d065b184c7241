/// Sums of the blocks of a cluster, of which each has a part of K, added by rows: each block
/// finishes as many rows as the others.
///
/// A thread sends its sums, as they lie in its registers, to the thread of its number in the block
/// that finishes them. Lanes four apart, whose fragments have the same rows, then share out columns
/// that are eight apart, so that a lane finishes neighbours.
#pragma once

#include "common/linear_sm90_product.cuh"

namespace lrnn::cuda::linear_sm90 {

/// Sizes of a block of the product, and what it finishes.
template <class Base, int kParts_>
struct RowsTile : Base {
  static constexpr int kParts = kParts_;
  static constexpr int kComputers = Base::kThreads - 32;     // threads
  static constexpr int kOwn = Base::kRowTiles / kParts;      // tiles that the block finishes
  static constexpr int kOwnRows = 8 * kOwn;                  // of a warpgroup
  static constexpr int kSentBytes = kOwn * kComputers * 16;  // from one block to another
  static_assert(Base::kRowTiles % kParts == 0);
};

/// Where a block receives sums: at shared address `place` parts of K, of tiles, of threads.
template <class Z>
struct RowSums {
  std::uint32_t place, barrier;

  [[nodiscard]] __device__ __forceinline__ std::uint32_t at(int from, int tile) const {
    return place + 16U * threadIdx.x +
           static_cast<std::uint32_t>(from * Z::kSentBytes + tile * Z::kComputers * 16);
  }
  /// Hands tiles to the blocks that finish them. At any time the warps of a block send to different
  /// ones.
  __device__ __forceinline__ void send_all(const Work& w, const float (&c)[Z::kRowTiles][4]) const {
    const int warp = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / 32, 0);
#pragma unroll 1
    for (int turn = 1; turn <= Z::kParts; ++turn) {
      const int owner = (w.part + warp + turn) % Z::kParts;
      const std::uint32_t there = address_in(owner, barrier);
#pragma unroll
      for (int i = 0; i < Z::kRowTiles; ++i) {
        if (i / Z::kOwn != owner) continue;
        const std::uint32_t to = at(w.part, i % Z::kOwn);
        if (owner == w.part)
          store_shared(to, c[i]);
        else
          send(address_in(owner, to), c[i], there);
      }
    }
  }
  /// The tiles that this block finishes, when all are there, parts added in the order of K.
  __device__ __forceinline__ void add(float (&sum)[Z::kOwn][4]) const {
    barrier_wait(barrier, 0);
#pragma unroll
    for (int p = 0; p < Z::kParts; ++p)
#pragma unroll
      for (int j = 0; j < Z::kOwn; ++j) {
        float part[4];
        load_shared(part, at(p, j));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] = p == 0 ? part[e] : sum[j][e] + part[e];
      }
  }
};

/// What a lane finishes: two neighbouring columns of two neighbouring rows in every tile.
template <class Z>
struct RowsPlace {
  bool upper;  // has the upper eight of the warp's columns
  int row;     // of the block, the first
  int column;  // of the product, the first

  __device__ __forceinline__ RowsPlace(const Work& w, int group) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / 32;
    upper = lane / 4 % 2 != 0;
    row = group_row<Z>(group) + w.part * Z::kOwnRows + lane % 4 * 2;
    column = w.column + group_column<Z>(group) + warp * 16 + (upper ? 8 : 0) + lane / 8 * 2;
  }
  /// Those of row e of a tile.
  [[nodiscard]] __device__ __forceinline__ float2 neighbours(const float (&sum)[4], int e) const {
    const float low = sum[e];
    const float high = sum[2 + e];
    const float other = __shfl_xor_sync(0xFFFFFFFFU, upper ? low : high, 4);
    return upper ? float2{other, high} : float2{low, other};
  }
};

}  // namespace lrnn::cuda::linear_sm90
