/// Hopper's product of up to a few hundred rows: warpgroup products fed by tensor copies.
///
/// A block owns kColumns columns of y, that is, rows of W, all rows of x up to kRows, and one of up
/// to eight parts of K; the blocks of all parts are a cluster, of which each finishes its share of
/// the columns. One thread copies panels of 64 columns of W and x through kStages buffers, another
/// one the first of x; each of the warpgroups multiplies 64 rows of W, the left operand, by x^T.
/// Sums are put into shared memory, and those of each other block of the cluster sent there as one
/// copy; few are sent one by one, which takes 2 us for 128 rows, but less for little. A barrier
/// counts their bytes. Their parts are added in the order of K and handed to an epilogue.
///
/// Neighbours ask for the same panels of x at the same time, and L2 delivers them once. Multicast
/// to clusters of two instead takes 14 us longer for 8192 columns of 2048 and 128 rows, and an
/// order of panels that differs between neighbours 1.5 us, between groups of 16 or more 4 us.
///
/// How K is cut depends on N and K alone, so the bits of a row of y are the same beside any other
/// rows.
///
/// An epilogue has a type Operands and
///   prefetch(row, column)                   a hint, before the kernels before this one have ended
///   Operands load(row, column)              what N columns need beside their sums
///   finish(row, column, sum[N], operands)
/// or, if the two halves of the columns are unlike, what FinishHalves tells. Then a block takes as
/// many of one as of the other, so that all blocks have the same work.
#pragma once

#include <type_traits>

#include "common/cluster.cuh"
#include "common/launch.cuh"
#include "common/linear_sm90.cuh"
#include "common/row_scale.cuh"
#include "common/wgmma.cuh"

namespace lrnn::cuda::linear_sm90 {

/// Compile-time sizes: rows of x in a block, warpgroups along columns and rows of y, buffers of W
/// and of x. If x has fewer, what is received lies in the buffers as well: shared memory is short.
/// If kInTurns, two warpgroups multiply all rows and take panels in turns, which leaves each twice
/// the time for a panel's latencies; in the end their sums are added.
template <int kRows_, int kColumnGroups_, int kRowGroups_, int kStages_,
          int kInputStages_ = kStages_, bool kInTurns_ = false>
struct Tile {
  static constexpr bool kInTurns = kInTurns_;
  static constexpr int kRows = kRows_;
  static constexpr int kInputStages = kInputStages_;
  static constexpr bool kShort = kInputStages < kStages_;
  static constexpr int kColumnGroups = kColumnGroups_;
  static constexpr int kStages = kStages_;
  static constexpr int kGroups = kColumnGroups * kRowGroups_;
  static constexpr int kColumns = 64 * kColumnGroups;
  static constexpr int kGroupRows = kRows / kRowGroups_;
  static constexpr int kRowTiles = kGroupRows / 8;
  static constexpr int kThreads = kWarpgroup * kGroups + 32;
  static constexpr int kReaders = kInTurns ? 4 : 4 * kGroups;  // warps that read a panel
  static constexpr int kWeightBytes = kColumns * kPanelRowBytes;
  static constexpr int kInputBytes = kRows * kPanelRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kInputBytes;
  // The sums of a block lie where the buffers were, those that a block of the cluster finishes one
  // behind the other. Four words more than a row, so that the rows that a warp writes together hit
  // different banks.
  __host__ __device__ static constexpr int pitch(int parts) { return kColumns / parts + 4; }
  __host__ __device__ static constexpr int sum_bytes(int parts) { return kRows * pitch(parts) * 4; }
  static constexpr int kBufferBytes = kStages * kWeightBytes + kInputStages * kInputBytes;
  static_assert(kRows * (kColumns + 4 * kMaxParts) * 4 <= kBufferBytes);
  // Those of the other parts are received behind the barriers, or behind these sums if kShort; of
  // all, if they come one by one.
  __host__ __device__ static constexpr bool one_by_one(int parts) {
    return kRows < 64 || parts > 4;
  }
  static constexpr int senders(int parts) {
    return parts > 1 && one_by_one(parts) ? parts : parts - 1;
  }
  static constexpr int kBarrierBytes = 8 * kStages + 16 * kInputStages + 24;
  static constexpr int shared_bytes(int parts) {
    return 1024 + kBufferBytes + kBarrierBytes + (kShort ? 0 : senders(parts) * sum_bytes(parts));
  }
};

/// Whether the halves of the columns are unlike.
template <class Epilogue>
constexpr bool kHasHalves = false;
template <class Epilogue>
  requires requires { typename Epilogue::First; }
constexpr bool kHasHalves<Epilogue> = true;

/// Whether sums have a factor of their row.
template <class Epilogue>
constexpr bool kScalesRows = false;
template <class Epilogue>
  requires requires { Epilogue::kScales; }
constexpr bool kScalesRows<Epilogue> = Epilogue::kScales;

struct Args {
  int rows, columns;
  int row_tiles;         // blocks that share a part of W
  int tile_rows;         // of x, of such a block
  int panels, per_part;  // of K, of a block
  bool stable_weight;
  bool behind_wait;  // lets the next kernel start only when the kernels before this one have ended
  bool weight_once = false;  // W is the first to leave L2
};

/// Which columns of y the rows of W in a block's buffers belong to: neighbours, or if kHalves
/// neighbours of the first half and of the second in turns, once in what each part of K finishes.
template <class Z, int kParts, bool kHalves>
struct Columns {
  static constexpr int kRun = kHalves ? Z::kColumns / kParts / 2 : Z::kColumns;

  __device__ __forceinline__ static int at(const Args& a, int first, int i) {
    if constexpr (!kHalves) return first + i;
    return i / kRun % 2 * (a.columns / 2) + first / 2 + i / kRun / 2 * kRun + i % kRun;
  }
};

/// y = sum (+ bias), or y += sum.
struct StoreSum {
  const bf16* bias;  // or null
  DeviceRows<bf16> y;
  bool accumulate;
  static constexpr bool kNarrow = false;

  /// Whether N columns can be handled at a time.
  [[nodiscard]] bool allows(int n, std::int64_t columns) const {
    return allows_vectors(y.data, columns, y.stride, n) && allows_vectors(bias, columns, 0, n);
  }
  template <int N>
  struct Operands {
    Packed<bf16, N> bias, y;
  };
  __device__ __forceinline__ void prefetch(int, int) const {}
  template <int N>
  __device__ __forceinline__ Operands<N> load(int row, int column) const {
    Operands<N> o{};
    if (bias != nullptr) o.bias.load(bias + column);
    if (accumulate) o.y.load(y.row(row) + column);
    return o;
  }
  template <int N>
  __device__ __forceinline__ void finish(int row, int column, float (&sum)[N],
                                         const Operands<N>& o) const {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (bias != nullptr) sum[e] += o.bias.get(e);
      if (accumulate) sum[e] += o.y.get(e);
    }
    store_packed(y.row(row) + column, sum);
  }
};

struct Maps {
  CUtensorMap weight, x;
};

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// All threads of the cluster meet between these, without order of memory but for barriers made
/// before.
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
/// Floats at a shared address of this block.
template <int N>
__device__ __forceinline__ void load_shared(float (&v)[N], std::uint32_t at) {
  if constexpr (N == 1) {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v[0]) : "r"(at) : "memory");
  } else {
#pragma unroll
    for (int e = 0; e < N; e += 4)
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v[e]), "=f"(v[e + 1]), "=f"(v[e + 2]), "=f"(v[e + 3])
                   : "r"(at + 4U * e)
                   : "memory");
  }
}

__device__ __forceinline__ void store_shared(std::uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
__device__ __forceinline__ void store_shared(std::uint32_t at, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}

/// Shared addresses of the buffers and barriers of a block.
template <class Z>
struct Shared {
  std::uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* p)
      : base((shared_address(p) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t weight(int i) const {
    return base + static_cast<std::uint32_t>(i % Z::kStages * Z::kWeightBytes);
  }
  __device__ __forceinline__ std::uint32_t input(int i) const {
    return base + static_cast<std::uint32_t>(Z::kStages * Z::kWeightBytes +
                                             i % Z::kInputStages * Z::kInputBytes);
  }
  __device__ __forceinline__ std::uint32_t barrier(int number) const {
    return base + static_cast<std::uint32_t>(Z::kBufferBytes + 8 * number);
  }
  /// Of panel i of W, and of x unless they have buffers for as many panels.
  __device__ __forceinline__ std::uint32_t full(int i) const { return barrier(i % Z::kStages); }
  __device__ __forceinline__ std::uint32_t free(int i) const {
    return barrier(Z::kStages + i % Z::kInputStages);
  }
  __device__ __forceinline__ std::uint32_t input_full(int i) const {
    return Z::kShort ? barrier(Z::kStages + Z::kInputStages + i % Z::kInputStages) : full(i);
  }
  /// Where this block's sums of the columns that `part` finishes begin.
  template <int kParts>
  __device__ __forceinline__ std::uint32_t sums(int part) const {
    return base + static_cast<std::uint32_t>(part * Z::sum_bytes(kParts));
  }
  /// Barrier of the sums that are received, and where block `to` of the cluster has those of
  /// `from`.
  __device__ __forceinline__ std::uint32_t received() const {
    return base + static_cast<std::uint32_t>(Z::kBufferBytes + (Z::kBarrierBytes - 16) / 16 * 16);
  }
  template <int kParts>
  __device__ __forceinline__ std::uint32_t received(int from, int to) const {
    const int place = Z::one_by_one(kParts) || from < to ? from : from - 1;
    // The cluster meets when all its products are formed.
    if constexpr (Z::kShort)
      return base + static_cast<std::uint32_t>((kParts + place) * Z::sum_bytes(kParts));
    return received() + 16U + static_cast<std::uint32_t>(place * Z::sum_bytes(kParts));
  }

  __device__ void init_barriers(int bytes) const {
    barrier_init(received(), 1);
    if (bytes > 0) barrier_expect(received(), bytes);
    for (int i = 0; i < Z::kStages; ++i) barrier_init(full(i), 1);
    for (int i = 0; i < Z::kInputStages; ++i) {
      barrier_init(free(i), Z::kReaders);
      if (Z::kShort) barrier_init(input_full(i), 1);
    }
    barrier_init_done();
  }
};

/// What a block computes: panels [first, first + count) of K.
struct Work {
  int column, row, rows, part, first, count;

  template <class Z>
  __device__ __forceinline__ Work(const Args& a, int parts, Z) : part(cluster_rank()) {
    const int item = static_cast<int>(blockIdx.x) / parts;
    column = item / a.row_tiles * Z::kColumns;
    row = item % a.row_tiles * a.tile_rows;
    rows = min(a.rows - row, a.tile_rows);
    first = min(part * a.per_part, a.panels);
    count = min(a.per_part, a.panels - first);
  }
};

/// The copies of a block, by one thread but for the first of x.
template <class Z, class Own>
struct Copies {
  const Args& a;
  const Maps& maps;
  const Shared<Z>& mem;
  const Work& w;
  std::uint64_t policy = cache_policy(a.weight_once);  // of W

  /// Panels of W that fit in the buffers at once.
  __device__ __forceinline__ int ahead() const { return min(w.count, Z::kStages); }

  [[nodiscard]] __device__ __forceinline__ int input_bytes() const {
    return a.tile_rows * kPanelRowBytes;
  }
  /// Calls f(row in a buffer, row of W) for every box of W.
  template <class F>
  __device__ __forceinline__ void for_each_box(F&& f) const {
#pragma unroll
    for (int c = 0; c < Z::kColumns; c += Own::kRun) f(c, Own::at(a, w.column, c));
  }
  __device__ __forceinline__ void copy_weight(int i) const {
    barrier_expect(mem.full(i), Z::kWeightBytes + (Z::kShort ? 0 : input_bytes()));
    for_each_box([&](int to, int row) {
      copy_box(mem.weight(i) + static_cast<std::uint32_t>(to * kPanelRowBytes), &maps.weight,
               mem.full(i), (w.first + i) * kPanel, 0, row, 0, policy);
    });
  }
  __device__ __forceinline__ void copy_input(int i) const {
    if (Z::kShort) barrier_expect(mem.input_full(i), input_bytes());
    copy_box(mem.input(i), &maps.x, mem.input_full(i), (w.first + i) * kPanel, 0, w.row, 0);
  }
  /// What fits in the buffers of W is read, if it may be, or asked for while the kernels before
  /// this one run.
  __device__ __forceinline__ void begin() const {
    for (int i = 0; i < ahead(); ++i) {
      if (a.stable_weight)
        copy_weight(i);
      else
        for_each_box(
            [&](int, int row) { prefetch_box(&maps.weight, (w.first + i) * kPanel, 0, row, 0); });
    }
    prefetch_map(&maps.x);
  }
  /// The first panels of x, behind the kernels before this one, by another thread: in a block that
  /// could not begin before their end they need not wait for those of W.
  __device__ __forceinline__ void begin_inputs() const {
    for (int i = 0; i < min(w.count, Z::kInputStages); ++i) copy_input(i);
  }
  /// The rest.
  __device__ __forceinline__ void run() const {
    if (!a.stable_weight)
      for (int i = 0; i < ahead(); ++i) copy_weight(i);
    if (a.behind_wait) let_next_kernel_start();
    for (int i = Z::kInputStages; i < w.count; ++i) {
      barrier_wait(mem.free(i), i / Z::kInputStages % 2 ^ 1);
      // The panel whose buffer of x is free now has left one of W as well.
      const int next = i + Z::kStages - Z::kInputStages;
      if (next < w.count) copy_weight(next);
      copy_input(i);
    }
  }
};

/// Where the rows and columns of a warpgroup begin.
template <class Z>
__device__ __forceinline__ int group_row(int group) {
  return group / Z::kColumnGroups * Z::kGroupRows;
}
template <class Z>
__device__ __forceinline__ int group_column(int group) {
  return group % Z::kColumnGroups * 64;
}

/// Puts sums of a warpgroup's thread into shared memory where the buffers were, which nobody reads
/// any more, and sends those of several parts to the blocks that finish them.
template <class Z, int kParts>
__device__ __forceinline__ void hand_on(const Shared<Z>& mem, const Work& w, int group,
                                        const float (&c)[Z::kRowTiles][4]) {
  constexpr bool kOneByOne = kParts > 1 && Z::one_by_one(kParts);
  constexpr int kThreads = kWarpgroup * Z::kGroups;
  constexpr int kWidth = Z::kColumns / kParts;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int lane = thread % 32;
  const int row = group_row<Z>(group) + lane % 4 * 2;
  const int column = group_column<Z>(group) + thread / 32 * 16 + lane / 4;
  if constexpr (kOneByOne) cluster_wait();  // until the barriers of the others are there
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = column + half * 8;
    const int owner = at / kWidth;
    const auto place = 4U * static_cast<std::uint32_t>(row * Z::pitch(kParts) + at % kWidth);
    std::uint32_t to = mem.template sums<kParts>(owner) + place;
    std::uint32_t barrier = 0;
    if constexpr (kOneByOne) {
      to = address_in(owner, mem.template received<kParts>(w.part, owner) + place);
      barrier = address_in(owner, mem.received());
    }
#pragma unroll
    for (int n = 0; n < Z::kRowTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = n * 8 + e;
        const float sum = c[n][2 * half + e];
        if constexpr (!kOneByOne)
          store_shared(to + 4U * r * Z::pitch(kParts), sum);
        else if (row + r < w.rows)
          send(to + 4U * r * Z::pitch(kParts), sum, barrier);
      }
  }
  if constexpr (kParts > 1 && !kOneByOne) {
    fence_shared_async();
    group_wait(1, kThreads);
    cluster_wait();
    const int part = static_cast<int>(threadIdx.x);
    if (part < kParts && part != w.part)
      send(address_in(part, mem.template received<kParts>(w.part, part)),
           mem.template sums<kParts>(part), w.rows * Z::pitch(kParts) * 4,
           address_in(part, mem.received()));
  }
}

/// c += left right^T of two panels, a group of products.
template <int kTiles>
__device__ __forceinline__ void multiply_panel(float (&c)[kTiles][4], std::uint64_t left,
                                               std::uint64_t right) {
  products_begin();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    multiply_shared<false, false>(c, advance(left, step * 32), advance(right, step * 32), true);
  products_commit();
}

/// A warpgroup's 64 columns by kGroupRows rows: products of the block's panels, of which kPending
/// may be under way when their buffers are given back.
template <class Z, int kPending>
__device__ __forceinline__ void multiply_panels(const Shared<Z>& mem, const Work& w, int group,
                                                float (&c)[Z::kRowTiles][4]) {
  pin(c);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int column = group_column<Z>(group);
  const int row = group_row<Z>(group);
  for (int i = 0; i < w.count; ++i) {
    barrier_wait(mem.full(i), i / Z::kStages % 2);
    if (Z::kShort) barrier_wait(mem.input_full(i), i / Z::kInputStages % 2);
    const auto bytes = [](int rows) { return static_cast<std::uint32_t>(rows * kPanelRowBytes); };
    const std::uint64_t left = panel_descriptor(mem.weight(i) + bytes(column), 16);
    const std::uint64_t right = panel_descriptor(mem.input(i) + bytes(row), 16);
    multiply_panel(c, left, right);
    products_wait<kPending>();
    if (i >= kPending && lane == 0) barrier_arrive(mem.free(i - kPending));
  }
  products_wait<0>();
  pin(c);
}

/// The same of two warpgroups in turns; beside(turn) is called before each of the first kTurns and
/// once more. Behind it each has a part of the sums of all rows, and the buffers are free.
template <class Z, int kTurns, class Beside>
__device__ __forceinline__ void multiply_in_turns(const Shared<Z>& mem, const Work& w, int group,
                                                  float (&all)[2 * Z::kRowTiles][4],
                                                  Beside&& beside) {
  static_assert(Z::kInTurns && Z::kColumnGroups == 1 && Z::kGroups == 2);
  // A barrier has the panels of one warpgroup alone: another's phases would be missed.
  static_assert(Z::kStages % 2 == 0 && Z::kInputStages % 2 == 0);
  pin(all);
  const auto multiply = [&](int i) {
    barrier_wait(mem.full(i), i / Z::kStages % 2);
    if (Z::kShort) barrier_wait(mem.input_full(i), i / Z::kInputStages % 2);
    const std::uint64_t left = panel_descriptor(mem.weight(i), 16);
    const std::uint64_t right = panel_descriptor(mem.input(i), 16);
    multiply_panel(all, left, right);
    products_wait<0>();
    if (threadIdx.x % 32 == 0) barrier_arrive(mem.free(i));
  };
  int i = group;
#pragma unroll
  for (int turn = 0; turn <= kTurns; ++turn) {
    beside(turn);
    if (i < w.count) multiply(i);
    i += 2;
  }
  for (; i < w.count; i += 2) multiply(i);
  pin(all);
  group_wait(1, kWarpgroup * Z::kGroups);
}

/// Adds the parts of the two warpgroups: each has half of the rows then, as if it alone had
/// multiplied them.
template <class Z>
__device__ __forceinline__ void share_rows(const Shared<Z>& mem, int group,
                                           const float (&all)[2 * Z::kRowTiles][4],
                                           float (&c)[Z::kRowTiles][4]) {
  // Where x was: behind W, whose buffers take the sums that are handed on.
  static_assert(2 * Z::kRowTiles * kWarpgroup * 16 <= Z::kInputStages * Z::kInputBytes);
  static_assert(kMaxParts / 2 * Z::sum_bytes(kMaxParts / 2) <= Z::kStages * Z::kWeightBytes);
  const auto place = [&](int to, int n) {
    return mem.base + 16U * (threadIdx.x % kWarpgroup) +
           static_cast<std::uint32_t>(Z::kStages * Z::kWeightBytes +
                                      (to * Z::kRowTiles + n) * kWarpgroup * 16);
  };
  if (group == 0) {
#pragma unroll
    for (int n = 0; n < Z::kRowTiles; ++n) store_shared(place(1, n), all[Z::kRowTiles + n]);
  } else {
#pragma unroll
    for (int n = 0; n < Z::kRowTiles; ++n) store_shared(place(0, n), all[n]);
  }
  group_wait(1, kWarpgroup * Z::kGroups);
#pragma unroll
  for (int n = 0; n < Z::kRowTiles; ++n) {
    float other[4];
    load_shared(other, place(group, n));
#pragma unroll
    for (int e = 0; e < 4; ++e)
      c[n][e] = (group == 0 ? all[n][e] : all[Z::kRowTiles + n][e]) + other[e];
  }
}

/// Puts parts of the sums of all rows into shared memory where the buffers were, those of the
/// second warpgroup behind those of the first.
template <class Z>
__device__ __forceinline__ void put_parts(const Shared<Z>& mem, int group,
                                          const float (&all)[2 * Z::kRowTiles][4]) {
  static_assert(2 * Z::sum_bytes(1) <= Z::kBufferBytes - 4 * Z::kRows);
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int lane = thread % 32;
  const std::uint32_t to =
      mem.template sums<1>(group) +
      4U * static_cast<std::uint32_t>(lane % 4 * 2 * Z::pitch(1) + thread / 32 * 16 + lane / 4);
#pragma unroll
  for (int n = 0; n < 2 * Z::kRowTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      store_shared(to + 4U * static_cast<std::uint32_t>((n * 8 + e % 2) * Z::pitch(1) + e / 2 * 8),
                   all[n][e]);
}

/// Where part `p` of the sum of a row and a column that this block finishes is.
template <class Z, int kParts>
__device__ __forceinline__ std::uint32_t place_of_sum(const Shared<Z>& mem, const Work& w, int p,
                                                      int row, int column) {
  const bool own = kParts == 1 || (!Z::one_by_one(kParts) && p == w.part);
  const std::uint32_t sums =
      own ? mem.template sums<kParts>(p) : mem.template received<kParts>(p, w.part);
  return sums + 4U * static_cast<std::uint32_t>(row * Z::pitch(kParts) + column);
}

/// What a thread does with the sums that its block owns: every kThreads-th N columns of a row.
template <class Z, int kParts, int N, class Epilogue>
struct Finish {
  static constexpr int kLoads = N == 8 ? 4 : 8;
  // At a time: as many as hide the latency of operands, or of reading the parts.
  static constexpr int kItems = Epilogue::kNarrow ? kLoads : kParts < kLoads ? kLoads / kParts : 1;
  static constexpr int kWidth = Z::kColumns / kParts;  // columns of a block
  static constexpr int kPerRow = kWidth / N;
  static constexpr int kStep = Z::kThreads;

  const Args& a;
  const Epilogue& epilogue;
  const Shared<Z>& mem;
  const Work& w;
  int count;
  int next = static_cast<int>(threadIdx.x);
  typename Epilogue::template Operands<N> operands[kItems];

  __device__ __forceinline__ Finish(const Args& a, const Epilogue& epilogue, const Shared<Z>& mem,
                                    const Work& w)
      : a(a), epilogue(epilogue), mem(mem), w(w), count(w.rows * kPerRow) {}

  __device__ __forceinline__ int row(int at) const { return w.row + at / kPerRow; }
  __device__ __forceinline__ int column(int at) const {
    return w.column + w.part * kWidth + at % kPerRow * N;
  }
  __device__ __forceinline__ std::uint32_t part_of_sum(int p, int at) const {
    return place_of_sum<Z, kParts>(mem, w, p, at / kPerRow, at % kPerRow * N);
  }

  __device__ __forceinline__ void prefetch() const {
    for (int at = next; at < count; at += kStep)
      if (column(at) < a.columns) epilogue.prefetch(row(at), column(at));
  }
  /// Operands of the next items.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      // The last one stands for those behind it: without branches the loads are in flight together.
      const int at = min(next + i * kStep, count - 1);
      operands[i] = epilogue.template load<N>(row(at), min(column(at), a.columns - N));
    }
  }
  /// Adds the parts of all items, whose first operands are loaded.
  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (; next < count; load()) {
      float part[kItems][kParts][N];
#pragma unroll
      for (int i = 0; i < kItems; ++i)
#pragma unroll
        for (int p = 0; p < kParts; ++p)
          load_shared(part[i][p], part_of_sum(p, min(next + i * kStep, count - 1)));
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int at = next + i * kStep;
        if (at >= count || column(at) >= a.columns) continue;
#pragma unroll
        for (int p = 1; p < kParts; ++p)
#pragma unroll
          for (int e = 0; e < N; ++e) part[i][0][e] += part[i][p][e];
        epilogue.finish(row(at), column(at), part[i][0], operands[i]);
      }
      next += kItems * kStep;
    }
  }
};

/// The factors of a block's rows. Two neighbouring threads share the terms of a row, which come
/// while products are formed.
template <class Z>
struct RowFactors {
  float terms[RowScale::kMostParts / 2];

  __device__ __forceinline__ void load(const RowScale& scale, const Work& w) {
    static_assert(Z::kRows == RowScale::kRows && 2 * Z::kRows <= Z::kThreads);
    const int row = static_cast<int>(threadIdx.x) / 2;
#pragma unroll
    for (int i = 0; i < RowScale::kMostParts / 2; ++i) {
      const int part = 2 * i + static_cast<int>(threadIdx.x) % 2;
      terms[i] = 0.0F;
      if (row < w.rows && part < scale.parts)
        terms[i] = __ldcg(scale.squares + part * RowScale::kRows + w.row + row);
    }
  }
  /// Puts them at the end of the buffers, when those have been read; the block meets behind it.
  __device__ __forceinline__ void share(const RowScale& scale, const Shared<Z>& mem) const {
    float sum = 0.0F;
#pragma unroll
    for (const float term : terms) sum += term;
    sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 1);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread % 2 == 0 && thread < 2 * Z::kRows)
      store_shared(place(mem, thread / 2), 1.0F / sqrtf(sum * scale.inverse_width + scale.eps));
  }
  __device__ __forceinline__ float at(const Shared<Z>& mem, int row) const {
    float factor[1];
    load_shared(factor, place(mem, row));
    return factor[0];
  }

 private:
  __device__ __forceinline__ static std::uint32_t place(const Shared<Z>& mem, int row) {
    return mem.base + static_cast<std::uint32_t>(Z::kBufferBytes - 4 * (Z::kRows - row));
  }
};

/// The same for an epilogue that has
///   First first(column)                       what does not depend on the row, parameters
///   Operand load_first(row, column)           what a sum of the first half needs beside it
///   Result finish_first(sum, first, operand)
///   store_first(row, column, result)
///   finish_second(row, column, sum[4])
///   kScales, RowScale scale                   whether sums have a factor of their row
/// A thread that multiplies has one column of the first half and keeps the operands of its rows,
/// which come while products are formed, in registers, which leaves shared memory to the buffers.
/// The warpgroups take panels in turns; if K has one part, theirs are the parts of a sum.
template <class Z, int kParts, class Epilogue>
struct FinishHalves {
  using Own = Columns<Z, kParts, true>;
  static constexpr int kRun = Own::kRun;
  static constexpr int kWidth = 2 * kRun;
  static constexpr int kVector = 4;
  static constexpr int kSums = kParts == 1 ? Z::kGroups : kParts;  // parts of a sum
  static constexpr int kStep = kWarpgroup * Z::kGroups / kRun;  // rows that are finished together
  static constexpr int kItems = Z::kRows / kStep;
  // Operands that are asked for at a time, beside products: all at once, 64 KB of a block hold its
  // first panel up by 2.5 us.
  static constexpr int kPerTurn = 2;
  static constexpr int kTurns = kItems / kPerTurn;
  // Items that are finished together: one by one, each waits for its latencies.
  static constexpr int kTogether = 4;
  static_assert(kWarpgroup * Z::kGroups % kRun == 0 && Z::kRows % kStep == 0 &&
                kRun % kVector == 0 && kItems % kPerTurn == 0 && kItems % kTogether == 0);

  const Args& a;
  const Epilogue& epilogue;
  const Shared<Z>& mem;
  const Work& w;
  int column;
  typename Epilogue::First first;
  typename Epilogue::Operand operands[kItems];
  RowFactors<Z> factors;  // if kScales

  __device__ __forceinline__ FinishHalves(const Args& a, const Epilogue& epilogue,
                                          const Shared<Z>& mem, const Work& w)
      : a(a),
        epilogue(epilogue),
        mem(mem),
        w(w),
        column(Own::at(a, w.column, w.part * kWidth + static_cast<int>(threadIdx.x) % kRun)),
        first(epilogue.first(column)) {}

  __device__ __forceinline__ static bool multiplies() {
    return threadIdx.x < kWarpgroup * Z::kGroups;
  }
  /// Row of the block of item i.
  __device__ __forceinline__ static int row_of(int i) {
    return static_cast<int>(threadIdx.x) / kRun + i * kStep;
  }
  /// Where part p of a sum is.
  __device__ __forceinline__ std::uint32_t place(int p, int row, int at) const {
    if constexpr (kParts > 1) return place_of_sum<Z, kParts>(mem, w, p, row, at);
    return mem.template sums<1>(p) + 4U * static_cast<std::uint32_t>(row * Z::pitch(1) + at);
  }
  /// The sum of N columns from place `at` of what the block finishes.
  template <int N>
  __device__ __forceinline__ void load_sum(float (&sum)[N], int row, int at) const {
    float part[kSums][N];
#pragma unroll
    for (int p = 0; p < kSums; ++p) load_shared(part[p], place(p, row, at));
#pragma unroll
    for (int e = 0; e < N; ++e) {
      sum[e] = part[0][e];
#pragma unroll
      for (int p = 1; p < kSums; ++p) sum[e] += part[p][e];
    }
    if constexpr (kScalesRows<Epilogue>) {
      const float factor = factors.at(mem, row);
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] *= factor;
    }
  }

  /// Asks for the operands of some items, or behind them for the factors.
  __device__ __forceinline__ void load(int turn) {
    if (turn == kTurns) {
      if constexpr (kScalesRows<Epilogue>) factors.load(epilogue.scale, w);
      __syncwarp();  // products that follow are the whole warp's
      return;
    }
#pragma unroll
    for (int i = turn * kPerTurn; i < (turn + 1) * kPerTurn; ++i)
      operands[i] = epilogue.load_first(w.row + min(row_of(i), w.rows - 1), column);
  }
  /// kTogether items of the first half. Of rows that do not exist nothing is stored.
  __device__ __forceinline__ void run_first(int begin) const {
    float sum[kTogether][1];
    typename Epilogue::Result result[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      load_sum(sum[j], row_of(begin + j), static_cast<int>(threadIdx.x) % kRun);
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      result[j] = epilogue.finish_first(sum[j][0], first, operands[begin + j]);
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (row_of(begin + j) < w.rows)
        epilogue.store_first(w.row + row_of(begin + j), column, result[j]);
  }
  __device__ __forceinline__ void run() const {
    if (!multiplies()) return;
#pragma unroll
    for (int i = 0; i < kItems; i += kTogether)
      if (row_of(i) < w.rows) run_first(i);
    constexpr int kPerRow = kRun / kVector;
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x); i < w.rows * kPerRow;
         i += kWarpgroup * Z::kGroups) {
      const int at = kRun + i % kPerRow * kVector;
      float sum[kVector];
      load_sum(sum, i / kPerRow, at);
      epilogue.finish_second(w.row + i / kPerRow, Own::at(a, w.column, w.part * kWidth + at), sum);
    }
  }
};

template <class Z, int kParts, int N, class Epilogue>
using FinishOf = std::conditional_t<kHasHalves<Epilogue>, FinishHalves<Z, kParts, Epilogue>,
                                    Finish<Z, kParts, N, Epilogue>>;

/// Clusters of kParts blocks; the epilogue handles N columns at a time.
template <class Z, int kParts, int N, class Epilogue>
__global__ __launch_bounds__(Z::kThreads) void product_sm90_kernel(
    Args a, Epilogue epilogue, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Shared<Z> mem(shared);
  if (!a.behind_wait) let_next_kernel_start();
  const Work w(a, kParts, Z{});
  using Own = Columns<Z, kParts, kHasHalves<Epilogue>>;
  const Copies<Z, Own> copies{a, maps, mem, w};
  const bool copies_panels = threadIdx.x == Z::kGroups * kWarpgroup;
  constexpr bool kOneByOne = kParts > 1 && Z::one_by_one(kParts);
  constexpr bool kMeets = kParts > 1 && Z::kShort;  // once more, when the buffers are read
  static_assert(!kMeets || (2 * kParts - 1) * Z::sum_bytes(kParts) <=
                               Z::kBufferBytes - 4 * Z::kRows);
  if (copies_panels)
    mem.init_barriers(kOneByOne ? w.rows * Z::kColumns * 4
                                : (kParts - 1) * w.rows * Z::pitch(kParts) * 4);
  __syncthreads();
  if constexpr (kParts > 1) cluster_arrive();
  FinishOf<Z, kParts, N, Epilogue> finish(a, epilogue, mem, w);
  const int group = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  float c[Z::kRowTiles][4] = {};  // sums
  if (group == Z::kGroups) {
    if (copies_panels) copies.begin();
    if constexpr (kMeets) cluster_wait();
    wait_for_previous_kernel();
    if (copies_panels) copies.run();
    __syncwarp();
    if constexpr (!kHasHalves<Epilogue>) finish.load();
  } else {
    if constexpr (!kHasHalves<Epilogue>) finish.prefetch();
    if constexpr (kMeets) cluster_wait();
    wait_for_previous_kernel();
    if (threadIdx.x == 0) copies.begin_inputs();
    __syncwarp();
    if constexpr (!kHasHalves<Epilogue>) finish.load();
    // Buffers are given back at once where x is large and their turn comes again and again, so that
    // as many copies as possible are on their way; else one panel later, so that products follow
    // each other.
    if constexpr (kHasHalves<Epilogue>) {
      float all[2 * Z::kRowTiles][4] = {};
      multiply_in_turns<Z, decltype(finish)::kTurns>(mem, w, group, all,
                                                     [&](int turn) { finish.load(turn); });
      if constexpr (kParts == 1)
        put_parts(mem, group, all);
      else
        share_rows(mem, group, all, c);
    } else if (Z::kRows >= 64 && w.count >= 2 * Z::kInputStages)
      multiply_panels<Z, 0>(mem, w, group, c);
    else
      multiply_panels<Z, 1>(mem, w, group, c);
  }
  // Nobody reads the buffers any more, of this block (those that take turns have met), and if sums
  // are received there of any.
  if constexpr (!kOneByOne && !Z::kInTurns) __syncthreads();
  if constexpr (kMeets) cluster_arrive();
  if (group < Z::kGroups) {
    if constexpr (kParts > 1 || !Z::kInTurns) hand_on<Z, kParts>(mem, w, group, c);
    if constexpr (kScalesRows<Epilogue>) finish.factors.share(epilogue.scale, mem);
  } else if constexpr (kParts > 1) {
    cluster_wait();
  }
  if constexpr (!kOneByOne) __syncthreads();  // the block's own sums
  if constexpr (kParts > 1) barrier_wait(mem.received(), 0);
  if constexpr (kParts > 1 && !kOneByOne) cluster_arrive();
  finish.run();
  if constexpr (kParts > 1 && !kOneByOne) cluster_wait();  // until what it sent has been received
}

/// The matrix of the rows of an operand.
inline HeadRows matrix(TensorView t) {
  return {1, detail::row_count(t), 1, t.dim(-1),
          detail::row_count(t) > 1 ? detail::row_stride(t) : t.dim(-1)};
}

inline int ceil_div(std::int64_t a, std::int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

/// Rows of x in each of `tiles` tiles: what lies beyond them takes a tensor copy longer than rows
/// that exist, though nothing is read.
inline int tile_rows(int rows, int tiles) {
  return ceil_div(ceil_div(rows, tiles), 8) * 8;
}

/// One cluster for each tile of y.
template <class Z, int kParts, int N, class Epilogue>
void launch_tiles(cudaStream_t stream, int tiles, const Args& a, const Epilogue& epilogue,
                  const Maps& maps) {
  const auto kernel = product_sm90_kernel<Z, kParts, N, Epilogue>;
  constexpr int shared = Z::shared_bytes(kParts);
  allow_shared(kernel, shared);
  launch_clusters(kernel, kParts, static_cast<unsigned>(kParts * tiles), Z::kThreads, shared,
                  stream, a, epilogue, maps);
}

/// A product as the kernel takes it.
struct Product {
  TensorView x, weight;
  bool stable_weight;
  bool behind_wait = false;  // see Args
  bool weight_once = false;
};

inline Args product_args(const Product& f, int row_tiles, int parts) {
  const int rows = static_cast<int>(detail::row_count(f.x));
  const int panels = ceil_div(f.x.dim(-1), kPanel);
  return {.rows = rows,
          .columns = static_cast<int>(f.weight.dim(0)),
          .row_tiles = row_tiles,
          .tile_rows = tile_rows(rows, row_tiles),
          .panels = panels,
          .per_part = ceil_div(panels, parts),
          .stable_weight = f.stable_weight,
          .behind_wait = f.behind_wait,
          .weight_once = f.weight_once};
}
/// For copies of `weight_rows` neighbouring rows of W.
inline Maps product_maps(const Product& f, const Args& args, int weight_rows) {
  return {head_map(f.weight.data<bf16>(), matrix(f.weight), weight_rows),
          head_map(f.x.data<bf16>(), matrix(f.x), args.tile_rows)};
}

template <class Z, class Epilogue>
void launch(cudaStream_t stream, const Product& f, const Epilogue& epilogue) {
  const int row_tiles = ceil_div(detail::row_count(f.x), Z::kRows);
  const int parts = parts_of(f.weight);
  const Args args = product_args(f, row_tiles, parts);
  const int tiles = row_tiles * ceil_div(args.columns, Z::kColumns);
  const auto run = [&]<int kParts>() {
    constexpr bool kHalves = kHasHalves<Epilogue>;
    const Maps maps = product_maps(f, args, Columns<Z, kParts, kHalves>::kRun);
    if constexpr (kHalves) {
      launch_tiles<Z, kParts, 1>(stream, tiles, args, epilogue, maps);
    } else {
      // Lanes that read neighbouring 16 bytes of a part, or write neighbouring 16 bytes.
      constexpr int kWidth = Epilogue::kNarrow ? 1 : kParts > 1 ? 4 : 8;
      if (epilogue.allows(kWidth, args.columns))
        return launch_tiles<Z, kParts, kWidth>(stream, tiles, args, epilogue, maps);
      if constexpr (kWidth > 1) launch_tiles<Z, kParts, 1>(stream, tiles, args, epilogue, maps);
    }
  };
  if constexpr (Z::kShort && !Z::kInTurns) {
    run.template operator()<4>();
  } else {
    if constexpr (!kHasHalves<Epilogue>)
      if (parts == 8) return run.template operator()<8>();
    if (parts == 4) return run.template operator()<4>();
    if (parts == 2) return run.template operator()<2>();
    run.template operator()<1>();
  }
}

template <class Epilogue>
void launch(cudaStream_t stream, const Product& f, const Epilogue& epilogue) {
  const std::int64_t rows = detail::row_count(f.x);
  // Buffers for two blocks of a multiprocessor, that of the next product being resident early, if
  // rows are few. Many columns of short rows: a block takes more of them, else it ends as soon as
  // it has begun.
  const bool short_rows = f.weight.dim(0) >= 16384 && f.weight.dim(1) <= 1024;
  if (rows <= 16 && short_rows) return launch<Tile<16, 2, 1, 6>>(stream, f, epilogue);
  if (rows <= 16) return launch<Tile<16, 1, 1, 10>>(stream, f, epilogue);
  if (rows <= 32 && short_rows) return launch<Tile<32, 2, 1, 5>>(stream, f, epilogue);
  if (rows <= 32) return launch<Tile<32, 1, 1, 8>>(stream, f, epilogue);
  // Two tiles of rows read W twice, from L2 the second time.
  constexpr bool kHalves = kHasHalves<Epilogue>;
  if (f.weight.numel() < kSmallWeight) return launch<Tile<64, 1, 1, 5>>(stream, f, epilogue);
  if (rows <= 64) return launch<Tile<64, 1, 1, kHalves ? 5 : 6>>(stream, f, epilogue);
  if (f.weight.numel() < 2 * kSmallWeight) return launch<Tile<128, 1, 2, 7>>(stream, f, epilogue);
  // 32 clusters of four: an H200 takes 30 at once if they do not share multiprocessors.
  if constexpr (!kHalves)
    if (parts_of(f.weight) == 4) return launch<Tile<128, 1, 2, 5, 4>>(stream, f, epilogue);
  launch<Tile<128, 1, 2, 4>>(stream, f, epilogue);
}

}  // namespace lrnn::cuda::linear_sm90
