// A block owns kPart neighbouring columns of one row, thread i of it columns i, i + kThreads, ...
// as (ordered key, index) in 64 bits, whose maximum does not depend on the order. A second kernel
// joins the parts, one warp for each row. Bound by DRAM for many rows, by the launches for few.
#include "lrnn/ops/argmax.hpp"

#include "common/best_candidate.cuh"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPart = 8 * kThreads;
constexpr int kJoinThreads = 128;

template <class T>
__global__ __launch_bounds__(kThreads) void argmax_part_kernel(const T* logits, std::int64_t stride,
                                                               int vocab_size,
                                                               std::uint64_t* parts) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const T* const row = logits + static_cast<std::int64_t>(blockIdx.y) * stride;
  const int first = static_cast<int>(blockIdx.x) * kPart + static_cast<int>(threadIdx.x);
  std::uint32_t greatest = 0;
  int where = -1;
#pragma unroll
  for (int j = 0; j < kPart / kThreads; ++j) {
    const int i = first + j * kThreads;
    const std::uint32_t key = i < vocab_size ? detail::ordered_key(to_float(row[i])) : 0;
    if (key > greatest) where = i;  // of equal keys the lowest index, as i only grows
    greatest = max(greatest, key);
  }
  const std::uint64_t own =
      where < 0 ? 0 : detail::pack_candidate(greatest, static_cast<std::uint32_t>(where));
  const std::uint64_t best = block_best<kThreads>(own);
  if (threadIdx.x == 0) parts[std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = best;
}

__global__ __launch_bounds__(kJoinThreads) void argmax_join_kernel(const std::uint64_t* parts,
                                                                   int count, std::int64_t rows,
                                                                   std::int32_t* ids) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t row =
      (static_cast<std::int64_t>(blockIdx.x) * kJoinThreads + threadIdx.x) / 32;
  if (row >= rows) return;
  std::uint64_t best = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32)
    best = max_candidate(best, parts[row * count + i]);
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) ids[row] = detail::index_of_best(best);
}

}  // namespace

void argmax_forward(Context& ctx, const ArgmaxForward& a) {
  const std::int64_t vocab_size = a.logits.dim(-1);
  const std::int64_t rows = a.logits.numel() / vocab_size;
  if (rows == 0) return;
  const auto count = static_cast<int>((vocab_size + kPart - 1) / kPart);
  Tensor partial = ctx.empty({rows, count}, DType::int64);
  auto* const parts = reinterpret_cast<std::uint64_t*>(partial.view().data<std::int64_t>());
  const cudaStream_t stream = ctx.stream().handle;
  visit_float("argmax_forward", a.logits.dtype(), [&]<class T>() {
    const std::int64_t stride = detail::row_stride(a.logits);
    constexpr std::int64_t kMostRows = 65535;  // of the second dimension of a grid
    for (std::int64_t r = 0; r < rows; r += kMostRows)
      launch_overlapped(
          argmax_part_kernel<T>,
          dim3(static_cast<unsigned>(count), static_cast<unsigned>(std::min(rows - r, kMostRows))),
          kThreads, 0, stream, a.logits.data<T>() + r * stride, stride,
          static_cast<int>(vocab_size), parts + r * count);
  });
  constexpr int kPerBlock = kJoinThreads / 32;
  launch_overlapped(argmax_join_kernel, static_cast<unsigned>((rows + kPerBlock - 1) / kPerBlock),
                    kJoinThreads, 0, stream, parts, count, rows, a.ids.data<std::int32_t>());
}

}  // namespace lrnn::cuda
