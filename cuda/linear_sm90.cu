// Products of up to a few hundred rows on Hopper: warpgroup products fed by tensor copies.
//
// A block owns kColumns columns of y, that is, rows of W, all rows of x up to kRows, and one of up
// to eight parts of K; the blocks of all parts are a cluster. One thread copies panels of 64
// columns of W and x through kStages buffers; each of the warpgroups multiplies 64 rows of W, the
// left operand, by x^T. The parts of a sum are then added in the order of K through the shared
// memory of the cluster, each block taking its share of the elements.
// Bound by the reading of W, from 64 rows on by that of x from L2. In a chain of such products on
// an H200 weights of 50280 x 2048 stream at 4.08 TB/s, 50277 x 768 at 3.5, 8192 x 2048 at 3.4, 2048
// x 4096 at 2.55.
//
// How K is cut depends on N and K alone, so the bits of a row of y are the same beside any other
// rows.
#include "common/launch.cuh"
#include "common/linear_sm90.cuh"
#include "common/wgmma.cuh"

namespace lrnn::cuda::linear_sm90 {
namespace {

constexpr int kMaxParts = 8;     // blocks of a cluster that any Hopper device takes
constexpr int kMaxBlocks = 132;  // up to which K is cut further: one for each SM of an H200
constexpr int kMinPanels = 6;    // of a part

/// Compile-time sizes: rows of x in a block, warpgroups along columns and rows of y, buffers.
template <int kRows_, int kColumnGroups_, int kRowGroups_, int kStages_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumnGroups = kColumnGroups_;
  static constexpr int kStages = kStages_;
  static constexpr int kGroups = kColumnGroups * kRowGroups_;
  static constexpr int kColumns = 64 * kColumnGroups;
  static constexpr int kGroupRows = kRows / kRowGroups_;
  static constexpr int kRowTiles = kGroupRows / 8;
  static constexpr int kThreads = kWarpgroup * kGroups + 32;
  static constexpr int kWeightBytes = kColumns * kPanelRowBytes;
  static constexpr int kInputBytes = kRows * kPanelRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kInputBytes;
  // Sums of a block lie where the buffers were. Four words more than a row, so that the rows that a
  // warp writes together hit different banks.
  static constexpr int kPitch = kColumns + 4;
  static constexpr int kShared = 1024 + kStages * kStageBytes + 16 * kStages;
  static_assert(kRows * kPitch * 4 <= kStages * kStageBytes);
};

struct Args {
  DeviceRows<bf16> y;
  const bf16* bias;  // or null
  int rows, columns;
  int row_tiles;         // blocks that share a part of W
  int panels, per_part;  // of K, of a block
  bool accumulate;
  bool stable_weight;
};

struct Maps {
  CUtensorMap weight, x;
};

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// All threads of the cluster; what they wrote to shared memory before can be read after.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// Floats at this block's shared address `at`, of the block of `rank` of kBlocks.
template <int kBlocks, int N>
__device__ __forceinline__ void load_from(float (&v)[N], int rank, std::uint32_t at) {
  if constexpr (kBlocks > 1)
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(rank));
  if constexpr (N == 1) {
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v[0]) : "r"(at) : "memory");
  } else {
#pragma unroll
    for (int e = 0; e < N; e += 4)
      asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v[e]), "=f"(v[e + 1]), "=f"(v[e + 2]), "=f"(v[e + 3])
                   : "r"(at + 4U * e)
                   : "memory");
  }
}

/// Shared addresses of the buffers and barriers of a block.
template <class Z>
struct Shared {
  std::uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* p)
      : base((shared_address(p) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t weight(int stage) const {
    return base + static_cast<std::uint32_t>(stage * Z::kStageBytes);
  }
  __device__ __forceinline__ std::uint32_t input(int stage) const {
    return weight(stage) + Z::kWeightBytes;
  }
  __device__ __forceinline__ std::uint32_t full(int stage) const {
    return weight(Z::kStages) + 8U * static_cast<std::uint32_t>(stage);
  }
  __device__ __forceinline__ std::uint32_t free(int stage) const {
    return full(Z::kStages + stage);
  }
  __device__ __forceinline__ std::uint32_t sum(int row, int column) const {
    return base + 4U * static_cast<std::uint32_t>(row * Z::kPitch + column);
  }

  __device__ void init_barriers() const {
    for (int s = 0; s < Z::kStages; ++s) {
      barrier_init(full(s), 1);
      barrier_init(free(s), 4 * Z::kGroups);
    }
    barrier_init_done();
  }
};

/// What a block computes: panels [first, first + count) of K.
struct Work {
  int column, row, rank, first, count;

  template <class Z>
  __device__ __forceinline__ Work(const Args& a, int parts, Z) : rank(cluster_rank()) {
    const int item = static_cast<int>(blockIdx.x) / parts;
    column = item / a.row_tiles * Z::kColumns;
    row = item % a.row_tiles * Z::kRows;
    first = min(rank * a.per_part, a.panels);
    count = min(a.per_part, a.panels - first);
  }
};

/// The thread that copies. What fits in the buffers of W is read, if it may be, or asked for while
/// the kernels before this one run.
template <class Z>
__device__ __forceinline__ void copy_panels(const Args& a, const Maps& maps, const Shared<Z>& mem,
                                            const Work& w) {
  const auto copy_weight = [&](int i) {
    const int stage = i % Z::kStages;
    barrier_expect(mem.full(stage), Z::kStageBytes);
    copy_box(mem.weight(stage), &maps.weight, mem.full(stage), (w.first + i) * kPanel, 0, w.column,
             0);
  };
  const auto copy_input = [&](int i) {
    const int stage = i % Z::kStages;
    copy_box(mem.input(stage), &maps.x, mem.full(stage), (w.first + i) * kPanel, 0, w.row, 0);
  };
  const int ahead = min(w.count, Z::kStages);
  if (!a.stable_weight) {
    for (int i = 0; i < ahead; ++i)
      prefetch_box(&maps.weight, (w.first + i) * kPanel, 0, w.column, 0);
    wait_for_previous_kernel();
  }
  for (int i = 0; i < ahead; ++i) copy_weight(i);
  wait_for_previous_kernel();
  for (int i = 0; i < ahead; ++i) copy_input(i);
  for (int i = ahead; i < w.count; ++i) {
    barrier_wait(mem.free(i % Z::kStages), i / Z::kStages % 2 ^ 1);
    copy_weight(i);
    copy_input(i);
  }
}

/// A warpgroup's 64 columns by kGroupRows rows: products of the block's panels, left in shared
/// memory.
template <class Z>
__device__ __forceinline__ void multiply_panels(const Shared<Z>& mem, const Work& w, int group,
                                                int thread) {
  float c[Z::kRowTiles][4] = {};
  pin(c);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int column = group % Z::kColumnGroups * 64;
  const int row = group / Z::kColumnGroups * Z::kGroupRows;
  for (int i = 0; i < w.count; ++i) {
    const int stage = i % Z::kStages;
    barrier_wait(mem.full(stage), i / Z::kStages % 2);
    const auto bytes = [](int rows) { return static_cast<std::uint32_t>(rows * kPanelRowBytes); };
    const std::uint64_t left = panel_descriptor(mem.weight(stage) + bytes(column), 16);
    const std::uint64_t right = panel_descriptor(mem.input(stage) + bytes(row), 16);
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      multiply_shared<false, false>(c, advance(left, step * 32), advance(right, step * 32), true);
    products_commit();
    products_wait<1>();  // those of the panel before
    if (i > 0 && lane == 0) barrier_arrive(mem.free((i - 1) % Z::kStages));
  }
  products_wait<0>();
  pin(c);
  group_wait(1, kWarpgroup * Z::kGroups);  // until no other warpgroup reads the buffers
#pragma unroll
  for (int n = 0; n < Z::kRowTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      asm volatile(
          "st.shared.f32 [%0], %1;" ::"r"(mem.sum(row + n * 8 + lane % 4 * 2 + e % 2,
                                                  column + warp * 16 + lane / 4 + e / 2 * 8)),
          "f"(c[n][e])
          : "memory");
}

/// y = sum (+ bias), or y += sum, of N columns.
template <int N>
__device__ __forceinline__ void store(const Args& a, int row, int column, float (&sum)[N]) {
  bf16* const y = a.y.row(row) + column;
  const auto add = [&](const bf16* from) {
    Packed<bf16, N> v;
    v.load(from);
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] += v.get(e);
  };
  if (a.bias != nullptr) add(a.bias + column);
  if (a.accumulate) add(y);
  store_packed(y, sum);
}

/// Adds the kParts parts of this block's share of the cluster's sums, N columns at a time.
template <int kParts, int N, class Z>
__device__ __forceinline__ void add_parts(const Args& a, const Shared<Z>& mem, const Work& w) {
  constexpr int kLoads = N == 8 ? 4 : 8;
  constexpr int kItems = kParts < kLoads ? kLoads / kParts : 1;  // of a thread at a time
  constexpr int kPerRow = Z::kColumns / N;
  const int count = min(a.rows - w.row, Z::kRows) * kPerRow;
#pragma unroll 1
  for (int first = w.rank * Z::kThreads + static_cast<int>(threadIdx.x); first < count;
       first += kParts * kItems * Z::kThreads) {
    float part[kItems][kParts][N];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = min(first + i * kParts * Z::kThreads, count - 1);
#pragma unroll
      for (int p = 0; p < kParts; ++p)
        load_from<kParts>(part[i][p], p, mem.sum(at / kPerRow, at % kPerRow * N));
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = first + i * kParts * Z::kThreads;
      const int column = w.column + at % kPerRow * N;
      if (at >= count || column >= a.columns) continue;
#pragma unroll
      for (int p = 1; p < kParts; ++p)
#pragma unroll
        for (int e = 0; e < N; ++e) part[i][0][e] += part[i][p][e];
      store(a, w.row + at / kPerRow, column, part[i][0]);
    }
  }
}

/// Clusters of kParts blocks; y is written N columns at a time.
template <class Z, int kParts, int N>
__global__ __launch_bounds__(Z::kThreads) void product_sm90_kernel(
    Args a, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Shared<Z> mem(shared);
  let_next_kernel_start();
  if (threadIdx.x == 0) mem.init_barriers();
  __syncthreads();
  const Work w(a, kParts, Z{});
  const int group = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (group == Z::kGroups) {
    if (threadIdx.x % 32 == 0) copy_panels<Z>(a, maps, mem, w);
    __syncwarp();
  } else {
    multiply_panels<Z>(mem, w, group, static_cast<int>(threadIdx.x) % kWarpgroup);
  }
  wait_for_previous_kernel();
  if constexpr (kParts == 1)
    __syncthreads();
  else
    cluster_wait();
  add_parts<kParts, N>(a, mem, w);
  if constexpr (kParts > 1) cluster_wait();  // until no block of the cluster reads this one's sums
}

/// Parts of K: a power of two, while the blocks stay few and parts long.
int parts_of(int columns, int panels) {
  const int tiles = (columns + 63) / 64;
  int parts = 1;
  while (parts < kMaxParts && 2 * parts * tiles <= kMaxBlocks && 2 * parts * kMinPanels <= panels)
    parts *= 2;
  return parts;
}

/// The matrix of the rows of an operand.
HeadRows matrix(TensorView t) {
  return {1, detail::row_count(t), 1, t.dim(-1),
          detail::row_count(t) > 1 ? detail::row_stride(t) : t.dim(-1)};
}

int ceil_div(std::int64_t a, std::int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

/// One cluster for each tile of y, overlapping the kernel before.
template <class Z, int kParts, int N>
void launch_clusters(cudaStream_t stream, int tiles, const Args& a, const Maps& maps) {
  const auto kernel = product_sm90_kernel<Z, kParts, N>;
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Z::kShared));
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kParts, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(kParts * tiles);
  config.blockDim = Z::kThreads;
  config.dynamicSmemBytes = Z::kShared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  LRNN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a, maps));
}

template <class Z>
void launch(Context& ctx, const LinearForward& f) {
  const int rows = static_cast<int>(detail::row_count(f.x));
  const int columns = static_cast<int>(f.weight.dim(0));
  const int row_tiles = ceil_div(rows, Z::kRows);
  const int panels = ceil_div(f.x.dim(-1), kPanel);
  const int parts = parts_of(columns, panels);
  const DeviceRows<bf16> y = device_rows<bf16>(f.y);
  const Args args{.y = y,
                  .bias = f.bias ? f.bias.data<bf16>() : nullptr,
                  .rows = rows,
                  .columns = columns,
                  .row_tiles = row_tiles,
                  .panels = panels,
                  .per_part = ceil_div(panels, parts),
                  .accumulate = f.accumulate,
                  .stable_weight = f.stable_weight};
  const Maps maps{head_map(f.weight.data<bf16>(), matrix(f.weight), Z::kColumns),
                  head_map(f.x.data<bf16>(), matrix(f.x), Z::kRows)};
  const int tiles = row_tiles * ceil_div(columns, Z::kColumns);
  const bool wide =
      allows_vectors(y.data, columns, y.stride, 8) && allows_vectors(args.bias, columns, 0, 8);
  const auto run = [&]<int kParts>() {
    // Lanes that read neighbouring 16 bytes of another block, or write neighbouring 16 bytes.
    constexpr int kWidth = kParts > 1 ? 4 : 8;
    const auto launch = wide ? launch_clusters<Z, kParts, kWidth> : launch_clusters<Z, kParts, 1>;
    launch(ctx.stream().handle, tiles, args, maps);
  };
  if (parts == 8) return run.template operator()<8>();
  if (parts == 4) return run.template operator()<4>();
  if (parts == 2) return run.template operator()<2>();
  run.template operator()<1>();
}

}  // namespace

void forward(Context& ctx, const LinearForward& a) {
  const std::int64_t rows = detail::row_count(a.x);
  // Many columns of short rows: a block takes more of them, else it ends as soon as it has begun.
  const bool short_rows = a.weight.dim(0) >= 16384 && a.weight.dim(1) <= 1024;
  if (rows <= 16 && short_rows) return launch<Tile<16, 2, 1, 6>>(ctx, a);
  if (rows <= 16) return launch<Tile<16, 1, 1, 11>>(ctx, a);
  if (rows <= 32 && short_rows) return launch<Tile<32, 2, 1, 5>>(ctx, a);
  if (rows <= 32) return launch<Tile<32, 1, 1, 9>>(ctx, a);
  // Two tiles of rows read W twice, from L2 the second time.
  if (rows <= 64 || a.weight.numel() < kSmallWeight) return launch<Tile<64, 1, 1, 6>>(ctx, a);
  launch<Tile<128, 1, 2, 4>>(ctx, a);
}

}  // namespace lrnn::cuda::linear_sm90
