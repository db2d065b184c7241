// Cross-entropy over rows of logits.
//
// A block owns a row. One pass over the real columns keeps a running maximum and sum per thread,
// merged over the block in a fixed order; the gradient pass rereads the row, which is still in L2
// (64 KB at 32k columns of bfloat16). Bound by HBM: the row in, its gradient out. Columns beyond
// vocab_size are never read. Counts and the mean loss are one block each, with a fixed-order tree.
#include <algorithm>

#include "lrnn/ops/cross_entropy.hpp"

#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kReduceThreads = 1024;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

/// log sum exp of some elements: top + log(sum).
struct Partial {
  float top;
  float sum;
};

/// Sums beside a maximum of minus infinity are 0, or NaN if an element was.
__device__ __forceinline__ Partial merge(Partial a, Partial b) {
  const float top = fmaxf(a.top, b.top);
  if (top == kNegativeInfinity) return {top, a.sum + b.sum};
  return {top, a.sum * expf(a.top - top) + b.sum * expf(b.top - top)};
}

/// Every thread folds what lane 0 of each warp found, so all hold the same bits.
__device__ __forceinline__ Partial merge_block(Partial p, Partial* slots) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    p = merge(p, {__shfl_xor_sync(0xFFFFFFFFU, p.top, offset),
                  __shfl_xor_sync(0xFFFFFFFFU, p.sum, offset)});
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = p;
  __syncthreads();
  p = slots[0];
  for (int w = 1; w < kWarps; ++w) p = merge(p, slots[w]);
  return p;
}

/// Adds the elements of one access; the sum is rescaled at most once per access.
template <int N>
__device__ __forceinline__ void add(Partial& p, const float (&z)[N]) {
  float top = p.top;
#pragma unroll
  for (int i = 0; i < N; ++i) top = fmaxf(top, z[i]);
  if (top != p.top) p.sum *= expf(p.top - top);
  p.top = top;
  const float base = top == kNegativeInfinity ? 0.0F : top;
#pragma unroll
  for (int i = 0; i < N; ++i) p.sum += expf(z[i] - base);
}

template <class T>
struct Rows {
  const T* logits;
  std::int64_t stride;
  const std::int32_t* targets;
  std::int64_t vocab, width;
};

template <class T, int kN>
__device__ float log_sum_exp(const T* z, std::int64_t vocab, Partial* slots) {
  Partial p{kNegativeInfinity, 0.0F};
  const std::int64_t dense = vocab / kN * kN;
#pragma unroll 2
  for (std::int64_t v = static_cast<std::int64_t>(threadIdx.x) * kN; v < dense;
       v += std::int64_t{kThreads} * kN) {
    float values[kN];
    load_vec<T, kN>(z + v, values);
    add(p, values);
  }
  const std::int64_t rest = dense + threadIdx.x;
  if (rest < vocab) {
    const float value[1] = {to_float(z[rest])};
    add(p, value);
  }
  p = merge_block(p, slots);
  return p.top + logf(p.sum);
}

/// dz may be z: an element is read and written by one thread.
template <class T, int kN>
__device__ void gradient_row(const T* z, std::int32_t target, float lse, float factor,
                             std::int64_t vocab, std::int64_t width, T* dz) {
  const bool ignored = target == kIgnoreIndex;
#pragma unroll 2
  for (std::int64_t v = static_cast<std::int64_t>(threadIdx.x) * kN; v < width;
       v += std::int64_t{kThreads} * kN) {
    float values[kN] = {};
    if (!ignored && v < vocab) {
      load_vec<T, kN>(z + v, values);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float p = expf(values[i] - lse);
        values[i] = v + i < vocab ? factor * (v + i == target ? p - 1.0F : p) : 0.0F;
      }
    }
    store_vec<T, kN>(dz + v, values);
  }
}

template <class T, int kN>
__global__ __launch_bounds__(kThreads) void forward_kernel(Rows<T> a, float* losses, float* lse_out,
                                                           const float* scale, T* dlogits,
                                                           std::int64_t gradient_stride) {
  __shared__ Partial slots[kWarps];
  __shared__ float target_logit;
  const std::int64_t row = blockIdx.x;
  const T* const z = a.logits + row * a.stride;
  const std::int32_t target = a.targets[row];
  const bool counts = target >= 0 && target < a.vocab;
  if (threadIdx.x == 0) target_logit = counts ? to_float(z[target]) : 0.0F;
  const float lse = log_sum_exp<T, kN>(z, a.vocab, slots);  // a barrier lies in it
  if (threadIdx.x == 0) {
    losses[row] = counts ? lse - target_logit : 0.0F;
    if (lse_out != nullptr) lse_out[row] = lse;
  }
  if (dlogits == nullptr) return;
  gradient_row<T, kN>(z, target, lse, scale != nullptr ? *scale : 1.0F, a.vocab, a.width,
                      dlogits + row * gradient_stride);
}

template <class T, int kN>
__global__ __launch_bounds__(kThreads) void backward_kernel(Rows<T> a,
                                                            const float* __restrict__ dlosses,
                                                            const float* __restrict__ lse,
                                                            T* dlogits,
                                                            std::int64_t gradient_stride) {
  const std::int64_t row = blockIdx.x;
  gradient_row<T, kN>(a.logits + row * a.stride, a.targets[row], lse[row], dlosses[row], a.vocab,
                      a.width, dlogits + row * gradient_stride);
}

/// The sum over a block of kReduceThreads threads, in thread 0.
template <class S>
__device__ S sum_block(S v, S* slots) {
  slots[threadIdx.x] = v;
  for (unsigned half = kReduceThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) slots[threadIdx.x] += slots[threadIdx.x + half];
  }
  return slots[0];
}

__global__ __launch_bounds__(kReduceThreads) void prepare_targets_kernel(
    const std::int32_t* __restrict__ targets, const std::int32_t* __restrict__ lengths,
    std::int64_t seqlen, std::int64_t count, std::int32_t* __restrict__ counted,
    float* __restrict__ scale) {
  __shared__ long long slots[kReduceThreads];
  long long sum = 0;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x; i < count; i += kReduceThreads) {
    std::int32_t target = targets[i];
    if (lengths != nullptr && i % seqlen >= lengths[i / seqlen]) target = kIgnoreIndex;
    counted[i] = target;
    sum += target == kIgnoreIndex ? 0 : 1;
  }
  sum = sum_block(sum, slots);
  if (threadIdx.x == 0) *scale = sum == 0 ? 0.0F : 1.0F / static_cast<float>(sum);
}

/// In double: 2^20 float losses lose nothing, and a block adds them in microseconds.
__global__ __launch_bounds__(kReduceThreads) void mean_loss_kernel(const float* __restrict__ losses,
                                                                   std::int64_t count,
                                                                   const float* __restrict__ scale,
                                                                   float* __restrict__ loss) {
  __shared__ double slots[kReduceThreads];
  double sum = 0.0;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x; i < count; i += kReduceThreads)
    sum += static_cast<double>(losses[i]);
  sum = sum_block(sum, slots);
  if (threadIdx.x == 0) *loss = *scale * static_cast<float>(sum);
}

template <class T, class Args>
Rows<T> rows_of(const Args& a) {
  return {.logits = a.logits.template data<T>(),
          .stride = detail::row_stride(a.logits),
          .targets = a.targets.template data<std::int32_t>(),
          .vocab = a.vocab_size,
          .width = a.logits.dim(1)};
}

/// Whether rows of logits and of their gradient, if any, take 16-byte accesses.
template <class T>
bool takes_vectors(const Rows<T>& rows, const T* dlogits, std::int64_t gradient_stride) {
  return allows_vectors(rows.logits, rows.width, rows.stride, kWide<T>) &&
         allows_vectors(dlogits, rows.width, gradient_stride, kWide<T>);
}

}  // namespace

void prepare_targets(Context& ctx, const PrepareTargets& a) {
  prepare_targets_kernel<<<1, kReduceThreads, 0, ctx.stream().handle>>>(
      a.targets.data<std::int32_t>(), a.lengths ? a.lengths.data<std::int32_t>() : nullptr,
      a.targets.dim(1), a.targets.numel(), a.counted.data<std::int32_t>(), a.scale.data<float>());
  LRNN_CUDA_CHECK_LAUNCH();
}

void cross_entropy_forward(Context& ctx, const CrossEntropyForward& a) {
  visit_float("cross_entropy_forward", a.logits.dtype(), [&]<class T>() {
    const Rows<T> rows = rows_of<T>(a);
    const auto launch = [&](auto kernel, T* dlogits, std::int64_t gradient_stride) {
      kernel<<<static_cast<unsigned>(a.logits.dim(0)), kThreads, 0, ctx.stream().handle>>>(
          rows, a.losses.data<float>(), a.lse ? a.lse.data<float>() : nullptr,
          a.scale ? a.scale.data<float>() : nullptr, dlogits, gradient_stride);
      LRNN_CUDA_CHECK_LAUNCH();
    };
    T* const dlogits = a.dlogits ? a.dlogits.data<T>() : nullptr;
    const std::int64_t stride = a.dlogits ? detail::row_stride(a.dlogits) : 0;
    if (takes_vectors(rows, static_cast<const T*>(dlogits), stride))
      launch(forward_kernel<T, kWide<T>>, dlogits, stride);
    else
      launch(forward_kernel<T, 1>, dlogits, stride);
  });
}

void cross_entropy_backward(Context& ctx, const CrossEntropyBackward& a) {
  visit_float("cross_entropy_backward", a.logits.dtype(), [&]<class T>() {
    const Rows<T> rows = rows_of<T>(a);
    T* const dlogits = a.dlogits.data<T>();
    const std::int64_t stride = detail::row_stride(a.dlogits);
    const auto launch = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(a.logits.dim(0)), kThreads, 0, ctx.stream().handle>>>(
          rows, a.dlosses.data<float>(), a.lse.data<float>(), dlogits, stride);
      LRNN_CUDA_CHECK_LAUNCH();
    };
    if (takes_vectors(rows, static_cast<const T*>(dlogits), stride))
      launch(backward_kernel<T, kWide<T>>);
    else
      launch(backward_kernel<T, 1>);
  });
}

void mean_loss(Context& ctx, const MeanLoss& a) {
  mean_loss_kernel<<<1, kReduceThreads, 0, ctx.stream().handle>>>(
      a.losses.data<float>(), a.losses.numel(), a.scale.data<float>(), a.loss.data<float>());
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
