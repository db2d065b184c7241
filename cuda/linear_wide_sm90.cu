// Products of up to 128 rows and very many columns on Hopper.
//
// A block owns all rows of x and tiles of 192 columns of y, one after another. One thread copies
// panels of W and x through kStages buffers and is ahead with those of the next tile while the sums
// of the last one are stored. A warpgroup multiplies 64 rows of x by the tile of W^T, each
// of its warps 16 rows, which it rounds and stores by itself, by way of shared memory: in whole
// words of two columns wherever a row of y begins.
//
// Bound by the reading of W. In a chain of such products on an H200 50277 columns of 768 take 26.3
// us with 128 rows and 22.6 with 64 (2.9 and 3.4 TB/s of W), of 2048 with 128 rows 58.8 (3.5 TB/s);
// more of them at 4.1 TB/s, the rest is the beginning and the end. An x shared by clusters of two
// made no difference: what neighbours ask for at the same time L2 delivers once.
#include "common/launch.cuh"
#include "common/linear_sm90_product.cuh"
#include "common/linear_wide_sm90.cuh"
#include "common/wgmma.cuh"

namespace lrnn::cuda::linear_wide {
namespace {

using linear_sm90::ceil_div;
using linear_sm90::matrix;
using linear_sm90::tile_rows;

constexpr int kColumns = 192;
constexpr int kWarpRows = 16;

/// Compile-time sizes: warpgroups, of 64 rows each, and buffers.
template <int kGroups_, int kStages_>
struct Tile {
  static constexpr int kStages = kStages_;
  static constexpr int kRows = 64 * kGroups_;
  static constexpr int kWarps = 4 * kGroups_;  // that multiply
  static constexpr int kThreads = 32 * kWarps + 32;
  static constexpr int kWeightBytes = kColumns * kPanelRowBytes;
  static constexpr int kInputBytes = kRows * kPanelRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kInputBytes;
  // Rows that are written together start in different banks.
  static constexpr int kStagedPitch = 2 * kColumns + 16;
  static constexpr int kSharedBytes = 1024 + kStages * (kStageBytes + 16) + kRows * kStagedPitch;
};

struct Args {
  DeviceRows<bf16> y;
  int rows, columns, panels;
  int stage_bytes;  // of a panel of W and of x
  int tiles;
  bool stable_weight;
};
struct Maps {
  CUtensorMap weight, x;
};

/// Shared addresses of a block: buffers that panels take in turns, their barriers, rounded sums.
template <class Z>
struct Shared {
  std::uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* p)
      : base((shared_address(p) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t weight(int i) const {
    return base + static_cast<std::uint32_t>(i % Z::kStages * Z::kStageBytes);
  }
  __device__ __forceinline__ std::uint32_t input(int i) const {
    return weight(i) + Z::kWeightBytes;
  }
  __device__ __forceinline__ std::uint32_t full(int i) const {
    return base + static_cast<std::uint32_t>(Z::kStages * Z::kStageBytes + i % Z::kStages * 8);
  }
  __device__ __forceinline__ std::uint32_t free(int i) const { return full(i) + 8U * Z::kStages; }
  __device__ __forceinline__ std::uint32_t staged(int row) const {
    return base +
           static_cast<std::uint32_t>(Z::kStages * (Z::kStageBytes + 16) + row * Z::kStagedPitch);
  }
  __device__ void init_barriers() const {
    for (int i = 0; i < Z::kStages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(free(i), Z::kWarps);
    }
    barrier_init_done();
  }
};

/// Every gridDim.x-th tile is one of a block.
struct Tiles {
  int count;

  __device__ __forceinline__ explicit Tiles(int all)
      : count((all - 1 - static_cast<int>(blockIdx.x)) / static_cast<int>(gridDim.x) + 1) {}
  __device__ __forceinline__ int at(int n) const {
    return static_cast<int>(blockIdx.x + n * gridDim.x);
  }
  __device__ __forceinline__ int column(int n) const { return at(n) * kColumns; }
};

/// The copies of a block, by one thread.
template <class Z>
struct Copies {
  const Args& a;
  const Maps& maps;
  const Shared<Z>& mem;
  const Tiles& tiles;

  /// First column of x of the block's panel i. Neighbouring tiles begin with different ones, lest
  /// all blocks ask for the same lines at once.
  __device__ __forceinline__ int depth(int i) const {
    return (tiles.at(i / a.panels) + i) % a.panels * kPanel;
  }
  __device__ __forceinline__ void copy_weight(int i) const {
    barrier_expect(mem.full(i), a.stage_bytes);
    copy_box(mem.weight(i), &maps.weight, mem.full(i), depth(i), 0, tiles.column(i / a.panels), 0);
  }
  __device__ __forceinline__ void copy_input(int i) const {
    copy_box(mem.input(i), &maps.x, mem.full(i), depth(i), 0, 0, 0);
  }
  __device__ __forceinline__ void run() const {
    const int count = tiles.count * a.panels;
    const int early = a.stable_weight ? min(count, Z::kStages) : 0;
    for (int i = 0; i < early; ++i) copy_weight(i);
    wait_for_previous_kernel();
    for (int i = 0; i < count; ++i) {
      if (i >= Z::kStages) barrier_wait(mem.free(i), i / Z::kStages % 2 ^ 1);
      if (i >= early) copy_weight(i);
      copy_input(i);
    }
  }
};

/// Sums of 64 rows by a tile's columns, as the fragments of two products.
struct Sums {
  float low[16][4], high[8][4];

  /// Those of a row and the row 8 behind it in tile n of 8 columns, rounded.
  __device__ __forceinline__ std::uint32_t packed(int n, int half) const {
    const float* c = n < 16 ? low[n] : high[n - 16];
    return pack_bf16(c[2 * half], c[2 * half + 1]);
  }
};

/// Products of panels [begin, begin + a.panels) of the block's.
template <class Z>
__device__ __forceinline__ void multiply_panels(Sums& sums, const Args& a, const Shared<Z>& mem,
                                                int group, int begin) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto rows = static_cast<std::uint32_t>(group * 64 * kPanelRowBytes);
  pin(sums.low);
  pin(sums.high);
  for (int i = begin; i < begin + a.panels; ++i) {
    barrier_wait(mem.full(i), i / Z::kStages % 2);
    const std::uint64_t left = panel_descriptor(mem.input(i) + rows, 16);
    const std::uint64_t right = panel_descriptor(mem.weight(i), 16);
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const bool more = i > begin || step > 0;
      multiply_shared<false, false>(sums.low, advance(left, step * 32), advance(right, step * 32),
                                    more);
      multiply_shared<false, false>(sums.high, advance(left, step * 32),
                                    advance(right, 128 * kPanelRowBytes + step * 32), more);
    }
    products_commit();
    // Not one panel late: the other warpgroup's products fill the gap, and W is asked for earlier.
    products_wait<0>();
    if (lane == 0) barrier_arrive(mem.free(i));
  }
  pin(sums.low);
  pin(sums.high);
}

/// A warp's 16 rows of a tile of y. Their rounded sums lie in shared memory from `staged` on, the
/// first row being `row`, the first column `column`.
template <class Z>
struct WarpRows {
  const Args& a;
  std::uint32_t staged;
  int row, column;

  __device__ __forceinline__ std::uint32_t at(int r, int c) const {
    return staged + static_cast<std::uint32_t>(r * Z::kStagedPitch + 2 * c);
  }
  __device__ __forceinline__ void stage(const Sums& sums, int lane) const {
    const std::uint32_t to = at(lane % 16, lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2)
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       to + static_cast<std::uint32_t>(16 * n)),
                   "r"(sums.packed(n, 0)), "r"(sums.packed(n, 1)), "r"(sums.packed(n + 1, 0)),
                   "r"(sums.packed(n + 1, 1))
                   : "memory");
  }
  /// Two columns from the even column c on, the first in the low half.
  __device__ __forceinline__ std::uint32_t pair(int r, int c) const {
    std::uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at(r, c)) : "memory");
    return v;
  }
  /// What lane `lane` has of kTogether rows from r on: pairs of columns that are words of y, and a
  /// single column that none of them is part of, the first if rows begin within a word, or the
  /// last. All are loaded before any is stored, without branches.
  __device__ __forceinline__ void store_rows(int r, int lane) const {
    constexpr int kTogether = 4;
    constexpr int kWords = kColumns / 64;
    const int columns = min(kColumns, a.columns - column);
    const int single = lane == 0 ? 0 : columns - 1;
    std::uint32_t words[kTogether][kWords];
    std::uint32_t singles[kTogether];
    int odd[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      odd[k] = static_cast<int>(reinterpret_cast<std::uintptr_t>(to(r + k)) / sizeof(bf16) % 2);
      singles[k] = pair(r + k, single & ~1) >> (single % 2 * 16);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int even = 2 * (lane + 32 * i);
        words[k][i] = __funnelshift_r(pair(r + k, even), pair(r + k, even + 2),
                                      static_cast<unsigned>(16 * odd[k]));
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const bool exists = row + r + k < a.rows;
      bf16* const y = to(r + k);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int c = 2 * (lane + 32 * i) + odd[k];
        store_if(exists && c + 1 < columns, y + c, words[k][i]);
      }
      const int left = lane == 0 ? odd[k] : lane == 1 ? (columns ^ odd[k]) & 1 : 0;
      store_if(exists && left != 0, y + single, static_cast<std::uint16_t>(singles[k]));
    }
  }
  __device__ __forceinline__ bf16* to(int r) const { return a.y.row(row + r) + column; }
  __device__ __forceinline__ static void store_if(bool p, bf16* to, std::uint32_t v) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}\n" ::"r"(
                     static_cast<int>(p)),
                 "l"(to), "r"(v)
                 : "memory");
  }
  __device__ __forceinline__ static void store_if(bool p, bf16* to, std::uint16_t v) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b16 [%1], %2;\n}\n" ::"r"(
                     static_cast<int>(p)),
                 "l"(to), "h"(v)
                 : "memory");
  }
  __device__ __forceinline__ void store(const Sums& sums, int lane) const {
    __syncwarp();  // nobody reads the sums of the tile before
    stage(sums, lane);
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < min(kWarpRows, a.rows - row); r += 4) store_rows(r, lane);
  }
};

template <class Z>
__global__ __launch_bounds__(Z::kThreads) void product_wide_sm90_kernel(
    Args a, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Shared<Z> mem(shared);
  let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) mem.init_barriers();
  __syncthreads();
  const Tiles tiles(a.tiles);
  const int warp = __shfl_sync(0xFFFFFFFFU, thread / 32, 0);
  if (warp == Z::kWarps) {
    if (thread % 32 == 0) Copies<Z>{a, maps, mem, tiles}.run();
    return;
  }
  wait_for_previous_kernel();
  Sums sums;
  for (int n = 0; n < tiles.count; ++n) {
    multiply_panels(sums, a, mem, warp / 4, n * a.panels);
    const int row = warp * kWarpRows;
    WarpRows<Z>{a, mem.staged(row), row, tiles.column(n)}.store(sums, thread % 32);
  }
}

template <class Z>
void launch(Context& ctx, const LinearForward& f) {
  const auto kernel = product_wide_sm90_kernel<Z>;
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Z::kSharedBytes));
  const int rows = static_cast<int>(detail::row_count(f.x));
  const Args args{.y = device_rows<bf16>(f.y),
                  .rows = rows,
                  .columns = static_cast<int>(f.weight.dim(0)),
                  .panels = ceil_div(f.x.dim(-1), kPanel),
                  .stage_bytes = Z::kWeightBytes + tile_rows(rows, 1) * kPanelRowBytes,
                  .tiles = ceil_div(f.weight.dim(0), kColumns),
                  .stable_weight = f.stable_weight};
  const Maps maps{head_map(f.weight.data<bf16>(), matrix(f.weight), kColumns),
                  head_map(f.x.data<bf16>(), matrix(f.x), tile_rows(rows, 1))};
  const int blocks = std::min(args.tiles, multiprocessors());
  launch_overlapped(kernel, static_cast<unsigned>(blocks), Z::kThreads, Z::kSharedBytes,
                    ctx.stream().handle, args, maps);
}

}  // namespace

void forward(Context& ctx, const LinearForward& a) {
  if (detail::row_count(a.x) <= 64) return launch<Tile<1, 6>>(ctx, a);
  launch<Tile<2, 4>>(ctx, a);
}

}  // namespace lrnn::cuda::linear_wide
