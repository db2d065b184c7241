/// Product of few rows with a weight, y = x W^T (+ bias) or y += x W^T: one token of each sequence
/// of a batch. The time is that of reading W, once.
///
/// A block owns kTiles groups of eight columns of y, that is, of rows of W. Its warps share K. Lane
/// 4 g + c of a warp reads the c-th 16 of every 64 bytes of rows g, g + 8, ... of W and of x, and
/// multiplies them from registers; x comes from the caches, as every block reads it. The sums of
/// the warps are added in their order.
///
/// How K is cut depends on N and K alone, so the bits of a row of y are the same beside any other
/// rows and on any device of a kind.
#pragma once

#include <algorithm>
#include <climits>

#include "common/capability.cuh"
#include "common/mma.cuh"
#include "common/rows.cuh"

namespace lrnn::cuda::few_rows {

constexpr int kColumns = 8;    // of y that a warp reads at a time
constexpr int kLanes = 4;      // that read neighbouring parts of a row of W
constexpr int kAhead = 3;      // loads of a row of W that a thread has in flight
constexpr int kMaxWarps = 16;  // of a block

/// Elements of a row of W that a warp reads at a time: 64 bytes, 16 in each of kLanes.
template <class T>
constexpr int kStep = 64 / static_cast<int>(sizeof(T));
/// Most rows of a product. Tensor cores take 16; float32 has one accumulator for each row.
template <class T>
constexpr int kMaxRows = sizeof(T) == 2 ? 16 : 4;

template <class T>
struct Args {
  DeviceRows<const T> x;       ///< [rows, depth]
  DeviceRows<const T> weight;  ///< [columns, depth]
  const T* bias;               ///< [columns], or null
  DeviceRows<T> y;             ///< [rows, columns]
  int rows, columns, depth;    ///< kWide<T> divides depth
  bool accumulate;             ///< y += instead of y =
};

/// The part of `depth` that a warp takes: [first, last).
struct Part {
  int first, last;
};
template <class T>
__device__ __forceinline__ Part part_of_warp(int depth, int warp, int warps) {
  const int steps = (depth + kStep<T> - 1) / kStep<T>;
  const int width = (steps + warps - 1) / warps * kStep<T>;
  return {min(warp * width, depth), min((warp + 1) * width, depth)};
}

/// Distance of rows of sums: eight words more than a row of 16 or 32, so that rows written together
/// hit different banks.
template <int kTiles>
constexpr int kPitch = kTiles > 1 ? 8 * kTiles + 8 : 8;

/// kCount rows, kSpacing apart, of which a thread reads kWide<T> elements at a time. The last row
/// stands for those behind it: what comes of them is not written.
template <class T, int kCount, int kSpacing>
struct RowReader {
  const T* row[kCount];

  __device__ __forceinline__ RowReader(const DeviceRows<const T>& rows, int first, int count) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) row[i] = rows.row(min(first + i * kSpacing, count - 1));
  }
  /// Elements from column k on, 0 unless `valid`.
  __device__ __forceinline__ void load(Packed<T, kWide<T>> (&to)[kCount], int k, bool valid) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[i] = {};
      if (valid) to[i].load(row[i] + k);
    }
  }
};

/// Sums of a warp on tensor cores: x is A, with rows up to 8 kHalves, and eight rows of W are B.
///
/// A k step of mma wants elements 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 from lane 4 g + c. It gets
/// 8 c .. 8 c + 3 of both operands, the next step 8 c + 4 .. 8 c + 7: the order of a sum is free.
template <int kTiles, int kHalves>
__device__ __forceinline__ void sum_part(const Args<bf16>& a, int column, Part part, int lane,
                                         float (&sums)[kTiles][4]) {
  constexpr int kElements = kWide<bf16>;
  const int group = lane / kLanes;
  const int offset = lane % kLanes * kElements;
  const RowReader<bf16, kTiles, kColumns> weight(a.weight, column + group, a.columns);
  const RowReader<bf16, kHalves, 8> input(a.x, group, a.rows);
#pragma unroll 1
  for (int k0 = part.first; k0 < part.last; k0 += kAhead * kStep<bf16>) {
    Packed<bf16, kElements> x[kAhead][kHalves];
    Packed<bf16, kElements> w[kAhead][kTiles];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = k0 + i * kStep<bf16> + offset;
      weight.load(w[i], k, k < part.last);
      input.load(x[i], k, k < part.last);
    }
    __syncwarp();  // else loads go between the products, to save registers, and wait for them
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t* const low = x[i][0].words + 2 * half;
        const std::uint32_t* const high = x[i][kHalves - 1].words + 2 * half;
        const std::uint32_t rows[4] = {low[0], kHalves == 2 ? high[0] : 0, low[1],
                                       kHalves == 2 ? high[1] : 0};
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          multiply_add(sums[t], rows, w[i][t].words[2 * half], w[i][t].words[2 * half + 1]);
      }
  }
}

/// A warp's sums go to `sums` [8 kHalves, kPitch] of its own.
template <int kTiles, int kHalves>
__device__ __forceinline__ void warp_sums(const Args<bf16>& a, int column, Part part, int lane,
                                          float* sums) {
  float c[kTiles][4] = {};
  sum_part<kTiles, kHalves>(a, column, part, lane, c);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float* const to =
          sums + (lane / 4 + half * 8) * kPitch<kTiles> + t * kColumns + lane % kLanes * 2;
      to[0] = c[t][2 * half];
      to[1] = c[t][2 * half + 1];
    }
}

/// The same in float32, for up to kRows rows. Lane 4 g + c adds the elements of its offset; the
/// four of a column are added in a butterfly.
template <int kTiles, int kRows>
__device__ __forceinline__ void warp_sums(const Args<float>& a, int column, Part part, int lane,
                                          float* sums) {
  constexpr int kElements = kWide<float>;
  const int group = lane / kLanes;
  const int offset = lane % kLanes * kElements;
  const RowReader<float, kTiles, kColumns> weight(a.weight, column + group, a.columns);
  const RowReader<float, kRows, 1> input(a.x, 0, a.rows);
  float acc[kTiles][kRows] = {};
#pragma unroll 1
  for (int k0 = part.first; k0 < part.last; k0 += kAhead * kStep<float>) {
    Packed<float, kElements> w[kAhead][kTiles];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = k0 + i * kStep<float> + offset;
      weight.load(w[i], k, k < part.last);
    }
    __syncwarp();  // as above; x, which the sums wait for as well, comes from the caches sooner
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = k0 + i * kStep<float> + offset;
      Packed<float, kElements> x[kRows];
      input.load(x, k, k < part.last);
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < kElements; ++e)
            acc[t][r] = fmaf(x[r].get(e), w[i][t].get(e), acc[t][r]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = acc[t][r];
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2)
        sum += __shfl_xor_sync(0xFFFFFFFFU, sum, distance);
      if (lane % kLanes == 0) sums[r * kPitch<kTiles> + t * kColumns + group] = sum;
    }
}

/// kRows: 8 or 16 in bfloat16. Dynamic shared memory: kRows kPitch floats for each warp.
template <class T, int kTiles, int kRows>
__global__ __launch_bounds__(32 * kMaxWarps) void product_kernel(Args<T> a) {
  constexpr int kWidth = kTiles * kColumns;
  constexpr int kSums = kRows * kPitch<kTiles>;
  extern __shared__ float sums[];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int column = static_cast<int>(blockIdx.x) * kWidth;
  constexpr int kPerLane = sizeof(T) == 2 ? kRows / 8 : kRows;
  warp_sums<kTiles, kPerLane>(a, column, part_of_warp<T>(a.depth, warp, warps), lane,
                              sums + warp * kSums);
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < a.rows * kWidth;
       i += static_cast<int>(blockDim.x)) {
    const int r = i / kWidth;
    const int c = i % kWidth;
    if (column + c >= a.columns) continue;
    float sum = 0.0F;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) sum += sums[w * kSums + r * kPitch<kTiles> + c];
    T* const y = a.y.row(r) + column + c;
    if (a.bias != nullptr) sum += to_float(a.bias[column + c]);
    if (a.accumulate) sum += to_float(*y);
    *y = from_float<T>(sum);
  }
}

/// Whether device and operands suit the kernel: few rows, those of x and W in 16-byte accesses.
template <class T>
bool applies(TensorView x, TensorView weight) {
  const std::int64_t rows = detail::row_count(x);
  const std::int64_t columns = weight.dim(0);
  const std::int64_t depth = x.dim(-1);
  constexpr int kMargin = 1 << 16;  // sums of sizes that the kernel takes in 32 bits
  return rows > 0 && rows <= kMaxRows<T> && std::max(columns, depth) <= INT_MAX - kMargin &&
         allows_vectors(x.data<T>(), depth, rows > 1 ? detail::row_stride(x) : 0, kWide<T>) &&
         allows_vectors(weight.data<T>(), depth, columns > 1 ? detail::row_stride(weight) : 0,
                        kWide<T>) &&
         (sizeof(T) == 4 || has_mma());
}

/// Warps of a block: what a warp reads fits in the loads that it has in flight, if kMaxWarps do.
template <class T>
int warps_of(int depth) {
  constexpr int kPerWarp = kAhead * kStep<T>;
  return std::min((depth + kPerWarp - 1) / kPerWarp, kMaxWarps);
}

/// Calls f.operator()<kTiles, kRows>(). More tiles where there are enough blocks without, because
/// every block reads all of x; four of float32 would fill the registers. Neither changes a sum.
template <class T, class F>
void visit_sizes(const Args<T>& a, F&& f) {
  const auto visit_rows = [&]<int kTiles>() {
    if constexpr (sizeof(T) == 2)
      return a.rows > 8 ? f.template operator()<kTiles, 16>() : f.template operator()<kTiles, 8>();
    else
      return a.rows > 2   ? f.template operator()<kTiles, 4>()
             : a.rows > 1 ? f.template operator()<kTiles, 2>()
                          : f.template operator()<kTiles, 1>();
  };
  if constexpr (sizeof(T) == 2)
    if (a.columns >= 16384) return visit_rows.template operator()<4>();
  if (a.columns >= 4096) return visit_rows.template operator()<2>();
  visit_rows.template operator()<1>();
}

}  // namespace lrnn::cuda::few_rows
