/// Two products of few rows whose sums meet in one epilogue: gates of the same channel, the real
/// and the imaginary part of a drive, or two terms of a sum.
#pragma once

#include "common/linear_few_rows.cuh"
#include "common/linear_sm90.cuh"

namespace lrnn::cuda::few_rows {

// Of a block, for each of two products: two blocks of most warps are resident, so that the blocks
// of 32 rows and 768 columns are so together.
constexpr int kMaxWarpsOfTwo = 6;

/// Two products with the same columns, whose x and depth may differ: some warps of a block do the
/// first, the others the second. The epilogue gets both sums of a row and column.
template <class T, int kRows, class Epilogue, class Norm>
__global__ __launch_bounds__(64 * kMaxWarpsOfTwo, sizeof(T) == 2 ? 2 : 1) void two_products_kernel(
    Args<T> all_a, Args<T> all_b, int a_warps, Epilogue epilogue, Norm norm) {
  constexpr int kSums = kRows * kPitch<1>;
  constexpr int kPerLane = sizeof(T) == 2 ? kRows / 8 : kRows;
  extern __shared__ float sums[];
  let_next_kernel_start();
  const RowGroup<T> group(all_a, kRows);
  const Args<T>& a = group.rows;
  const Args<T> b = RowGroup<T>(all_b, kRows).rows;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int warp = thread / 32;
  const int warps = threads / 32;
  const int column = static_cast<int>(blockIdx.x) * kColumns;
  const int count = a.rows * kColumns;
  const auto exists = [&](int k) { return k < count && column + k % kColumns < a.columns; };
  if constexpr (requires { epilogue.prefetch(0, 0); })
    for (int k = thread; k < count; k += threads)
      if (exists(k)) epilogue.prefetch(group.first + k / kColumns, column + k % kColumns);
  OperandsOf<Epilogue> operands;
  const auto load = [&](int k) {
    if (exists(k)) operands.load(epilogue, group.first + k / kColumns, column + k % kColumns);
  };
  const bool second = warp >= a_warps;
  const Args<T> mine = second ? b : a;
  const Part part = second ? part_of_warp<T>(mine.depth, warp - a_warps, warps - a_warps)
                           : part_of_warp<T>(mine.depth, warp, a_warps);
  const auto on_inputs = [&] { load(thread); };
  auto* const parts = reinterpret_cast<NormedPart*>(sums + warps * kSums);
  if constexpr (Norm::kNorm)
    warp_sums_of_normed(mine, norm, group.first, norm.stores() && !second, column, part,
                        thread % 32, sums + warp * kSums, parts[warp], on_inputs);
  else
    warp_sums<1, kPerLane>(mine, column, part, thread % 32, sums + warp * kSums, on_inputs);
  __syncthreads();
#pragma unroll 1
  for (int k = thread; k < count;) {
    const float* const at = sums + k / kColumns * kPitch<1> + k % kColumns;
    float sum[2] = {};
    for (int w = 0; w < a_warps; ++w) sum[0] += at[w * kSums];
    for (int w = a_warps; w < warps; ++w) sum[1] += at[w * kSums];
    if constexpr (Norm::kNorm) {
      const int r = k / kColumns;
      const float rstd = rstd_of(norm, parts, a_warps, r);
      for (float& s : sum) s *= rstd;
      if (norm.rstd != nullptr && norm.stores() && k % kColumns == 0)
        norm.rstd[group.first + r] = rstd;
    }
    if (exists(k))
      operands.finish(epilogue, group.first + k / kColumns, column + k % kColumns, sum[0], sum[1]);
    k += threads;
    load(k);
  }
}

/// Whether a product is done here if its epilogue saves launches: then it may read the weight
/// twice, unless that is large.
template <class T>
bool fuses(TensorView x, TensorView weight) {
#ifdef LRNN_WITH_SM90A
  // A small weight of little depth is slower here by less than a launch.
  const bool small = weight.dim(1) <= 128 && weight.numel() <= kSmallWeight;
  if (!small && linear_sm90::applies(x, weight) && linear_sm90::streams(weight)) return false;
#endif
  return applies<T>(x, weight, 2 * kMaxRows<T>);
}

template <class T>
int warps_of_two(int depth) {
  return std::min(warps_of<T>(depth), kMaxWarpsOfTwo);
}

/// With a norm a.x is b.x.
template <class T, class Epilogue, class Norm = AsTheyAre>
void launch_two(cudaStream_t stream, const Args<T>& a, const Args<T>& b, const Epilogue& epilogue,
                const Norm& norm = {}) {
  const int a_warps = warps_of_two<T>(a.depth);
  const int warps = a_warps + warps_of_two<T>(b.depth);
  visit_sizes(a, norm, [&]<int kTiles, int kRows>() {
    launch_overlapped(two_products_kernel<T, kRows, Epilogue, Norm>,
                      dim3(blocks_of<1>(a.columns), groups_of<kRows>(a.rows)),
                      static_cast<unsigned>(32 * warps), shared_of<1, kRows, Norm>(warps), stream,
                      a, b, a_warps, epilogue, norm);
  });
}

}  // namespace lrnn::cuda::few_rows
