/// Elementwise kernels over row-strided operands: a grid-stride loop over vectors of a row.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda {

template <class T>
DeviceRows<const T> device_rows(TensorView t) {
  return {t.data<T>(), detail::row_stride(t)};
}
template <class T>
DeviceRows<T> device_rows(MutableTensorView t) {
  return {t.data<T>(), detail::row_stride(t)};
}

constexpr int kElementThreads = 256;

/// Blocks of a grid-stride loop over `items`: a constant bound, the same on every device.
inline unsigned element_blocks(std::int64_t items) {
  return static_cast<unsigned>(std::clamp<std::int64_t>(
      (items + kElementThreads - 1) / kElementThreads, 1, std::int64_t{1} << 14));
}

/// Calls f(row, first column) for every group of N columns of every row. kActivations: f writes
/// nothing that a kernel may take for a parameter.
template <int N, bool kActivations, class F>
__global__ __launch_bounds__(kElementThreads) void for_each_vector_kernel(std::int64_t rows,
                                                                          std::int64_t width, F f) {
  if constexpr (kActivations) let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t per_row = width / N;
  const std::int64_t count = rows * per_row;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kElementThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
       i < count; i += step) {
    const std::int64_t row = per_row == 1 ? i : i / per_row;
    f(row, (i - row * per_row) * N);
  }
}

/// The same for rows so long that blocks need not share them: without a division per vector, which
/// costs more than a narrow access.
template <int N, bool kActivations, class F>
__global__ __launch_bounds__(kElementThreads) void for_each_long_row_kernel(std::int64_t rows,
                                                                            std::int64_t width,
                                                                            F f) {
  if constexpr (kActivations) let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kElementThreads * N;
  for (std::int64_t row = blockIdx.y; row < rows; row += gridDim.y)
    for (std::int64_t c =
             (static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * N;
         c < width; c += step)
      f(row, c);
}

template <int N, bool kActivations = false, class F>
void for_each_vector(cudaStream_t stream, std::int64_t rows, std::int64_t width, F f) {
  constexpr std::int64_t kLongRow = 16 * kElementThreads;  // vectors
  if (width / N >= kLongRow && rows > 1) {
    const dim3 blocks(element_blocks(width / N / 4),
                      static_cast<unsigned>(std::min<std::int64_t>(rows, 1 << 14)));
    return launch_overlapped(for_each_long_row_kernel<N, kActivations, F>, blocks, kElementThreads,
                             0, stream, rows, width, f);
  }
  launch_overlapped(for_each_vector_kernel<N, kActivations, F>, element_blocks(rows * (width / N)),
                    kElementThreads, 0, stream, rows, width, f);
}

}  // namespace lrnn::cuda
