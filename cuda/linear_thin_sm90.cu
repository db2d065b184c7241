// Products of many rows and little depth on Hopper: warpgroup products fed by tensor copies.
//
// A block owns kColumns columns of y, whose part of W stays in shared memory, and walks tiles of 64
// rows, each of which one of its warpgroups multiplies. One thread copies tiles of x through kStages
// buffers. Results leave through shared memory by tensor copies, which also fetch what is added to.
// Bound by the writing of y. On an H200 with cold L2, 16384 rows of 1536 columns and depth 48 take
// 0.0196 ms, 2.65 TB/s, where filling y takes 0.0145; added to y, depth 80, 0.0338 ms, 3.07 TB/s.
#include "common/launch.cuh"
#include "common/linear_sm90.cuh"
#include "common/linear_thin_sm90.cuh"
#include "common/wgmma.cuh"

namespace lrnn::cuda::linear_thin {
namespace {

constexpr int kBlocks = 132;  // of a wave: one for each SM of an H200
constexpr int kTileRows = 64;
constexpr int kStepColumns = 16;  // of a sum that one product takes
constexpr int kPanelSteps = kPanel / kStepColumns;
constexpr int kMostDepth = 2 * kPanel;

/// A block's part of W in shared memory: kColumns columns of y by kDepth. Transposed, W has a row
/// for each number that is summed over.
template <int kColumns, int kDepth, bool kTransposed>
struct WeightTile {
  static constexpr int kPanels = (kTransposed ? kColumns : kDepth) / kPanel;
  static constexpr int kBoxRows = kTransposed ? kDepth : kColumns;
  static constexpr int kPanelBytes = kBoxRows * kPanelRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;

  __device__ static __forceinline__ void copy(std::uint32_t to, const CUtensorMap* map,
                                              std::uint32_t barrier, int column) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      copy_box(to + static_cast<std::uint32_t>(p * kPanelBytes), map, barrier,
               (kTransposed ? column : 0) + p * kPanel, 0, kTransposed ? 0 : column, 0);
  }
  __device__ static __forceinline__ std::uint64_t descriptor(std::uint32_t at, int step) {
    return advance(panel_descriptor(at, kTransposed ? kPanelBytes : 16),
                   kTransposed ? step * kStepColumns * kPanelRowBytes
                               : step / kPanelSteps * kPanelBytes + step % kPanelSteps * 32);
  }
};

struct Maps {
  CUtensorMap x, weight, y;
};

struct Args {
  const bf16* bias;  // or null
  int rows, columns;
  int row_groups;  // blocks that share a part of W
};

/// Compile-time sizes, and the shared addresses of a block's buffers and barriers.
template <int kSteps_, bool kTransposed_, bool kAccumulate_>
struct Tile {
  static constexpr int kSteps = kSteps_;  // of the sum
  static constexpr int kDepthPanels = (kSteps + kPanelSteps - 1) / kPanelSteps;
  static constexpr bool kTransposed = kTransposed_;
  static constexpr bool kAccumulate = kAccumulate_;
  static constexpr int kColumns = 128;
  static constexpr int kGroups = 2;   // each takes every other tile
  static constexpr int kStages = 4;   // tiles of x
  static constexpr int kResults = 3;  // tiles of y of a warpgroup
  using Weight = WeightTile<kColumns, kDepthPanels * kPanel, kTransposed>;
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kThreads = kWarpgroup * kGroups + 32;
  static constexpr int kTileBytes = kTileRows * kPanelRowBytes;  // one panel
  static constexpr int kInputBytes = kDepthPanels * kTileBytes;
  static constexpr int kResultPanels = kColumns / kPanel;
  static constexpr int kResultBytes = kResultPanels * kTileBytes;
  static constexpr int kBarriers = 1 + 2 * kStages + kGroups * kResults;
  static constexpr int kShared = 1024 + Weight::kBytes + kStages * kInputBytes +
                                 kGroups * kResults * kResultBytes + 8 * kBarriers;

  std::uint32_t base;

  __device__ __forceinline__ explicit Tile(const void* shared)
      : base((shared_address(shared) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t input(int stage) const {
    return base + static_cast<std::uint32_t>(Weight::kBytes + stage * kInputBytes);
  }
  __device__ __forceinline__ std::uint32_t result(int group, int i) const {
    return input(kStages) + static_cast<std::uint32_t>((group * kResults + i) * kResultBytes);
  }
  __device__ __forceinline__ std::uint32_t barrier(int i) const {
    return result(kGroups, 0) + 8U * static_cast<std::uint32_t>(i);
  }
  __device__ __forceinline__ std::uint32_t weight_full() const { return barrier(0); }
  __device__ __forceinline__ std::uint32_t full(int stage) const { return barrier(1 + stage); }
  __device__ __forceinline__ std::uint32_t free(int stage) const {
    return barrier(1 + kStages + stage);
  }
  __device__ __forceinline__ std::uint32_t result_full(int group, int i) const {
    return barrier(1 + 2 * kStages + group * kResults + i);
  }
  __device__ void init_barriers() const {
    barrier_init(weight_full(), 1);
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full(s), 1);
      barrier_init(free(s), 4);
    }
    for (int i = 0; i < kGroups * kResults; ++i) barrier_init(result_full(0, i), 1);
    barrier_init_done();
  }
};

/// The tiles of 64 rows that a block takes: i-th of `count`.
struct RowWalk {
  int first, step, count;

  __device__ __forceinline__ explicit RowWalk(const Args& a)
      : first(static_cast<int>(blockIdx.x) % a.row_groups), step(a.row_groups) {
    const int tiles = (a.rows + kTileRows - 1) / kTileRows;
    count = (tiles - first + step - 1) / step;
  }
  __device__ __forceinline__ int row(int i) const { return (first + i * step) * kTileRows; }
};

/// Writes a panel of shared memory to the box of `map`.
__device__ __forceinline__ void store_box(const CUtensorMap* map, std::uint32_t from, int c,
                                          int r) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          reinterpret_cast<std::uint64_t>(map)),
      "r"(from), "r"(c), "r"(0), "r"(r), "r"(0)
      : "memory");
}
__device__ __forceinline__ void stores_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Waits until at most kPending groups of this thread's stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

template <class Z>
__device__ __forceinline__ void copy_rows(const Z& mem, const Maps& maps, const RowWalk& walk,
                                          int column) {
  barrier_expect(mem.weight_full(), Z::Weight::kBytes);
  Z::Weight::copy(mem.base, &maps.weight, mem.weight_full(), column);
  for (int i = 0; i < walk.count; ++i) {
    const int stage = i % Z::kStages;
    barrier_wait(mem.free(stage), i / Z::kStages % 2 ^ 1);
    barrier_expect(mem.full(stage), Z::kInputBytes);
#pragma unroll
    for (int p = 0; p < Z::kDepthPanels; ++p)
      copy_box(mem.input(stage) + static_cast<std::uint32_t>(p * Z::kTileBytes), &maps.x,
               mem.full(stage), p * kPanel, 0, walk.row(i), 0);
  }
}

/// One warpgroup: tiles group, group + kGroups, ... of the block.
template <class Z>
struct Consumer {
  const Args& a;
  const Maps& maps;
  const Z& mem;
  RowWalk walk;
  int column, group, thread;

  // Fetches what tile i adds to.
  __device__ __forceinline__ void fetch(int i) const {
    const int k = i / Z::kGroups % Z::kResults;
    if (i >= walk.count) return;
    barrier_expect(mem.result_full(group, k), Z::kResultBytes);
#pragma unroll
    for (int p = 0; p < Z::kResultPanels; ++p)
      copy_box(mem.result(group, k) + static_cast<std::uint32_t>(p * Z::kTileBytes), &maps.y,
               mem.result_full(group, k), column + p * kPanel, 0, walk.row(i), 0);
  }

  __device__ __forceinline__ void multiply(int stage, float (&c)[Z::kTiles][4]) const {
    const std::uint64_t x = panel_descriptor(mem.input(stage), 16);
    products_begin();
#pragma unroll
    for (int step = 0; step < Z::kSteps; ++step)
      multiply_shared<false, Z::kTransposed>(
          c, advance(x, step / kPanelSteps * Z::kTileBytes + step % kPanelSteps * 32),
          Z::Weight::descriptor(mem.base, step), step > 0);
    products_commit();
    products_wait<0>();
  }

  // Leaves sums, rounded, in the panels at `to`, added to what lies there if so wanted.
  __device__ __forceinline__ void round_to(std::uint32_t to, float (&c)[Z::kTiles][4]) const {
    const int lane = thread % 32;
    const int row = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < Z::kTiles; n += 2) {
      const int chunk = n % 8 + lane / 16;
      const std::uint32_t at =
          to + static_cast<std::uint32_t>(n / 8 * Z::kTileBytes + row * kPanelRowBytes +
                                          ((chunk ^ (row % 8)) << 4));
      std::uint32_t v[4];
      if constexpr (Z::kAccumulate) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(at)
                     : "memory");
#pragma unroll
        for (int e = 0; e < 8; ++e)
          c[n + e / 4][e % 4] +=
              __uint_as_float(e % 2 == 0 ? v[e / 2] << 16 : v[e / 2] & 0xFFFF0000U);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
        v[e] = pack_bf16(c[n + e / 2][e % 2 * 2], c[n + e / 2][e % 2 * 2 + 1]);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                   "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                   : "memory");
    }
  }

  __device__ __forceinline__ void add_bias(float (&c)[Z::kTiles][4]) const {
#pragma unroll
    for (int n = 0; n < Z::kTiles; ++n) {
      const int at = column + n * 8 + thread % 4 * 2;
      if (at >= a.columns) continue;
      Packed<bf16, 2> v;
      v.load(a.bias + at);
#pragma unroll
      for (int e = 0; e < 4; ++e) c[n][e] += v.get(e % 2);
    }
  }

  __device__ __forceinline__ void run() const {
    if (Z::kAccumulate && thread == 0)
      for (int k = 0; k < 2; ++k) fetch(group + k * Z::kGroups);
    barrier_wait(mem.weight_full(), 0);
    for (int i = group; i < walk.count; i += Z::kGroups) {
      const int stage = i % Z::kStages;
      const int k = i / Z::kGroups;
      const std::uint32_t result = mem.result(group, k % Z::kResults);
      barrier_wait(mem.full(stage), i / Z::kStages % 2);
      float c[Z::kTiles][4];
      pin(c);
      multiply(stage, c);
      pin(c);
      if (thread % 32 == 0) barrier_arrive(mem.free(stage));
      if (a.bias != nullptr) add_bias(c);
      if constexpr (Z::kAccumulate)
        barrier_wait(mem.result_full(group, k % Z::kResults), k / Z::kResults % 2);
      round_to(result, c);
      fence_shared_async();
      group_wait(1 + group, kWarpgroup);
      if (thread != 0) continue;
#pragma unroll
      for (int p = 0; p < Z::kResultPanels; ++p)
        if (column + p * kPanel < a.columns)
          store_box(&maps.y, result + static_cast<std::uint32_t>(p * Z::kTileBytes),
                    column + p * kPanel, walk.row(i));
      stores_commit();
      stores_read<1>();  // the tile before is out: its buffer takes the one after the next
      if constexpr (Z::kAccumulate) fetch(i + 2 * Z::kGroups);
    }
    if (thread == 0) stores_read<0>();
  }
};

template <class Z>
__global__ __launch_bounds__(Z::kThreads, 1) void thin_kernel(Args a,
                                                              const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Z mem(shared);
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    mem.init_barriers();
    prefetch_map(&maps.y);
  }
  __syncthreads();
  wait_for_previous_kernel();
  const RowWalk walk(a);
  const int column = static_cast<int>(blockIdx.x) / a.row_groups * Z::kColumns;
  const int group = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (group == Z::kGroups) {
    if (threadIdx.x % 32 == 0) copy_rows(mem, maps, walk, column);
    return;
  }
  const Consumer<Z> consumer{.a = a,
                                 .maps = maps,
                                 .mem = mem,
                                 .walk = walk,
                                 .column = column,
                                 .group = group,
                                 .thread = static_cast<int>(threadIdx.x) % kWarpgroup};
  consumer.run();
}

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

/// The matrix of the rows of an operand.
HeadRows matrix(TensorView t) {
  return {1, detail::row_count(t), 1, t.dim(-1),
          detail::row_count(t) > 1 ? detail::row_stride(t) : t.dim(-1)};
}

template <class Z>
void launch_tile(Context& ctx, const Product& p) {
  const TensorView y = p.y;
  const auto rows = static_cast<int>(detail::row_count(y));
  const auto columns = static_cast<int>(y.dim(-1));
  const int parts = ceil_div(columns, Z::kColumns);
  const Args args{.bias = p.bias ? p.bias.data<bf16>() : nullptr,
                  .rows = rows,
                  .columns = columns,
                  .row_groups = std::clamp(kBlocks / parts, 1, ceil_div(rows, kTileRows))};
  const Maps maps{head_map(p.x.data<bf16>(), matrix(p.x), kTileRows),
                  head_map(p.weight.data<bf16>(), matrix(p.weight), Z::Weight::kBoxRows),
                  head_map(y.data<bf16>(), matrix(y), kTileRows)};
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(thin_kernel<Z>, cudaFuncAttributeMaxDynamicSharedMemorySize, Z::kShared));
  launch_overlapped(thin_kernel<Z>, static_cast<unsigned>(parts * args.row_groups), Z::kThreads,
                    Z::kShared, ctx.stream().handle, args, maps);
}

template <int kSteps, bool kTransposed>
void launch_steps(Context& ctx, const Product& p) {
  if (p.accumulate) return launch_tile<Tile<kSteps, kTransposed, true>>(ctx, p);
  launch_tile<Tile<kSteps, kTransposed, false>>(ctx, p);
}

template <bool kTransposed>
void launch(Context& ctx, const Product& p) {
  const std::int64_t depth = p.x.dim(-1);
  if (depth <= 48) return launch_steps<3, kTransposed>(ctx, p);
  if (depth <= 64) return launch_steps<4, kTransposed>(ctx, p);
  if (depth <= 80) return launch_steps<5, kTransposed>(ctx, p);
  if (depth <= 96) return launch_steps<6, kTransposed>(ctx, p);
  launch_steps<8, kTransposed>(ctx, p);
}

/// Whether most of the device has work.
bool pays(std::int64_t rows, std::int64_t columns, std::int64_t depth) {
  return depth <= kMostDepth && rows >= 1024 && rows * columns >= std::int64_t{1} << 21;
}

}  // namespace

bool multiply(Context& ctx, const Product& p) {
  const TensorView y = p.y;
  if (!pays(detail::row_count(p.x), y.dim(-1), p.x.dim(-1))) return false;
  if (!linear_sm90::applies(p.x, p.weight) || !linear_sm90::applies(y, p.weight)) return false;
  if (p.bias && !allows_vectors(p.bias.data<bf16>(), 8, 8, 8)) return false;
  if (p.transposed)
    launch<true>(ctx, p);
  else
    launch<false>(ctx, p);
  return true;
}

}  // namespace lrnn::cuda::linear_thin
