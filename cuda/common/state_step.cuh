/// What the kernels for one token of recurrences with complex states share, those of lane_scan and
/// dplr_scan: states in planes [B, 2, lanes, M], one real drive and one output per lane.
///
/// kParts neighbouring threads own a lane, kOwn neighbouring states each, and walk kRows sequences
/// at once: what the sequences share lies in registers, read while the kernel before still runs,
/// and the states of all kRows are in flight together. Sums over the threads of a lane leave each
/// of them with the outputs of some of the sequences. How a sum is formed does not depend on kRows.
///
/// A Recurrence moves a lane on and reads it out. From its Parameters, all of which `aligned()`
/// allows to be read kOwn at a time, it holds what a thread's states need, and has
///   kCoupled                 whether a sum over the states of a lane comes before they move
///   coupling(x)              the part of that sum of this thread, where there is one
///   advance(x, u, coupling)  moves x on, given the sum; returns the part of the output
///   skip                     what the drive adds to the output beside the states
#pragma once

#include <algorithm>

#include "common/activation.cuh"
#include "common/launch.cuh"
#include "common/transpose_add.cuh"
#include "common/vec.cuh"

namespace lrnn::cuda::state_step {

constexpr int kThreads = 128;
constexpr int kOwn = 4;        // states of a thread
constexpr int kMaxParts = 16;  // threads of a lane
constexpr int kManyRows = 8;   // sequences at once
constexpr std::int64_t kFewBlocks = 256;

/// kOwn neighbouring complex numbers.
struct Quad {
  float re[kOwn];
  float im[kOwn];

  /// From planes of `plane` numbers, the first of which is at `p`.
  __device__ __forceinline__ void load(const float* p, std::int64_t plane) {
    load_vec<float, kOwn>(p, re);
    load_vec<float, kOwn>(p + plane, im);
  }
  __device__ __forceinline__ void store(float* p, std::int64_t plane) const {
    store_vec<float, kOwn>(p, re);
    store_vec<float, kOwn>(p + plane, im);
  }
};

struct Sizes {
  std::int64_t batch, lanes, plane;  // plane: lanes M
};

template <class Recurrence, class T>
struct Args {
  Sizes sizes;
  typename Recurrence::Parameters parameters;
  const T* u;
  T* y;
  float* state;
};

/// Where a thread is. Threads of no lane repeat the last lane, those of no sequence the last one,
/// and store nothing.
template <int kParts, int kRows>
struct Seat {
  std::int64_t lane;
  std::int64_t first;  // sequence
  std::int64_t last;   // of all
  std::int64_t at;     // of the first state in a plane
  int part;
  bool exists;

  __device__ __forceinline__ explicit Seat(const Sizes& s)
      : first(static_cast<std::int64_t>(blockIdx.y) * kRows),
        last(s.batch - 1),
        part(static_cast<int>(threadIdx.x) % kParts) {
    constexpr int kLanes = kThreads / kParts;
    const std::int64_t wanted =
        static_cast<std::int64_t>(blockIdx.x) * kLanes + static_cast<int>(threadIdx.x) / kParts;
    exists = wanted < s.lanes;
    lane = min(wanted, s.lanes - 1);
    at = (lane * kParts + part) * kOwn;
  }
  [[nodiscard]] __device__ __forceinline__ std::int64_t row(int r) const {
    return min(first + r, last);
  }
  [[nodiscard]] __device__ __forceinline__ bool stores(int r) const {
    return exists && first + r <= last;
  }
  /// Calls f(r, sum) for what transpose_add left to this thread to store.
  template <class F>
  __device__ __forceinline__ void for_each_sum(const float (&sums)[kRows], F&& f) const {
    if (part % kLanesOfSum<kRows, kParts> != 0) return;
    const int begin = first_sum<kRows, kParts>(part);
#pragma unroll
    for (int i = 0; i < kSumsOfLane<kRows, kParts>; ++i)
      if (stores(begin + i)) f(begin + i, sums[i]);
  }
};

/// Sum r, of what transpose_add left behind, in all threads of the lane.
template <int kParts, int kRows>
__device__ __forceinline__ float sum_of_row(const float (&v)[kRows], int r) {
  constexpr int kSums = kSumsOfLane<kRows, kParts>;
  return __shfl_sync(0xFFFFFFFFU, v[r % kSums], r / kSums * kLanesOfSum<kRows, kParts>, kParts);
}

/// What becomes of an output: rounded as if it had been stored, then GELU twice, or nothing.
template <class T, bool kGeluTwice>
__device__ __forceinline__ T activated(float v) {
  if constexpr (kGeluTwice) {
    constexpr Activation kGelu = Activation::Gelu;
    v = activate<kGelu>(activate<kGelu>(to_float(from_float<T>(v))));
  }
  return from_float<T>(v);
}

template <class Recurrence, class T, int kParts, int kRows, bool kGeluTwice>
__global__ __launch_bounds__(kThreads) void state_step_kernel(Args<Recurrence, T> args) {
  let_next_kernel_start();
  const Sizes& s = args.sizes;
  const Seat<kParts, kRows> seat(s);
  const Recurrence lane(args.parameters, s.plane, seat.at, seat.lane);
  const auto state = [&](int r) { return args.state + seat.row(r) * 2 * s.plane + seat.at; };
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    prefetch_to_l2(state(r));
    prefetch_to_l2(state(r) + s.plane);
  }
  wait_for_previous_kernel();
  Quad x[kRows];
  T u[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r].load(state(r), s.plane);
    u[r] = args.u[seat.row(r) * s.lanes + seat.lane];
  }
  float coupling[kRows] = {};
  if constexpr (Recurrence::kCoupled) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) coupling[r] = lane.coupling(x[r]);
    transpose_add<kRows, kParts, 1>(coupling, seat.part);
  }
  float sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float drive = to_float(u[r]);
    const float of_lane = Recurrence::kCoupled ? sum_of_row<kParts, kRows>(coupling, r) : 0.0F;
    sum[r] = lane.advance(x[r], drive, of_lane);
    if (seat.part == 0) sum[r] = fmaf(lane.skip, drive, sum[r]);
    if (seat.stores(r)) x[r].store(state(r), s.plane);
  }
  transpose_add<kRows, kParts, 1>(sum, seat.part);
  seat.for_each_sum(sum, [&](int r, float v) {
    args.y[seat.row(r) * s.lanes + seat.lane] = activated<T, kGeluTwice>(v);
  });
}

inline bool aligned(const float* p) {
  return allows_vectors(p, 0, 0, kOwn);
}
/// Whether the kernel takes states of this size.
inline bool takes(const Sizes& s) {
  constexpr std::int64_t kMostGroups = 65535;  // of the second dimension of a grid
  const std::int64_t states = s.plane / s.lanes;
  const std::int64_t parts = states / kOwn;
  return states % kOwn == 0 && parts >= 1 && parts <= kMaxParts && (parts & (parts - 1)) == 0 &&
         s.batch <= kMostGroups && s.lanes <= INT_MAX / kThreads;
}
template <int kParts, int kRows>
dim3 blocks(const Sizes& s) {
  constexpr int kLanes = kThreads / kParts;
  return {static_cast<unsigned>((s.lanes + kLanes - 1) / kLanes),
          static_cast<unsigned>((s.batch + kRows - 1) / kRows)};
}
/// Calls f.operator()<kParts, kRows>(): one sequence at a time where that takes few blocks.
template <class F>
void visit(const Sizes& s, F&& f) {
  const auto visit_rows = [&]<int kParts>() {
    const dim3 single = blocks<kParts, 1>(s);
    if (std::int64_t{single.x} * single.y <= kFewBlocks) return f.template operator()<kParts, 1>();
    f.template operator()<kParts, kManyRows>();
  };
  switch (s.plane / s.lanes / kOwn) {
    case 1:
      return visit_rows.template operator()<1>();
    case 2:
      return visit_rows.template operator()<2>();
    case 4:
      return visit_rows.template operator()<4>();
    case 8:
      return visit_rows.template operator()<8>();
    default:
      return visit_rows.template operator()<kMaxParts>();
  }
}

/// False, and nothing done, if the kernel does not take it.
template <class Recurrence, class T>
bool run(const Args<Recurrence, T>& args, Activation activation, bool twice, cudaStream_t stream) {
  const bool gelu_twice = activation == Activation::Gelu && twice;
  if (activation != Activation::Identity && !gelu_twice) return false;
  if (!takes(args.sizes) || !Recurrence::aligned(args.parameters) || !aligned(args.state))
    return false;
  visit(args.sizes, [&]<int kParts, int kRows>() {
    const auto launch = [&]<bool kGeluTwice>() {
      launch_overlapped(state_step_kernel<Recurrence, T, kParts, kRows, kGeluTwice>,
                        blocks<kParts, kRows>(args.sizes), kThreads, 0, stream, args);
    };
    gelu_twice ? launch.template operator()<true>() : launch.template operator()<false>();
  });
  return true;
}

}  // namespace lrnn::cuda::state_step
