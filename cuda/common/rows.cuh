/// Elementwise kernels over row-strided operands: a grid-stride loop over vectors of a row.
#pragma once

#include <algorithm>

#include "common/check.cuh"
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

/// Calls f(row, first column) for every group of N columns of every row.
template <int N, class F>
__global__ __launch_bounds__(kElementThreads) void for_each_vector_kernel(std::int64_t rows,
                                                                          std::int64_t width, F f) {
  const std::int64_t per_row = width / N;
  const std::int64_t count = rows * per_row;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kElementThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
       i < count; i += step) {
    const std::int64_t row = per_row == 1 ? i : i / per_row;
    f(row, (i - row * per_row) * N);
  }
}

template <int N, class F>
void for_each_vector(cudaStream_t stream, std::int64_t rows, std::int64_t width, F f) {
  for_each_vector_kernel<N>
      <<<element_blocks(rows * (width / N)), kElementThreads, 0, stream>>>(rows, width, f);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
