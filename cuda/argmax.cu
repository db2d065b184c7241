// A block owns neighbouring columns of one row, a thread kVectors times 16 bytes of them, from the
// last address before the row on that 16 divides: rows of an odd number of columns begin anywhere.
// What is compared among threads is (ordered key, index) in 64 bits, whose maximum does not depend
// on the order. A second kernel joins the parts, one warp for each row. A greedy sample with a
// repetition penalty is the same of other numbers. Bound by L2 or DRAM for many rows, by the
// launches for few: in a chain on an H200 rows of 50277 in bfloat16 take 2.4 us, 16 of them 3.0,
// 128 of them 4.9 (2.6 TB/s, from L2); with a penalty 2.9, 3.7 and 7.1.
#include <cmath>

#include "lrnn/ops/argmax.hpp"

#include "common/best_candidate.cuh"
#include "common/launch.cuh"
#include "common/penalised_argmax.hpp"
#include "common/vec.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kJoinThreads = 128;

/// Of a block.
template <class T, int kVectors>
constexpr int kColumns = kVectors * kThreads * kWide<T>;

/// Logits are compared as they are.
struct NoPenalty {
  [[nodiscard]] NoPenalty from_row(std::int64_t) const { return {}; }
  template <int N>
  [[nodiscard]] __device__ __forceinline__ unsigned seen_of(std::int64_t, int) const {
    return 0;
  }
  template <int N>
  __device__ __forceinline__ void apply(float (&)[N], unsigned) const {}
  __device__ __forceinline__ void mark(std::int64_t, std::int32_t) const {}
};

/// Those of the tokens in a mask count for less; what is found joins it.
struct Penalty {
  std::int32_t* masks;
  std::int64_t words;  // of a row
  float factor, inverse;

  [[nodiscard]] Penalty from_row(std::int64_t r) const {
    return {masks + r * words, words, factor, inverse};
  }
  /// Bit i: whether the mask has token `column` + i, for i < N <= 8.
  template <int N>
  [[nodiscard]] __device__ __forceinline__ unsigned seen_of(std::int64_t row, int column) const {
    const std::int32_t* const mask = masks + row * words;
    const auto low = static_cast<unsigned>(mask[column / 32]);
    const auto high = static_cast<unsigned>(mask[(column + N - 1) / 32]);
    return __funnelshift_r(low, high, column) & ((1U << N) - 1U);
  }
  template <int N>
  __device__ __forceinline__ void apply(float (&v)[N], unsigned seen) const {
    if (seen == 0) return;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if ((seen >> i & 1U) != 0) v[i] *= v[i] > 0.0F ? inverse : factor;
  }
  __device__ __forceinline__ void mark(std::int64_t row, std::int32_t id) const {
    masks[row * words + id / 32] |= static_cast<std::int32_t>(1U << (id % 32));
  }
};

/// The greatest value of a thread, NaN left out, and where it is first.
struct Greatest {
  float value = -INFINITY;
  int where = 0;

  /// Elements of columns [column, column + N), which come behind the others.
  template <class T, int N, class Rule>
  __device__ __forceinline__ void add(const Packed<T, N>& logits, int column, const Rule& rule,
                                      unsigned seen) {
    float v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = logits.get(i);
    rule.apply(v, seen);
    float most = v[0];
#pragma unroll
    for (int i = 1; i < N; ++i) most = fmaxf(most, v[i]);
    if (!(most > value)) return;
    value = most;
#pragma unroll
    for (int i = N - 1; i >= 0; --i)
      if (v[i] == most) where = column + i;
  }
  [[nodiscard]] __device__ __forceinline__ std::uint64_t candidate() const {
    return detail::pack_candidate(detail::ordered_key(value), static_cast<std::uint32_t>(where));
  }
};

template <class T, int kVectors, class Rule>
__global__ __launch_bounds__(kThreads) void argmax_part_kernel(const T* logits, std::int64_t stride,
                                                               int vocab_size, Rule rule,
                                                               std::uint64_t* parts) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int N = kWide<T>;
  const T* const row = logits + static_cast<std::int64_t>(blockIdx.y) * stride;
  const int before = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) / sizeof(T) % N);
  const int first = static_cast<int>(blockIdx.x) * kColumns<T, kVectors> - before +
                    static_cast<int>(threadIdx.x) * N;
  Packed<T, N> vectors[kVectors];
  unsigned seen[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int column = first + j * kThreads * N;
    if (column < 0 || column + N > vocab_size) continue;
    vectors[j].load(row + column);
    seen[j] = rule.template seen_of<N>(blockIdx.y, column);
  }
  Greatest greatest;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int column = first + j * kThreads * N;
    if (column >= 0 && column + N <= vocab_size) {
      greatest.add(vectors[j], column, rule, seen[j]);
      continue;
    }
#pragma unroll 1
    for (int i = max(column, 0); i < min(column + N, vocab_size); ++i) {
      Packed<T, 1> one;
      one.load(row + i);
      greatest.add(one, i, rule, rule.template seen_of<1>(blockIdx.y, i));
    }
  }
  const std::uint64_t best = block_best<kThreads>(greatest.candidate());
  if (threadIdx.x == 0) parts[std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = best;
}

template <class Rule>
__global__ __launch_bounds__(kJoinThreads) void argmax_join_kernel(const std::uint64_t* parts,
                                                                   int count, std::int64_t rows,
                                                                   Rule rule, std::int32_t* ids) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t row =
      (static_cast<std::int64_t>(blockIdx.x) * kJoinThreads + threadIdx.x) / 32;
  if (row >= rows) return;
  std::uint64_t best = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32)
    best = max_candidate(best, parts[row * count + i]);
  best = warp_best(best);
  if (threadIdx.x % 32 != 0) return;
  const std::int32_t id = detail::index_of_best(best);
  ids[row] = id;
  rule.mark(row, id);
}

template <class T, int kVectors, class Rule>
void forward(Context& ctx, const ArgmaxForward& a, const Rule& rule, std::int64_t rows) {
  const std::int64_t vocab_size = a.logits.dim(-1);
  const std::int64_t stride = detail::row_stride(a.logits);
  // A row begins up to a vector less one behind its first block.
  constexpr int kBefore = kWide<T> - 1;
  const auto count =
      static_cast<int>((vocab_size + kBefore + kColumns<T, kVectors> - 1) / kColumns<T, kVectors>);
  Tensor partial = ctx.empty({rows, count}, DType::int64);
  auto* const parts = reinterpret_cast<std::uint64_t*>(partial.view().data<std::int64_t>());
  const cudaStream_t stream = ctx.stream().handle;
  constexpr std::int64_t kMostRows = 65535;  // of the second dimension of a grid
  for (std::int64_t r = 0; r < rows; r += kMostRows)
    launch_overlapped(
        argmax_part_kernel<T, kVectors, Rule>,
        dim3(static_cast<unsigned>(count), static_cast<unsigned>(std::min(rows - r, kMostRows))),
        kThreads, 0, stream, a.logits.data<T>() + r * stride, stride, static_cast<int>(vocab_size),
        rule.from_row(r), parts + r * count);
  constexpr int kPerBlock = kJoinThreads / 32;
  launch_overlapped(argmax_join_kernel<Rule>,
                    static_cast<unsigned>((rows + kPerBlock - 1) / kPerBlock), kJoinThreads, 0,
                    stream, parts, count, rows, rule, a.ids.data<std::int32_t>());
}

template <class Rule>
void forward(Context& ctx, const ArgmaxForward& a, const Rule& rule) {
  const std::int64_t vocab_size = a.logits.dim(-1);
  const std::int64_t rows = a.logits.numel() / vocab_size;
  if (rows == 0) return;
  visit_float("argmax_forward", a.logits.dtype(), [&]<class T>() {
    // Few rows on as many blocks as possible, the blocks of many all at once.
    constexpr std::int64_t kFewRows = 32;
    if (rows <= kFewRows)
      forward<T, 1>(ctx, a, rule, rows);
    else
      forward<T, 4>(ctx, a, rule, rows);
  });
}

}  // namespace

void argmax_forward(Context& ctx, const ArgmaxForward& a) {
  forward(ctx, a, NoPenalty{});
}

void penalised_argmax(Context& ctx, const SampleForward& a, const detail::SamplePlan& plan) {
  const Penalty penalty{.masks = a.seen.data<std::int32_t>(),
                        .words = seen_words(a.logits.dim(-1)),
                        .factor = plan.penalty,
                        .inverse = plan.inverse_penalty};
  forward(ctx, {.logits = a.logits, .ids = a.ids}, penalty);
}

}  // namespace lrnn::cuda
