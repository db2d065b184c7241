// One block owns one row. Every pass reads the logits again (they stay in the caches) and turns
// them into integers as the CPU does, see ops/sample_math.hpp; from there on sums and choices do
// not depend on the order of threads. The boundary of top_k and top_p is found by radix selection:
// three histograms of 11, 11 and 10 bits of the distance, with the number and the weight of the
// tokens in every bin (integer atomics in shared memory). At most 8 passes; bound by the
// instruction rate of one multiprocessor per row.
#include <algorithm>

#include "lrnn/ops/argmax.hpp"
#include "lrnn/ops/sample.hpp"

#include "common/best_candidate.cuh"
#include "common/check.cuh"
#include "common/dtype.cuh"
#include "ops/dispatch.hpp"
#include "ops/sample_math.hpp"

namespace lrnn::cuda {
namespace {

using detail::SamplePlan;
using U64 = unsigned long long;  // the type that shuffles take

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2 * kThreads;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

template <class T>
struct Row {
  const T* logits;
  const std::int32_t* seen;  // or null
  int vocab_size;
  std::uint32_t best;

  __device__ std::uint32_t key(int i, const SamplePlan& plan) const {
    return detail::penalised_key(to_float(logits[i]), seen, i, plan);
  }
  __device__ std::uint32_t distance(int i, const SamplePlan& plan) const {
    return detail::distance_of(best, key(i, plan), plan);
  }
};

// Tokens nearer than `distance`, whose number and weight are given, and the first `ties` (by
// index) of those at `distance`.
struct Boundary {
  std::uint32_t distance;
  U64 count_before;
  U64 weight_before;
};

struct Shared {
  std::uint32_t counts[kBins];
  std::uint32_t weights_low[kBins];
  std::uint32_t weights_high[kBins];
  U64 warp_counts[kWarps];
  U64 warp_weights[kWarps];
  bool found;
  int bin;
  U64 count_before;
  U64 weight_before;
};

__device__ int lane_of_thread() {
  return static_cast<int>(threadIdx.x) % 32;
}
__device__ int warp_of_thread() {
  return static_cast<int>(threadIdx.x) / 32;
}

__device__ U64 warp_inclusive_sum(U64 value) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const U64 other = __shfl_up_sync(kAllLanes, value, offset);
    if (lane_of_thread() >= offset) value += other;
  }
  return value;
}

__device__ U64 warp_sum(U64 value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// A 64-bit sum from two 32-bit atomics: whoever overflows the low word carries one.
__device__ void add_weight(Shared& shared, int bin, U64 weight) {
  const auto low = static_cast<std::uint32_t>(weight);
  const std::uint32_t before = atomicAdd(&shared.weights_low[bin], low);
  const std::uint32_t high =
      static_cast<std::uint32_t>(weight >> 32) + (before + low < before ? 1U : 0U);
  if (high != 0) atomicAdd(&shared.weights_high[bin], high);
}

// Histogram over bits [shift, shift + bits) of the distances whose bits above equal `prefix`.
template <class T>
__device__ void fill_histogram(const Row<T>& row, const SamplePlan& plan, Shared& shared,
                               std::uint32_t prefix, int shift, int bits) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) {
    shared.counts[i] = 0;
    shared.weights_low[i] = 0;
    shared.weights_high[i] = 0;
  }
  if (threadIdx.x == 0) shared.found = false;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < row.vocab_size; i += kThreads) {
    const std::uint32_t distance = row.distance(i, plan);
    if (distance >= detail::kDistanceEnd) continue;
    const std::uint32_t digits = distance >> shift;
    if ((digits >> bits) != prefix) continue;
    const auto bin = static_cast<int>(digits & ((1U << bits) - 1U));
    atomicAdd(&shared.counts[bin], 1U);
    add_weight(shared, bin, detail::weight_of(distance));
  }
  __syncthreads();
}

// The bin in which the sum from the first bin on reaches `target`. Without one, shared.found stays
// false, and the sums before it are the totals.
template <bool kByWeight>
__device__ void find_bin(Shared& shared, U64 target) {
  const int first = 2 * static_cast<int>(threadIdx.x);
  U64 counts[2];
  U64 weights[2];
  for (int k = 0; k < 2; ++k) {
    counts[k] = shared.counts[first + k];
    weights[k] = (U64{shared.weights_high[first + k]} << 32) | shared.weights_low[first + k];
  }
  U64 count = warp_inclusive_sum(counts[0] + counts[1]);
  U64 weight = warp_inclusive_sum(weights[0] + weights[1]);
  if (lane_of_thread() == 31) {
    shared.warp_counts[warp_of_thread()] = count;
    shared.warp_weights[warp_of_thread()] = weight;
  }
  __syncthreads();
  for (int w = 0; w < warp_of_thread(); ++w) {
    count += shared.warp_counts[w];
    weight += shared.warp_weights[w];
  }
  const bool last_thread = threadIdx.x == kThreads - 1;
  const bool reached = (kByWeight ? weight : count) >= target;
  if (last_thread && !reached) {
    shared.count_before = count;
    shared.weight_before = weight;
  }
  count -= counts[0] + counts[1];
  weight -= weights[0] + weights[1];
  for (int k = 0; k < 2; ++k) {
    const U64 before = kByWeight ? weight : count;
    const U64 after = before + (kByWeight ? weights[k] : counts[k]);
    if (before < target && target <= after) {  // for exactly one bin, or for none
      shared.found = true;
      shared.bin = first + k;
      shared.count_before = count;
      shared.weight_before = weight;
    }
    count += counts[k];
    weight += weights[k];
  }
  __syncthreads();
}

// The distance at which the number (or the weight) of the tokens, nearest first, reaches `target`
// >= 1; kDistanceEnd if all of them together do not.
template <bool kByWeight, class T>
__device__ Boundary select(const Row<T>& row, const SamplePlan& plan, Shared& shared, U64 target) {
  Boundary b{0, 0, 0};
  int shift = 32;
  for (const int bits : {11, 11, 10}) {
    shift -= bits;
    fill_histogram(row, plan, shared, b.distance, shift, bits);
    find_bin<kByWeight>(shared, target - (kByWeight ? b.weight_before : b.count_before));
    const bool found = shared.found;
    b.count_before += shared.count_before;
    b.weight_before += shared.weight_before;
    b.distance = found ? (b.distance << bits) | static_cast<std::uint32_t>(shared.bin)
                       : detail::kDistanceEnd;
    __syncthreads();  // before the next histogram is cleared
    if (!found) break;
  }
  return b;
}

struct Limit {
  std::uint32_t distance;
  U64 ties;
};

template <class T>
__device__ Limit apply_filters(const Row<T>& row, const SamplePlan& plan, Shared& shared) {
  Limit limit{detail::kDistanceEnd, 0};
  if (plan.top_k > 0 || plan.has_top_p) {
    const U64 count = plan.top_k > 0 ? static_cast<U64>(plan.top_k) : ~U64{0};
    Boundary b = select<false>(row, plan, shared, count);
    limit.distance = b.distance;
    U64 total = b.weight_before;
    if (b.distance < detail::kDistanceEnd) {
      limit.ties = count - b.count_before;
      total += limit.ties * detail::weight_of(b.distance);
    }
    if (plan.has_top_p) {
      const U64 target = detail::top_p_target(plan, total);
      b = select<true>(row, plan, shared, target);
      const U64 weight = detail::weight_of(b.distance);
      limit = {b.distance, (target - b.weight_before + weight - 1) / weight};
    }
  }
  if (plan.distance_end <= limit.distance) limit = {plan.distance_end, 0};
  return limit;
}

// Where the drawn number falls: the warp that owns this part of the vocabulary, what remains of the
// number there, and how many tokens at the limit are still to be kept.
struct Target {
  int warp;
  U64 number;
  U64 ties;
};

// Warp w owns columns [w, w + 1) * segment.
template <class T>
__device__ Target draw_segment(const Row<T>& row, const SamplePlan& plan, Shared& shared,
                               Limit limit, int segment, std::uint64_t seed,
                               std::uint64_t row_index, std::uint64_t counter) {
  __shared__ Target target;
  const int warp = warp_of_thread();
  const int lane = lane_of_thread();
  const int end = min(row.vocab_size, (warp + 1) * segment);
  U64 weight = 0;
  U64 ties = 0;
  for (int i = warp * segment + lane; i < end; i += 32) {
    const std::uint32_t distance = row.distance(i, plan);
    if (distance < limit.distance) weight += detail::weight_of(distance);
    if (distance == limit.distance) ties += 1;
  }
  weight = warp_sum(weight);
  ties = warp_sum(ties);
  if (lane == 0) {
    shared.warp_weights[warp] = weight;
    shared.warp_counts[warp] = ties;
  }
  __syncthreads();
  if (warp == 0) {  // lane l speaks for warp l
    static_assert(kWarps == 32);
    const U64 segment_ties = shared.warp_counts[lane];
    const U64 ties_before = warp_inclusive_sum(segment_ties) - segment_ties;
    const U64 ties_left = limit.ties > ties_before ? limit.ties - ties_before : 0;
    U64 kept = shared.warp_weights[lane];
    if (ties_left > 0) kept += min(ties_left, segment_ties) * detail::weight_of(limit.distance);
    const U64 after = warp_inclusive_sum(kept);
    const U64 total = __shfl_sync(kAllLanes, after, 31);
    const U64 number = detail::draw(seed, row_index, counter, total);
    if (after - kept <= number && number < after)  // for exactly one lane
      target = {lane, number - (after - kept), ties_left};
  }
  __syncthreads();
  return target;
}

// Called by one whole warp: the first token of its segment at which the sum exceeds the number.
template <class T>
__device__ std::int32_t draw_token(const Row<T>& row, const SamplePlan& plan, Limit limit,
                                   int segment, Target target) {
  const int lane = lane_of_thread();
  const int end = min(row.vocab_size, (target.warp + 1) * segment);
  U64 ties_before = 0;
  for (int base = target.warp * segment; base < end; base += 32) {
    const int i = base + lane;
    const std::uint32_t distance = i < end ? row.distance(i, plan) : 0xFFFFFFFFU;
    const bool tie = distance == limit.distance;
    const unsigned tied = __ballot_sync(kAllLanes, tie);
    const U64 rank = ties_before + __popc(tied & ((1U << lane) - 1U));
    const bool kept = distance < limit.distance || (tie && rank < target.ties);
    const U64 sum = warp_inclusive_sum(kept ? detail::weight_of(distance) : 0);
    const unsigned reached = __ballot_sync(kAllLanes, sum > target.number);
    if (reached != 0) return base + __ffs(static_cast<int>(reached)) - 1;
    target.number -= __shfl_sync(kAllLanes, sum, 31);
    ties_before += __popc(tied);
  }
  return 0;
}

template <class T>
__global__ __launch_bounds__(kThreads) void sample_forward_kernel(
    const T* __restrict__ logits, std::int64_t stride, int vocab_size, SamplePlan plan,
    std::uint64_t seed, std::int64_t* __restrict__ counters, std::int32_t* seen_masks,
    std::int64_t words, std::int32_t* __restrict__ ids) {
  __shared__ Shared shared;
  const std::int64_t r = blockIdx.x;
  std::int32_t* const seen = seen_masks != nullptr ? seen_masks + r * words : nullptr;
  Row<T> row{logits + r * stride, seen, vocab_size, 0};
  std::uint64_t best = 0;
  for (int i = static_cast<int>(threadIdx.x); i < vocab_size; i += kThreads)
    best = max_candidate(best,
                         detail::pack_candidate(row.key(i, plan), static_cast<std::uint32_t>(i)));
  best = block_best<kThreads>(best);
  row.best = static_cast<std::uint32_t>(best >> 32);

  // Uniform in the block.
  std::int32_t id = detail::index_of_best(best);
  int writer = 0;
  if (!plan.greedy && row.best > detail::kKeyOfMinusInfinity) {
    const Limit limit = apply_filters(row, plan, shared);
    const int segment = (vocab_size + kThreads - 1) / kThreads * 32;
    const Target target =
        draw_segment(row, plan, shared, limit, segment, seed, static_cast<std::uint64_t>(r),
                     static_cast<std::uint64_t>(counters[r]));
    writer = target.warp;
    if (warp_of_thread() == writer) id = draw_token(row, plan, limit, segment, target);
  }
  // With filters other threads are past their last read of counter and mask; without, the mask is
  // read before the barrier in block_best, and the counter by nobody else.
  if (static_cast<int>(threadIdx.x) != 32 * writer) return;
  ids[r] = id;
  if (!plan.greedy) counters[r] += 1;
  if (seen != nullptr) seen[id >> 5] |= static_cast<std::int32_t>(1U << (id & 31));
}

// One thread per id. Setting bits by atomics is independent of the order.
__global__ __launch_bounds__(256) void mark_seen_kernel(const std::int32_t* __restrict__ ids,
                                                        const std::int32_t* __restrict__ lengths,
                                                        std::int64_t rows, std::int64_t count,
                                                        std::int64_t vocab_size, std::int64_t words,
                                                        unsigned* seen) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (at >= rows * count) return;
  const std::int64_t r = at / count;
  const std::int32_t id = ids[at];
  if (lengths != nullptr && at - r * count >= lengths[r]) return;
  if (id < 0 || id >= vocab_size) return;
  atomicOr(seen + r * words + (id >> 5), 1U << (id & 31));
}

}  // namespace

void sample_forward(Context& ctx, const SampleForward& a) {
  const std::int64_t vocab_size = a.logits.dim(-1);
  const std::int64_t rows = a.logits.numel() / vocab_size;
  if (rows == 0) return;
  const SamplePlan plan = detail::plan_of(a.options);
  if (plan.greedy && !a.seen)  // more than one block reads a row there
    return lrnn::cuda::argmax_forward(ctx, {.logits = a.logits, .ids = a.ids});
  visit_float("sample_forward", a.logits.dtype(), [&]<class T>() {
    sample_forward_kernel<T><<<static_cast<unsigned>(rows), kThreads, 0, ctx.stream().handle>>>(
        a.logits.data<T>(), detail::row_stride(a.logits), static_cast<int>(vocab_size), plan,
        a.seed, plan.greedy ? nullptr : a.counters.data<std::int64_t>(),
        a.seen ? a.seen.data<std::int32_t>() : nullptr, seen_words(vocab_size),
        a.ids.data<std::int32_t>());
    LRNN_CUDA_CHECK_LAUNCH();
  });
}

void mark_seen(Context& ctx, const MarkSeen& a) {
  const std::int64_t total = a.ids.numel();
  if (total == 0) return;
  const auto blocks = static_cast<unsigned>((total + 255) / 256);
  mark_seen_kernel<<<blocks, 256, 0, ctx.stream().handle>>>(
      a.ids.data<std::int32_t>(), a.lengths ? a.lengths.data<std::int32_t>() : nullptr,
      a.ids.dim(0), a.ids.dim(1), a.vocab_size, seen_words(a.vocab_size),
      reinterpret_cast<unsigned*>(a.seen.data<std::int32_t>()));
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
