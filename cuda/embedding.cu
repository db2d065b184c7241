// Gather of rows and its adjoint.
//
// Forward copies rows in 16-byte accesses, bound by HBM. Backward sorts (id, position) by id, which
// keeps positions in order, and cuts the sorted list into windows of kWindow entries. A block owns
// one window and some columns, a thread kN of them: it adds the rows of every run of equal ids.
// A run inside its window goes straight into dweight; the parts of a run that crosses windows go
// to partial sums, added in order by a second kernel. Every row of dy is read once.
#include <algorithm>
#include <bit>
#include <limits>

#include <cub/device/device_radix_sort.cuh>

#include "lrnn/ops/embedding.hpp"

#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

constexpr int kWindow = 32;
constexpr int kThreads = 128;
constexpr int kFoldRows = 8;

template <class T, int N>
struct GatherVector {
  const std::int32_t* ids;
  const T* weight;
  T* y;
  std::int64_t width;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    *reinterpret_cast<Vec<T, N>*>(y + r * width + c) =
        *reinterpret_cast<const Vec<T, N>*>(weight + ids[r] * width + c);
  }
};

__global__ __launch_bounds__(kThreads) void count_up_kernel(std::int32_t* out, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = static_cast<std::int32_t>(i);
}

/// The sorted list: ids ascending, positions ascending among equal ids.
struct Sorted {
  const std::uint32_t* ids;
  const std::int32_t* positions;
  std::int64_t count;
  std::int64_t vocab;
};

/// Row 2 w of `partial` holds the part of window w of a run that began before it, row 2 w + 1 that
/// of a run that begins in w and goes on behind it.
template <class T, int kN>
__global__ __launch_bounds__(kThreads) void sum_runs_kernel(Sorted s, const T* __restrict__ dy,
                                                            std::int64_t width,
                                                            float* __restrict__ dweight,
                                                            float* __restrict__ partial) {
  __shared__ std::uint32_t ids[kWindow];
  __shared__ std::int32_t positions[kWindow];
  const std::int64_t window = blockIdx.x;
  const std::int64_t first = window * kWindow;
  const int count = static_cast<int>(min(std::int64_t{kWindow}, s.count - first));
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count) {
    ids[thread] = s.ids[first + thread];
    positions[thread] = s.positions[first + thread];
  }
  __syncthreads();
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * kThreads + thread) * kN;
  if (column >= width) return;
  const bool from_before = first > 0 && s.ids[first - 1] == ids[0];
  const bool goes_on = first + count < s.count && s.ids[first + count] == ids[count - 1];
  float* const head = partial + 2 * window * width + column;
  float sum[kN] = {};
  bool first_run = true;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    float d[kN];
    load_vec<T, kN>(dy + positions[i] * width + column, d);
#pragma unroll
    for (int k = 0; k < kN; ++k) sum[k] += d[k];
    const std::uint32_t id = ids[i];
    if (i + 1 < count && ids[i + 1] == id) continue;
    if (first_run && from_before) {
      store_vec<float, kN>(head, sum);
    } else if (i + 1 == count && goes_on) {
      store_vec<float, kN>(head + width, sum);
    } else if (id < s.vocab) {
      float* const row = dweight + id * width + column;
      float old[kN];
      load_vec<float, kN>(row, old);
#pragma unroll
      for (int k = 0; k < kN; ++k) old[k] += sum[k];
      store_vec<float, kN>(row, old);
    }
    first_run = false;
#pragma unroll
    for (int k = 0; k < kN; ++k) sum[k] = 0.0F;
  }
}

/// First index in [first, count) whose id differs from that at `first`.
__device__ std::int64_t end_of_run(const Sorted& s, std::int64_t first) {
  const std::uint32_t id = s.ids[first];
  std::int64_t low = first + 1;
  std::int64_t high = s.count;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (s.ids[middle] == id)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/// A block owns 32 columns of the run that begins in its window and crosses the end of it. Thread
/// (x, y) adds the parts y, y + kFoldRows, ... of column x; these sums are then added in order.
__global__ __launch_bounds__(32 * kFoldRows) void fold_runs_kernel(
    Sorted s, std::int64_t width, const float* __restrict__ partial, float* __restrict__ dweight) {
  __shared__ float sums[kFoldRows][32];
  const std::int64_t window = blockIdx.x;
  const std::int64_t next = (window + 1) * kWindow;  // the grid leaves out the last window
  const std::uint32_t id = s.ids[next - 1];
  if (s.ids[next] != id) return;
  const std::int64_t first = window * kWindow;
  if (first > 0 && s.ids[first - 1] == id) return;  // the run began in an earlier window
  const std::int64_t last_window = (end_of_run(s, next) - 1) / kWindow;
  const std::int64_t parts = last_window - window + 1;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * 32 + threadIdx.x;
  float sum = 0.0F;
  if (column < width) {
#pragma unroll 4
    for (std::int64_t p = threadIdx.y; p < parts; p += kFoldRows) {
      const std::int64_t row = 2 * (window + p) + (p == 0 ? 1 : 0);
      sum += partial[row * width + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width || id >= s.vocab) return;
  sum = 0.0F;
  for (int y = 0; y < kFoldRows; ++y) sum += sums[y][threadIdx.x];
  dweight[id * width + column] += sum;
}

/// Sorts into `ids` and `positions`, both [count].
void sort_ids(Context& ctx, TensorView input, std::int64_t vocab, std::uint32_t* ids,
              std::int32_t* positions) {
  const cudaStream_t stream = ctx.stream().handle;
  const std::int64_t count = input.numel();
  Tensor order = ctx.empty(Shape{count}, DType::int32);
  std::int32_t* const ascending = order.view().data<std::int32_t>();
  count_up_kernel<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0,
                    stream>>>(ascending, count);
  LRNN_CUDA_CHECK_LAUNCH();
  const auto* const keys = static_cast<const std::uint32_t*>(input.raw());
  const int bits = std::max(
      1, static_cast<int>(
             std::bit_width(static_cast<std::uint64_t>(std::max<std::int64_t>(vocab, 1)) - 1)));
  const auto sort = [&](void* scratch, std::size_t& bytes) {
    LRNN_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, ids, ascending, positions,
                                                    static_cast<int>(count), 0, std::min(bits, 32),
                                                    stream));
  };
  std::size_t bytes = 0;
  sort(nullptr, bytes);
  const auto words = static_cast<std::int64_t>(bytes / sizeof(std::int32_t) + 1);
  Tensor scratch = ctx.empty(Shape{words}, DType::int32);
  sort(scratch.view().raw(), bytes);
}

template <class T>
void backward(Context& ctx, const EmbeddingBackward& a) {
  const cudaStream_t stream = ctx.stream().handle;
  const std::int64_t count = a.ids.numel();
  const std::int64_t width = a.dweight.dim(1);
  LRNN_CHECK(count <= std::numeric_limits<std::int32_t>::max(), ShapeError,
             "embedding_backward: ids: at most 2^31 - 1 tokens, got ", count);
  Tensor ids = ctx.empty(Shape{count}, DType::int32);
  Tensor positions = ctx.empty(Shape{count}, DType::int32);
  auto* const sorted_ids = static_cast<std::uint32_t*>(ids.view().raw());
  std::int32_t* const sorted_positions = positions.view().data<std::int32_t>();
  sort_ids(ctx, a.ids, a.dweight.dim(0), sorted_ids, sorted_positions);
  const Sorted s{sorted_ids, sorted_positions, count, a.dweight.dim(0)};
  const std::int64_t windows = (count + kWindow - 1) / kWindow;
  Tensor scratch = ctx.empty(Shape{windows, 2, width}, DType::float32);
  float* const partial = scratch.view().data<float>();
  const T* const dy = a.dy.data<T>();
  float* const dweight = a.dweight.data<float>();
  const auto grid = [&](std::int64_t columns) {
    return dim3(static_cast<unsigned>(windows),
                static_cast<unsigned>((width + columns - 1) / columns));
  };
  constexpr int n = 4;
  if (allows_vectors(dy, width, width, n) && allows_vectors(dweight, width, width, n) &&
      allows_vectors(partial, width, width, n))
    sum_runs_kernel<T, n>
        <<<grid(kThreads * n), kThreads, 0, stream>>>(s, dy, width, dweight, partial);
  else
    sum_runs_kernel<T, 1><<<grid(kThreads), kThreads, 0, stream>>>(s, dy, width, dweight, partial);
  LRNN_CUDA_CHECK_LAUNCH();
  if (windows == 1) return;
  const dim3 fold_grid(static_cast<unsigned>(windows - 1),
                       static_cast<unsigned>((width + 31) / 32));
  fold_runs_kernel<<<fold_grid, dim3(32, kFoldRows), 0, stream>>>(s, width, partial, dweight);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace

void embedding_forward(Context& ctx, const EmbeddingForward& a) {
  visit_float("embedding_forward", a.weight.dtype(), [&]<class T>() {
    const std::int64_t width = a.weight.dim(1);
    const std::int64_t rows = a.ids.numel();
    const std::int32_t* const ids = a.ids.data<std::int32_t>();
    const T* const weight = a.weight.data<T>();
    T* const y = a.y.data<T>();
    const cudaStream_t stream = ctx.stream().handle;
    constexpr int n = kWide<T>;
    if (allows_vectors(weight, width, width, n) && allows_vectors(y, width, width, n))
      for_each_vector<n, true>(stream, rows, width, GatherVector<T, n>{ids, weight, y, width});
    else
      for_each_vector<1, true>(stream, rows, width, GatherVector<T, 1>{ids, weight, y, width});
  });
}

void embedding_backward(Context& ctx, const EmbeddingBackward& a) {
  visit_float("embedding_backward", a.dy.dtype(), [&]<class T>() { backward<T>(ctx, a); });
}

}  // namespace lrnn::cuda
