// One block owns one row: thread i takes columns i, i + kThreads, ... as (ordered key, index) in 64
// bits, whose maximum does not depend on the order. Bound by DRAM for many rows, by the bandwidth
// of one multiprocessor for one row.
#include "lrnn/ops/argmax.hpp"

#include "common/best_candidate.cuh"
#include "common/check.cuh"
#include "common/dtype.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda {
namespace {

constexpr int kThreads = 512;

template <class T>
__global__ __launch_bounds__(kThreads) void argmax_forward_kernel(const T* __restrict__ logits,
                                                                  std::int64_t stride,
                                                                  int vocab_size,
                                                                  std::int32_t* __restrict__ ids) {
  const T* const row = logits + static_cast<std::int64_t>(blockIdx.x) * stride;
  std::uint64_t best = 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < vocab_size; i += kThreads)
    best = max_candidate(best, detail::pack_candidate(detail::ordered_key(to_float(row[i])),
                                                      static_cast<std::uint32_t>(i)));
  best = block_best<kThreads>(best);
  if (threadIdx.x == 0) ids[blockIdx.x] = detail::index_of_best(best);
}

}  // namespace

void argmax_forward(Context& ctx, const ArgmaxForward& a) {
  const std::int64_t vocab_size = a.logits.dim(-1);
  const std::int64_t rows = a.logits.numel() / vocab_size;
  if (rows == 0) return;
  visit_float("argmax_forward", a.logits.dtype(), [&]<class T>() {
    argmax_forward_kernel<T><<<static_cast<unsigned>(rows), kThreads, 0, ctx.stream().handle>>>(
        a.logits.data<T>(), detail::row_stride(a.logits), static_cast<int>(vocab_size),
        a.ids.data<std::int32_t>());
    LRNN_CUDA_CHECK_LAUNCH();
  });
}

}  // namespace lrnn::cuda
