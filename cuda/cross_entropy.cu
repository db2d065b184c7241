// Cross-entropy over rows of logits.
//
// A block owns a row. One pass over the real columns keeps a running maximum and sum per thread,
// merged over the block in a fixed order. The gradient pass rereads the row: a long one from shared
// memory, where its first pass left it, since the rows of all blocks together exceed L2; a short
// one from L2. Bound by HBM: the row in, its gradient out. Columns beyond vocab_size never count.
// Counts and the mean loss are one block each, with a fixed-order tree.
#include <algorithm>

#include "lrnn/ops/cross_entropy.hpp"

#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kStashThreads = 1024;  // of the one block of an SM whose shared memory holds a row
constexpr int kInFlight = 4;         // accesses of a thread on their way
constexpr int kReduceThreads = 1024;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

/// bfloat16 kernels have no time for more than the hardware's exponential; its error, 9e-8 |v|, is
/// far below the rounding of a logit.
template <class T>
__device__ __forceinline__ float exponential(float v) {
  if constexpr (sizeof(T) == 4) return expf(v);
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v * 1.44269504F));
  return y;
}

/// log sum exp of some elements: top + log(sum).
struct Partial {
  float top;
  float sum;
};

/// Sums beside a maximum of minus infinity are 0, or NaN if an element was. Symmetric to the last
/// bit, hence no contraction: both lanes of a butterfly get the same.
__device__ __forceinline__ Partial merge(Partial a, Partial b) {
  const float top = fmaxf(a.top, b.top);
  if (top == kNegativeInfinity) return {top, a.sum + b.sum};
  return {top, __fadd_rn(__fmul_rn(a.sum, expf(a.top - top)), __fmul_rn(b.sum, expf(b.top - top)))};
}
__device__ __forceinline__ Partial merge_warp(Partial p) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    p = merge(p, {__shfl_xor_sync(0xFFFFFFFFU, p.top, offset),
                  __shfl_xor_sync(0xFFFFFFFFU, p.sum, offset)});
  return p;
}
/// Every warp merges what the warps found, so all threads hold the same bits.
__device__ __forceinline__ Partial merge_block(Partial p, Partial* slots) {
  p = merge_warp(p);
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) slots[threadIdx.x / 32] = p;
  __syncthreads();
  return merge_warp(lane < blockDim.x / 32 ? slots[lane] : Partial{kNegativeInfinity, 0.0F});
}

/// Adds the elements of one access; the sum is rescaled at most once per access.
template <class T, int N>
__device__ __forceinline__ void add(Partial& p, const float (&z)[N]) {
  float top = p.top;
#pragma unroll
  for (int i = 0; i < N; ++i) top = fmaxf(top, z[i]);
  if (top != p.top) p.sum *= expf(p.top - top);
  p.top = top;
  const float base = top == kNegativeInfinity ? 0.0F : top;
#pragma unroll
  for (int i = 0; i < N; ++i) p.sum += exponential<T>(z[i] - base);
}

template <class T>
struct Rows {
  const T* logits;
  std::int64_t stride;
  const std::int32_t* targets;
  std::int64_t vocab, width;
};

/// Leaves the whole accesses of the row in `stash` if kStash.
template <class T, int kN, bool kStash>
__device__ __forceinline__ float log_sum_exp(const T* z, std::int64_t vocab, uint4* stash,
                                             Partial* slots) {
  Partial p{kNegativeInfinity, 0.0F};
  const std::int64_t step = static_cast<std::int64_t>(blockDim.x) * kN;
  const std::int64_t dense = vocab / kN * kN;
  for (std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kN; first < dense;
       first += step * kInFlight) {
    Packed<T, kN> raw[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * step < dense) raw[i].load(z + first + i * step);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::int64_t v = first + i * step;
      if (v >= dense) break;
      if constexpr (kStash)
        stash[v / kN] =
            make_uint4(raw[i].words[0], raw[i].words[1], raw[i].words[2], raw[i].words[3]);
      float values[kN];
#pragma unroll
      for (int c = 0; c < kN; ++c) values[c] = raw[i].get(c);
      add<T>(p, values);
    }
  }
  for (std::int64_t v = dense + threadIdx.x; v < vocab; v += blockDim.x) {
    const float value[1] = {to_float(z[v])};
    add<T>(p, value);
  }
  p = merge_block(p, slots);
  return p.top + logf(p.sum);
}

/// dz = factor (exp(z - lse) - [v = target]), 0 beyond the vocabulary and where the target is
/// ignored. dz may be z: an element is read and written by one thread. With kStash the logits come
/// from `stash`, where the same thread left them.
template <class T, int kN, bool kStash>
__device__ __forceinline__ void gradient_row(const T* z, const uint4* stash, std::int32_t target,
                                             float lse, float factor, std::int64_t vocab,
                                             std::int64_t width, T* dz) {
  const bool ignored = target == kIgnoreIndex;
  const std::int64_t step = static_cast<std::int64_t>(blockDim.x) * kN;
  const std::int64_t dense = ignored ? 0 : vocab / kN * kN;
  const bool owner = target >= 0 && target < dense && target / kN % blockDim.x == threadIdx.x;
  const float own = owner ? to_float(z[target]) : 0.0F;  // before dz takes its place
  for (std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kN; first < dense;
       first += step * kInFlight) {
    Packed<T, kN> raw[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::int64_t v = first + i * step;
      if (v >= dense) break;
      if constexpr (kStash)
        raw[i].load(reinterpret_cast<const T*>(stash + v / kN));
      else
        raw[i].load(z + v);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::int64_t v = first + i * step;
      if (v >= dense) break;
      float values[kN];
#pragma unroll
      for (int c = 0; c < kN; ++c) values[c] = factor * exponential<T>(raw[i].get(c) - lse);
      store_packed<T, kN>(dz + v, values);
    }
  }
  if (owner) dz[target] = from_float<T>(factor * (exponential<T>(own - lse) - 1.0F));
  for (std::int64_t v = dense + threadIdx.x; v < width; v += blockDim.x) {
    float value = 0.0F;
    if (!ignored && v < vocab) {
      value = exponential<T>(to_float(z[v]) - lse);
      value = factor * (v == target ? value - 1.0F : value);
    }
    dz[v] = from_float<T>(value);
  }
}

template <class T, int kN, bool kStash>
__global__ __launch_bounds__(kStash ? kStashThreads
                                    : kThreads) void forward_kernel(Rows<T> a, float* losses,
                                                                    float* lse_out,
                                                                    const float* scale, T* dlogits,
                                                                    std::int64_t gradient_stride) {
  extern __shared__ uint4 stash[];
  __shared__ Partial slots[32];
  __shared__ float target_logit;
  const std::int64_t row = blockIdx.x;
  const T* const z = a.logits + row * a.stride;
  const std::int32_t target = a.targets[row];
  const bool counts = target >= 0 && target < a.vocab;
  if (threadIdx.x == 0) target_logit = counts ? to_float(z[target]) : 0.0F;
  const float lse = log_sum_exp<T, kN, kStash>(z, a.vocab, stash, slots);  // a barrier lies in it
  if (threadIdx.x == 0) {
    losses[row] = counts ? lse - target_logit : 0.0F;
    if (lse_out != nullptr) lse_out[row] = lse;
  }
  if (dlogits == nullptr) return;
  gradient_row<T, kN, kStash>(z, stash, target, lse, scale != nullptr ? *scale : 1.0F, a.vocab,
                              a.width, dlogits + row * gradient_stride);
}

template <class T, int kN>
__global__ __launch_bounds__(kThreads) void backward_kernel(Rows<T> a,
                                                            const float* __restrict__ dlosses,
                                                            const float* __restrict__ lse,
                                                            T* dlogits,
                                                            std::int64_t gradient_stride) {
  const std::int64_t row = blockIdx.x;
  gradient_row<T, kN, false>(a.logits + row * a.stride, nullptr, a.targets[row], lse[row],
                             dlosses[row], a.vocab, a.width, dlogits + row * gradient_stride);
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

struct Block {
  unsigned threads = kThreads;
  std::size_t shared = 0;  // bytes for the row; 0: it is read twice
};

/// A block that keeps a row of `vocab` columns, n per access, if it is long and fits. As many
/// threads per SM whether one block fits or two.
Block stash_block(std::int64_t vocab, int n) {
  constexpr std::size_t kLong = std::size_t{32} << 10;  // four shorter rows per SM stay in L2
  constexpr std::size_t kStatic = 1024;                 // what the kernel takes itself, and more
  int device = 0;
  int most = 0;
  int all = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  LRNN_CUDA_CHECK(
      cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  const std::size_t bytes = static_cast<std::size_t>((vocab + n - 1) / n) * sizeof(uint4);
  const std::size_t needed = bytes + kStatic;
  if (bytes <= kLong || needed > static_cast<std::size_t>(most)) return {};
  const bool two = 2 * (needed + kStatic) <= static_cast<std::size_t>(all);
  return {static_cast<unsigned>(two ? kThreads : kStashThreads), bytes};
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
    T* const dlogits = a.dlogits ? a.dlogits.data<T>() : nullptr;
    const std::int64_t stride = a.dlogits ? detail::row_stride(a.dlogits) : 0;
    const auto launch = [&](auto kernel, Block block) {
      if (block.shared > 0)
        LRNN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(block.shared)));
      kernel<<<static_cast<unsigned>(a.logits.dim(0)), block.threads, block.shared,
               ctx.stream().handle>>>(rows, a.losses.data<float>(),
                                      a.lse ? a.lse.data<float>() : nullptr,
                                      a.scale ? a.scale.data<float>() : nullptr, dlogits, stride);
      LRNN_CUDA_CHECK_LAUNCH();
    };
    if (!takes_vectors(rows, static_cast<const T*>(dlogits), stride)) {
      launch(forward_kernel<T, 1, false>, Block{});
      return;
    }
    const Block block = dlogits != nullptr ? stash_block(a.vocab_size, kWide<T>) : Block{};
    if (block.shared > 0)
      launch(forward_kernel<T, kWide<T>, true>, block);
    else
      launch(forward_kernel<T, kWide<T>, false>, block);
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
