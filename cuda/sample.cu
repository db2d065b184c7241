// Few rows have a cluster of 8 blocks each, where the device takes clusters, many rows one block.
// The logits become integers as on the CPU, see ops/sample_math.hpp; from there on sums and choices
// do not depend on the order of threads. A block keeps the distances of its columns in shared
// memory, or forms them anew in every pass if there are too many. The boundary of top_k and top_p
// is found by radix selection: three histograms of 11, 11 and 10 bits of the distance, with the
// number or the weight of the tokens in every bin (integer atomics in shared memory), of which each
// block of a cluster adds up a part. The tokens in the bin of the first are few as a rule: then all
// blocks get them, and each makes the other two histograms of these by itself.
//
// Bound by latency: the exchanges of a cluster, scans and barriers. In a chain on an H200 one row
// of 50277 takes 8.5 us, with top_k 40 13.8, top_p 0.9 17.1, all filters and the penalty 22.6; 16
// rows 12.7, 18.6, 24.5, 29.4; 128 rows, bound by the instructions of a multiprocessor, 36.5, 40.3,
// 55.0, 55.9.
#include <algorithm>

#include "lrnn/ops/argmax.hpp"
#include "lrnn/ops/sample.hpp"

#include "common/best_candidate.cuh"
#include "common/capability.cuh"
#include "common/check.cuh"
#include "common/cluster.cuh"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/penalised_argmax.hpp"
#include "ops/dispatch.hpp"
#include "ops/sample_math.hpp"

namespace lrnn::cuda {
namespace {

using detail::SamplePlan;
using U64 = unsigned long long;  // the type that shuffles take

constexpr int kMostDigits = 11;
constexpr int kBins = 1 << kMostDigits;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

/// The blocks of a row, whose threads read kAhead logits at a time.
template <int kBlocks, int kThreads_, int kAhead_>
struct Team {
  static constexpr int kSize = kBlocks;
  static constexpr int kThreads = kThreads_;
  static constexpr int kAhead = kAhead_;
  static constexpr int kWarps = kThreads / 32;
  static_assert(kBlocks <= 32 && kWarps <= 32 && kAhead > 0);  // a lane may speak for each

  __device__ static int rank() { return static_cast<int>(blockIdx.x) % kBlocks; }
  __device__ static int row() { return static_cast<int>(blockIdx.x) / kBlocks; }
  __device__ static void sync() {
    if constexpr (kSize == 1)
      __syncthreads();
    else
      cluster_sync();
  }
  /// What block `rank` has where this one has `p`, in shared memory.
  __device__ static uint2 load(int rank, const uint2* p) {
    uint2 v = *p;
    if constexpr (kSize > 1) v = load_of(rank, p);
    return v;
  }
  __device__ static U64 load(int rank, const U64* p) {
    const uint2 v = load(rank, reinterpret_cast<const uint2*>(p));
    return (U64{v.y} << 32) | v.x;
  }
  /// Gives it to every block, as that of this one; theirs are there after sync(). By whole warps.
  __device__ static void tell(U64 (&all)[kSize], U64 value) {
    const int to = static_cast<int>(threadIdx.x);
    if constexpr (kSize == 1) {
      if (to == 0) all[0] = value;
    } else if (to < kSize) {
      store_in(to, reinterpret_cast<uint2*>(&all[rank()]),
               make_uint2(static_cast<unsigned>(value), static_cast<unsigned>(value >> 32)));
    }
  }
};

using Alone = Team<1, 1024, 12>;
using Cluster = Team<8, 512, 13>;  // as many blocks as any device takes
/// Of so many rows that blocks share a multiprocessor: fewer registers, more of them.
using SharingCluster = Team<8, 512, 8>;

/// Of a block. The distances of its columns lie behind it.
template <class Team>
struct Shared {
  static constexpr int kWarps = Team::kWarps;
  static constexpr int kSlice = Team::kSize > 1 ? kBins / Team::kSize : 1;
  alignas(16) std::uint32_t low[kBins];  // histogram of the block's columns
  alignas(16) std::uint32_t high[kBins];
  U64 slice[kSlice];  // a part of the histogram of the row
  // Of each block: the sum of its slice, its best token, sums of its tokens.
  U64 slice_sums[Team::kSize];
  U64 bests[Team::kSize];
  U64 weights[Team::kSize];
  U64 ties[Team::kSize];
  U64 warp_sums[kWarps];
  U64 warp_ties[kWarps];
  static constexpr int kCandidates = std::min(Team::kThreads / Team::kSize, 256);
  uint2 candidates[kCandidates];  // of the block: (distance, 0)
  uint2 gathered[2];              // by number, by weight: (how many, 0)
  bool found;
  int bin;
  U64 before, inside;
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

/// Sums over the threads of the block: those before this one, and all.
struct BlockSums {
  U64 before, all;
};
template <class Shared>
__device__ BlockSums block_sums(Shared& shared, U64 value) {
  const U64 in_warp = warp_inclusive_sum(value);
  if (lane_of_thread() == 31) shared.warp_sums[warp_of_thread()] = in_warp;
  __syncthreads();
  const U64 of_warp = lane_of_thread() < Shared::kWarps ? shared.warp_sums[lane_of_thread()] : 0;
  const U64 ends = warp_inclusive_sum(of_warp);
  return {in_warp - value + __shfl_sync(kAllLanes, ends - of_warp, warp_of_thread()),
          __shfl_sync(kAllLanes, ends, 31)};
}

/// Sum over the threads of the block.
template <class Shared>
__device__ U64 block_sum(Shared& shared, U64 value) {
  value = warp_sum(value);
  if (lane_of_thread() == 0) shared.warp_sums[warp_of_thread()] = value;
  __syncthreads();
  return warp_sum(lane_of_thread() < Shared::kWarps ? shared.warp_sums[lane_of_thread()] : 0);
}

/// A row, and what a thread has of it: every 32nd of the columns of its warp, from `first` on.
/// Warps have neighbouring parts. Distances are kept if kHeld, else formed anew.
template <class T, class Team, bool kHeld>
struct Row {
  using Blocks = Team;
  static constexpr int kColumns = Blocks::kSize * Blocks::kThreads;  // at a time
  const T* logits;
  const std::int32_t* seen;  // or null
  int vocab_size;
  const SamplePlan& plan;
  int count;  // of the thread's columns, some of which may be beyond the end
  int first;
  std::uint32_t* held;  // [count, kThreads]: keys, later distances
  std::uint32_t best = 0;

  __device__ Row(const T* logits, const std::int32_t* seen, int vocab_size, const SamplePlan& plan,
                 std::uint32_t* held)
      : logits(logits),
        seen(seen),
        vocab_size(vocab_size),
        plan(plan),
        count((vocab_size + kColumns - 1) / kColumns),
        first((Blocks::rank() * Blocks::kWarps + warp_of_thread()) * count * 32 + lane_of_thread()),
        held(held) {}

  __device__ int column(int j) const { return first + 32 * j; }
  /// 0, which no logit has, beyond the columns.
  __device__ std::uint32_t key(int j) const {
    const int i = column(j);
    if (j >= count || i >= vocab_size) return 0;
    return detail::penalised_key(to_float(logits[i]), seen, i, plan);
  }
  __device__ std::uint32_t& kept(int j) const {
    return held[j * Blocks::kThreads + static_cast<int>(threadIdx.x)];
  }
  /// Of key 0, a NaN, the greatest.
  __device__ std::uint32_t distance(int j) const {
    if constexpr (kHeld) return kept(j);
    return detail::distance_of(best, key(j), plan);
  }
  /// Calls f(j) for the thread's columns until it returns false.
  template <class F>
  __device__ void for_each(F&& f) const {
#pragma unroll 1  // instructions that are executed once come as slowly as what they do
    for (int j = 0; j < count; ++j)
      if (!f(j)) break;
  }
  /// The best token of the row, in every thread of its blocks.
  __device__ std::uint64_t find_best(Shared<Team>& shared) {
    std::uint32_t greatest = 0;
    int where = 0;
    constexpr int kAhead = Blocks::kAhead;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kAhead) {
      std::uint32_t keys[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) keys[k] = key(begin + k);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (kHeld && begin + k < count) kept(begin + k) = keys[k];
        if (keys[k] > greatest) where = column(begin + k);  // of equal keys the lowest index
        greatest = max(greatest, keys[k]);
      }
    }
    std::uint64_t found =
        greatest == 0 ? 0 : detail::pack_candidate(greatest, static_cast<std::uint32_t>(where));
    found = block_best<Blocks::kThreads>(found);
    if constexpr (Blocks::kSize > 1) {
      Blocks::tell(shared.bests, found);
      Blocks::sync();
#pragma unroll
      for (const U64 other : shared.bests) found = max_candidate(found, other);
    }
    best = static_cast<std::uint32_t>(found >> 32);
    if constexpr (kHeld)
      for_each([&](int j) {
        kept(j) = detail::distance_of(best, kept(j), plan);
        return true;
      });
    return found;
  }
};

// A 64-bit sum from two 32-bit atomics: whoever overflows the low word carries one.
template <class Shared>
__device__ void add_weight(Shared& shared, int bin, U64 weight) {
  const auto low = static_cast<std::uint32_t>(weight);
  const std::uint32_t before = atomicAdd(&shared.low[bin], low);
  const std::uint32_t high =
      static_cast<std::uint32_t>(weight >> 32) + (before + low < before ? 1U : 0U);
  if (high != 0) atomicAdd(&shared.high[bin], high);
}

/// The tokens of a row in one bin, if they are few: a thread has one, the same in all blocks.
template <bool kByWeight, class RowBlocks>
struct Candidates {
  using Blocks = Team<1, RowBlocks::kThreads, 1>;
  static constexpr int kPerBlock = Shared<RowBlocks>::kCandidates;
  static constexpr int kMost = kPerBlock * RowBlocks::kSize;
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;  // a distance without weight
  std::uint32_t mine = kNone;
  bool complete = false;  // else they are many

  template <class Row>
  __device__ Candidates(const Row& row, Shared<RowBlocks>& shared, std::uint32_t prefix, int shift,
                        U64 inside) {
    // Weights in a bin are nearly the same, so their sum tells the number.
    const U64 each = kByWeight ? detail::weight_of(prefix << shift) : 1;
    if (inside > kMost * each) return;  // uniform; so many would wait for each other below
    row.for_each([&](int j) {
      const std::uint32_t distance = row.distance(j);
      if (distance >> shift != prefix) return true;
      // In any order: of these only sums of integers are taken.
      const unsigned i = atomicAdd(&shared.gathered[kByWeight].x, 1U);
      if (i < kPerBlock) shared.candidates[i].x = distance;
      return true;
    });
    RowBlocks::sync();
    const int rank = static_cast<int>(threadIdx.x) / kPerBlock;
    const int i = static_cast<int>(threadIdx.x) % kPerBlock;
    unsigned count = 0;
    if (rank < RowBlocks::kSize) {
      count = RowBlocks::load(rank, &shared.gathered[kByWeight]).x;
      const std::uint32_t distance = RowBlocks::load(rank, &shared.candidates[i]).x;
      if (i < static_cast<int>(count)) mine = distance;
    }
    complete = __syncthreads_or(count > kPerBlock) == 0;
  }
  [[nodiscard]] __device__ std::uint32_t distance(int) const { return mine; }
  template <class F>
  __device__ void for_each(F&& f) const {
    f(0);
  }
};

/// Histogram over bits [shift, shift + bits) of the distances below `end` whose bits above equal
/// `prefix`: the number of the block's tokens, or their weight.
template <bool kByWeight, class Columns, class Shared>
__device__ void fill_histogram(const Columns& columns, Shared& shared, std::uint32_t end,
                               std::uint32_t prefix, int shift, int bits) {
  for (int i = 4 * static_cast<int>(threadIdx.x); i < kBins; i += 4 * Columns::Blocks::kThreads) {
    *reinterpret_cast<uint4*>(&shared.low[i]) = uint4{};
    if constexpr (kByWeight) *reinterpret_cast<uint4*>(&shared.high[i]) = uint4{};
  }
  if (threadIdx.x == 0) shared.found = false;
  __syncthreads();
  columns.for_each([&](int j) {
    const std::uint32_t distance = columns.distance(j);
    const std::uint32_t digits = distance >> shift;
    if (distance >= end || (digits >> bits) != prefix) return true;
    const auto bin = static_cast<int>(digits & ((1U << bits) - 1U));
    if constexpr (kByWeight)
      add_weight(shared, bin, detail::weight_of(distance));
    else
      atomicAdd(&shared.low[bin], 1U);
    return true;
  });
}

/// Adds up a part of the histograms of all blocks, as large in each.
template <bool kByWeight, class Team>
__device__ void merge_slice(Shared<Team>& shared) {
  constexpr int kSlice = kBins / Team::kSize;
  U64 sum = 0;
  for (int i = 2 * static_cast<int>(threadIdx.x); i < kSlice; i += 2 * Team::kThreads) {
    const int bin = Team::rank() * kSlice + i;
    U64 sums[2] = {};
#pragma unroll
    for (int r = 0; r < Team::kSize; ++r) {
      const uint2 low = Team::load(r, reinterpret_cast<const uint2*>(&shared.low[bin]));
      uint2 high{};
      if constexpr (kByWeight)
        high = Team::load(r, reinterpret_cast<const uint2*>(&shared.high[bin]));
      sums[0] += (U64{high.x} << 32) | low.x;
      sums[1] += (U64{high.y} << 32) | low.y;
    }
    shared.slice[i] = sums[0];
    shared.slice[i + 1] = sums[1];
    sum += sums[0] + sums[1];
  }
  Team::tell(shared.slice_sums, block_sum(shared, sum));
}

/// The bin of the histogram in which the sum from the first bin on reaches target_of(all), the sum
/// before it and that inside. Without one, shared.found stays false. Returns the target.
template <bool kByWeight, class Team, class Shared, class TargetOf>
__device__ U64 find_bin(Shared& shared, TargetOf target_of) {
  constexpr int kSlice = kBins / Team::kSize;
  constexpr int kPerThread = (kSlice + Team::kThreads - 1) / Team::kThreads;
  static_assert(kSlice % kPerThread == 0);
  int owner = 0;
  U64 before = 0;
  U64 target = 0;
  if constexpr (Team::kSize > 1) {
    U64 all = 0;
#pragma unroll
    for (const U64 sum : shared.slice_sums) all += sum;
    target = target_of(all);
#pragma unroll
    for (int r = 0; r < Team::kSize; ++r) {
      const U64 end = before + shared.slice_sums[r];
      if (owner == r && end < target) {
        before = end;
        owner = r + 1;
      }
    }
    if (owner == Team::kSize) return target;  // uniform
  }
  const int first = kPerThread * static_cast<int>(threadIdx.x);
  U64 sums[kPerThread] = {};
  U64 own = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if constexpr (Team::kSize == 1)
      sums[k] = (kByWeight ? U64{shared.high[first + k]} << 32 : 0) | shared.low[first + k];
    else if (first < kSlice)
      sums[k] = Team::load(owner, &shared.slice[first + k]);
    own += sums[k];
  }
  const BlockSums of_block = block_sums(shared, own);
  if constexpr (Team::kSize == 1) target = target_of(of_block.all);
  before += of_block.before;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (before < target && target <= before + sums[k]) {  // for exactly one bin
      shared.found = true;
      shared.bin = owner * kSlice + first + k;
      shared.before = before;
      shared.inside = sums[k];
    }
    before += sums[k];
  }
  return target;
}

/// A distance, what the number (or the weight) of the tokens nearer than it lacks of a target, and
/// that of the tokens at it.
struct Boundary {
  std::uint32_t distance;
  U64 rest, inside;
};

/// Finds the next `bits` bits of the distance of a boundary; false if there is none.
template <bool kByWeight, class Columns, class Shared, class TargetOf>
__device__ bool narrow(Boundary& b, const Columns& columns, Shared& shared, std::uint32_t end,
                       int shift, int bits, TargetOf target_of) {
  using Blocks = typename Columns::Blocks;
  fill_histogram<kByWeight>(columns, shared, end, b.distance, shift, bits);
  Blocks::sync();
  if constexpr (Blocks::kSize > 1) {
    merge_slice<kByWeight>(shared);
    Blocks::sync();
  }
  const U64 target = find_bin<kByWeight, Blocks>(shared, target_of);
  __syncthreads();
  const bool found = shared.found;
  b = {(b.distance << bits) | static_cast<std::uint32_t>(shared.bin), target - shared.before,
       shared.inside};
  __syncthreads();  // before the result is reset
  return found;
}

/// The distance at which the number (or the weight) of the tokens below `end`, nearest first,
/// reaches target_of(that of all of them) >= 1; kDistanceEnd if they do not.
template <bool kByWeight, class Row, class Shared, class TargetOf>
__device__ Boundary select(const Row& row, Shared& shared, std::uint32_t end, TargetOf target_of) {
  int shift = 32 - kMostDigits;
  Boundary b{};
  if (!narrow<kByWeight>(b, row, shared, end, shift, kMostDigits, target_of))
    return {detail::kDistanceEnd, 0, 0};
  const Candidates<kByWeight, typename Row::Blocks> few(row, shared, b.distance, shift, b.inside);
  const auto finish = [&](const auto& columns) {
#pragma unroll 1
    while (shift > 0) {
      const int bits = min(kMostDigits, shift);
      shift -= bits;
      narrow<kByWeight>(b, columns, shared, end, shift, bits, [&](U64) { return b.rest; });
    }
  };
  few.complete ? finish(few) : finish(row);
  return b;
}

/// Tokens nearer than `distance` and the first `ties` (by index) of those at it are kept.
struct Limit {
  std::uint32_t distance;
  U64 ties;
};

template <class Row, class Shared>
__device__ Limit apply_filters(const Row& row, Shared& shared) {
  const SamplePlan& plan = row.plan;
  Limit limit{detail::kDistanceEnd, 0};
  U64 tied_out = 0;
  if (plan.top_k > 0) {
    const Boundary b = select<false>(row, shared, detail::kDistanceEnd,
                                     [&](U64) { return static_cast<U64>(plan.top_k); });
    limit = {b.distance, b.rest};
    tied_out = b.inside - b.rest;
  }
  if (plan.has_top_p) {
    const std::uint32_t end = min(limit.distance + 1, detail::kDistanceEnd);
    const Boundary b = select<true>(row, shared, end, [&](U64 all) {
      return detail::top_p_target(plan, all - tied_out * detail::weight_of(limit.distance));
    });
    const U64 weight = detail::weight_of(b.distance);
    limit = {b.distance, (b.rest + weight - 1) / weight};
  }
  if (plan.distance_end <= limit.distance) limit = {plan.distance_end, 0};
  return limit;
}

/// A number drawn from the weights of several parts of a row, one after another: the part that it
/// falls in, what remains of it there, and how many tokens at the limit are still to be kept.
struct Target {
  int part;
  U64 number;
  U64 ties;
};

/// Where parts, of which each lane has one, of `weight` below the limit and with `ties` at it, end
/// in what is kept of all.
struct Parts {
  U64 kept, end, ties_left;

  __device__ Parts(U64 weight, U64 ties, std::uint32_t distance, U64 ties_kept) : kept(weight) {
    const U64 ties_before = warp_inclusive_sum(ties) - ties;
    ties_left = ties_kept > ties_before ? ties_kept - ties_before : 0;
    if (ties_left > 0) kept += min(ties_left, ties) * detail::weight_of(distance);
    end = warp_inclusive_sum(kept);
  }
  [[nodiscard]] __device__ U64 total() const { return __shfl_sync(kAllLanes, end, 31); }
  /// In every lane.
  [[nodiscard]] __device__ Target find(U64 number) const {
    const bool here = end - kept <= number && number < end;  // for exactly one lane
    const int part = __ffs(static_cast<int>(__ballot_sync(kAllLanes, here))) - 1;
    return {part, number - __shfl_sync(kAllLanes, end - kept, part),
            __shfl_sync(kAllLanes, ties_left, part)};
  }
};

/// The warp of the row's blocks in which a drawn number falls; kNowhere in the other blocks.
constexpr int kNowhere = -1;
template <class Row, class Shared, class Draw>
__device__ Target draw_warp(const Row& row, Shared& shared, Limit limit, Draw draw) {
  using Blocks = typename Row::Blocks;
  __shared__ Target target;
  U64 weight = 0;
  U64 ties = 0;
  row.for_each([&](int j) {
    const std::uint32_t distance = row.distance(j);
    if (distance < limit.distance) weight += detail::weight_of(distance);
    if (distance == limit.distance) ties += 1;
    return true;
  });
  weight = warp_sum(weight);
  ties = warp_sum(ties);
  const int lane = lane_of_thread();
  if (lane == 0) {
    shared.warp_sums[warp_of_thread()] = weight;
    shared.warp_ties[warp_of_thread()] = ties;
  }
  __syncthreads();
  const bool warp_exists = lane < Blocks::kWarps;
  if (warp_of_thread() == 0) {
    weight = warp_sum(warp_exists ? shared.warp_sums[lane] : 0);
    ties = warp_sum(warp_exists ? shared.warp_ties[lane] : 0);
    Blocks::tell(shared.weights, weight);
    Blocks::tell(shared.ties, ties);
  }
  Blocks::sync();
  if (warp_of_thread() == 0) {  // lane l speaks for block l, then for warp l
    const bool exists = lane < Blocks::kSize;
    const Parts blocks(exists ? shared.weights[lane] : 0, exists ? shared.ties[lane] : 0,
                       limit.distance, limit.ties);
    const Target block = blocks.find(draw(blocks.total()));
    const Parts warps(warp_exists ? shared.warp_sums[lane] : 0,
                      warp_exists ? shared.warp_ties[lane] : 0, limit.distance, block.ties);
    const Target warp = warps.find(block.number);
    const int first_warp = Blocks::rank() * Blocks::kWarps;
    if (lane == 0)
      target = {block.part == Blocks::rank() ? first_warp + warp.part : kNowhere, warp.number,
                warp.ties};
  }
  __syncthreads();
  return target;
}

/// Called by one whole warp: the first token of its part at which the sum exceeds the number.
template <class Row>
__device__ std::int32_t draw_token(const Row& row, Limit limit, Target target) {
  const int lane = lane_of_thread();
  U64 ties_before = 0;
  int id = 0;
  row.for_each([&](int j) {
    const std::uint32_t distance = row.distance(j);
    const bool tie = distance == limit.distance;
    const unsigned tied = __ballot_sync(kAllLanes, tie);
    const U64 rank = ties_before + __popc(tied & ((1U << lane) - 1U));
    const bool kept = distance < limit.distance || (tie && rank < target.ties);
    const U64 sum = warp_inclusive_sum(kept ? detail::weight_of(distance) : 0);
    const unsigned reached = __ballot_sync(kAllLanes, sum > target.number);
    if (reached != 0) {
      id = row.column(j) - lane + __ffs(static_cast<int>(reached)) - 1;
      return false;
    }
    target.number -= __shfl_sync(kAllLanes, sum, 31);
    ties_before += __popc(tied);
    return true;
  });
  return id;
}

template <class T, class Blocks, bool kHeld>
__global__ __launch_bounds__(Blocks::kThreads) void sample_forward_kernel(
    const T* logits, std::int64_t stride, int vocab_size, SamplePlan plan, std::uint64_t seed,
    std::int64_t* counters, std::int32_t* seen_masks, std::int64_t words, std::int32_t* ids) {
  __shared__ Shared<Blocks> shared;
  extern __shared__ std::uint32_t held[];
  let_next_kernel_start();
  if constexpr (Blocks::kSize > 1) cluster_meet();  // before one writes to another
  if (threadIdx.x == 0) shared.gathered[0] = shared.gathered[1] = uint2{};
  wait_for_previous_kernel();
  const std::int64_t r = Blocks::row();
  std::int32_t* const seen = seen_masks != nullptr ? seen_masks + r * words : nullptr;
  const auto counter = static_cast<std::uint64_t>(counters[r]);
  Row<T, Blocks, kHeld> row(logits + r * stride, seen, vocab_size, plan, held);
  const std::uint64_t best = row.find_best(shared);

  // Uniform in the blocks of the row.
  std::int32_t id = detail::index_of_best(best);
  int writer = 0;  // warp of these blocks
  const int warp = Blocks::rank() * Blocks::kWarps + warp_of_thread();
  if (row.best > detail::kKeyOfMinusInfinity) {
    const Limit limit = apply_filters(row, shared);
    const Target target = draw_warp(row, shared, limit, [&](U64 total) {
      return detail::draw(seed, static_cast<std::uint64_t>(r), counter, total);
    });
    writer = target.part;
    if (warp == writer) id = draw_token(row, limit, target);
  }
  // All threads of the row have met since they read its counter, and the mask but for those of a
  // single block that form distances anew, of which the writer's warp is the last.
  if (warp == writer && lane_of_thread() == 0) {
    ids[r] = id;
    counters[r] = static_cast<std::int64_t>(counter + 1);
    if (seen != nullptr) seen[id >> 5] |= static_cast<std::int32_t>(1U << (id & 31));
  }
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

/// Bytes of a block for the distances of its columns, and whether it has as many.
template <class Team>
std::size_t held_bytes(std::int64_t vocab_size) {
  constexpr std::int64_t kColumns = Team::kSize * Team::kThreads;
  return static_cast<std::size_t>((vocab_size + kColumns - 1) / kColumns) * Team::kThreads *
         sizeof(std::uint32_t);
}
/// What the kernel declares: Shared, and what its functions share.
template <class Team>
constexpr std::size_t kDeclaredBytes = sizeof(Shared<Team>) + 1024;
template <class Team>
bool holds(std::int64_t vocab_size) {
  return held_bytes<Team>(vocab_size) + kDeclaredBytes<Team> <=
         static_cast<std::size_t>(shared_memory_per_block());
}

/// A team of blocks for each of `rows`, overlapping the kernel before.
template <class Team, class... Parameters, class... Args>
void launch_teams(void (*kernel)(Parameters...), std::int64_t rows, std::size_t shared,
                  cudaStream_t stream, Args&&... args) {
  allow_shared(kernel, shared, kDeclaredBytes<Team>);
  launch_clusters(kernel, Team::kSize, static_cast<unsigned>(Team::kSize * rows), Team::kThreads,
                  shared, stream, std::forward<Args>(args)...);
}

}  // namespace

void sample_forward(Context& ctx, const SampleForward& a) {
  const std::int64_t vocab_size = a.logits.dim(-1);
  const std::int64_t rows = a.logits.numel() / vocab_size;
  if (rows == 0) return;
  const SamplePlan plan = detail::plan_of(a.options);
  if (plan.greedy && a.seen) return penalised_argmax(ctx, a, plan);
  if (plan.greedy) return lrnn::cuda::argmax_forward(ctx, {.logits = a.logits, .ids = a.ids});
  visit_float("sample_forward", a.logits.dtype(), [&]<class T>() {
    const auto launch = [&]<class Team, bool kHeld>() {
      launch_teams<Team>(
          sample_forward_kernel<T, Team, kHeld>, rows, kHeld ? held_bytes<Team>(vocab_size) : 0,
          ctx.stream().handle, a.logits.data<T>(), detail::row_stride(a.logits),
          static_cast<int>(vocab_size), plan, a.seed, a.counters.data<std::int64_t>(),
          a.seen ? a.seen.data<std::int32_t>() : nullptr, seen_words(vocab_size),
          a.ids.data<std::int32_t>());
    };
    constexpr int kFewRows = 16;
    constexpr int kSharingRows = 32;  // beyond, one block for each is as fast
    if (rows <= kSharingRows && holds<Cluster>(vocab_size) &&
        takes_clusters(sample_forward_kernel<T, Cluster, true>)) {
      if (rows <= kFewRows) return launch.template operator()<Cluster, true>();
      return launch.template operator()<SharingCluster, true>();
    }
    if (holds<Alone>(vocab_size)) return launch.template operator()<Alone, true>();
    launch.template operator()<Alone, false>();
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
