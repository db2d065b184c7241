// Products in float32 accuracy on Hopper's tensor cores: warpgroup products of numbers that are
// split into two float16 each (common/linear_float32_sm90.cuh).
//
// First a kernel splits both operands: a block has 64 x 64 numbers, a thread 16. Their parts go to
// memory as they shall lie in shared memory, with the units of the tile.
// Then a block stays and takes tiles of 128 x 128 of y, one after the other, or parts of the depth
// of such tiles. One warp copies tiles of the operands to buffers of 64 of the depth; two
// warpgroups own 64 rows of the tile each. The two products of different parts have sums of their
// own, because what they add counts 2^-11: while the product of the first parts runs they are added
// to the sums in float32, and that product while the other warpgroup's run. The parts of a sum over
// the depth are written beside each other and added in their order.
//
// On an H200 16384 x 1536 x 768 takes 0.211 ms, 183 TFLOP/s; 16384 x 768 x 1536 with the right
// operand across 171, 1536 x 768 x 16384 with both across 149. Splitting takes 0.029 ms of the
// first (3.0 TB/s). In the product tensor cores are busy 71 % of the time, 77 % while blocks run,
// L1 and shared memory 70 %: every product of 64 x 128 x 16 reads both operands there, 48 of its 64
// cycles.
//
// How the depth is cut depends on the sizes of the product alone.
#include "common/linear_float32_tiles.cuh"

namespace lrnn::cuda::linear_float32_sm90::float16x2 {
namespace {

constexpr int kColumns = 128;  // of a tile
constexpr int kGroups = 2;     // warpgroups that multiply, 64 rows each
constexpr int kThreads = kWarpgroup * (kGroups + 1);
constexpr int kSplit = 2;  // float16 of a number
constexpr int kPanelBytes = 64 * kPanelRowBytes;
constexpr int kTileBytes = kSplit * kPanelBytes;  // of 64 x 64 numbers
constexpr int kPanels = 2;                        // of an operand, in a buffer
constexpr int kPartBytes = kPanels * kPanelBytes;
constexpr int kOperandBytes = kSplit * kPartBytes;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kStages = 3;

/// Which numbers of a tile share a unit. Those of a row or column of y can have one of their own:
/// the left operand's rows or, across, its columns.
enum class Share { Row, Column, Tile };

/// What the numbers of a tile were divided by.
struct alignas(16) TileUnits {
  float of[64];  // of rows or columns, or all the same
  float small;   // how many numbers of a row or column, at most, are below kLeastExact
};
constexpr int kUnitBytes = sizeof(TileUnits);
constexpr int kStageUnitBytes = 2 * kPanels * kUnitBytes;
constexpr int kShared = 1024 + kStages * (kStageBytes + kStageUnitBytes + 16);
constexpr int kSplitThreads = 256;
using Sum = float[kColumns / 8][4];

// Before it is split a number is divided by a power of two, its unit: the largest number of those
// that share it is then in [2^14, 2^15).
constexpr int kTop = 14;
constexpr int kShift = 11;               // of the second part
constexpr float kLeastExact = 0x1p-14F;  // of a unit: smaller ones are off by up to 2^-36 of it

// Without what splitting takes.
constexpr Costs kCosts = {
    .columns = kColumns, .start = 4, .stage = 1.1, .store = 1.8, .sum = 4, .part = 2.5e-6};
constexpr double kSplitTime = 2e-6;  // of a number, microseconds

// Numbers of the long operand, or of both, that are split at a time. Longer products go piece by
// piece, so that what is split takes no more than 160 MiB.
constexpr std::int64_t kMostSplit = std::int64_t{5} << 23;

/// A matrix in tiles of 64 x 64, as it lies in memory.
struct SplitMatrix {
  const unsigned char* panels;
  const TileUnits* units;
  int row_tiles, column_tiles;
};

struct SplitProduct {
  Args args;
  SplitMatrix left, right;
};

/// Shared addresses of the buffers and barriers of a block.
struct Shared {
  std::uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* p)
      : base((shared_address(p) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t left(int s) const {
    return base + static_cast<std::uint32_t>(s * kStageBytes);
  }
  __device__ __forceinline__ std::uint32_t right(int s) const { return left(s) + kOperandBytes; }
  __device__ __forceinline__ std::uint32_t units(int s) const {
    return left(kStages) + static_cast<std::uint32_t>(s * kStageUnitBytes);
  }
  __device__ __forceinline__ std::uint32_t full(int s) const {
    return units(kStages) + 8U * static_cast<std::uint32_t>(s);
  }
  __device__ __forceinline__ std::uint32_t free(int s) const { return full(kStages + s); }

  __device__ void init_barriers() const {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full(s), 2 * kPanels);
      barrier_init(free(s), kWarpgroup * kGroups);
    }
    barrier_init_done();
  }
};

/// The power of two below the largest of some numbers, whose bits these are, or what 2^-112 or
/// 2^127 bounds it to: so that its inverse is normal.
__device__ __forceinline__ float unit_below(std::uint32_t most) {
  constexpr std::uint32_t kLeast = 15U << 23, kMost = 254U << 23;
  return __uint_as_float(min(max(most & 0x7F800000U, kLeast), kMost));
}
/// 2^kTop / unit.
__device__ __forceinline__ float inverse(float unit) {
  return __uint_as_float((static_cast<std::uint32_t>(254 + kTop) << 23) - __float_as_uint(unit));
}

/// x1 and 2^kShift x2 of two numbers, both rounded to nearest.
__device__ __forceinline__ void split(float x, float y, std::uint32_t (&parts)[kSplit]) {
  constexpr float kScale = 1U << kShift;
  const __half2 first = __floats2half2_rn(x, y);
  const float2 f = __half22float2(first);
  const __half2 second = __floats2half2_rn((x - f.x) * kScale, (y - f.y) * kScale);
  parts[0] = *reinterpret_cast<const std::uint32_t*>(&first);
  parts[1] = *reinterpret_cast<const std::uint32_t*>(&second);
}

__device__ __forceinline__ void load_4(float* v, const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}

/// A matrix to be split.
struct SplitJob {
  const float* from;
  std::int64_t stride;
  int rows, columns, column_tiles, tiles;
  unsigned char* panels;
  TileUnits* units;
};
/// Units are those of Share::Tile in the second.
struct SplitArgs {
  SplitJob jobs[2];
};

// A block splits 64 x 64 numbers; a thread has four columns of rows place + 16 j.
constexpr int kSplitRows = 4;
using Numbers = float[kSplitRows][4];

static_assert(kSplitRows == 4, "units of a thread's rows, or of its columns");
/// What the threads of such a block share.
struct SplitShared {
  std::uint32_t of_warps[kSplitThreads / 32];
  float4 of_columns[kSplitThreads / 32][16];
  int counts[128];  // of rows and columns
};

/// The largest of every thread's value.
__device__ __forceinline__ std::uint32_t block_max(std::uint32_t v, SplitShared& mem) {
  v = __reduce_max_sync(kAll, v);
  if (threadIdx.x % 32 == 0) mem.of_warps[threadIdx.x / 32] = v;
  __syncthreads();
#pragma unroll
  for (const std::uint32_t m : mem.of_warps) v = max(v, m);
  return v;
}

/// The largest of each of the four columns that threads with the same number modulo 16 have.
__device__ __forceinline__ void column_max(float (&most)[4], SplitShared& mem) {
#pragma unroll
  for (float& m : most) m = fmaxf(m, __shfl_xor_sync(kAll, m, 16));
  const int quad = static_cast<int>(threadIdx.x) % 16;
  if (threadIdx.x % 32 < 16)
    mem.of_columns[threadIdx.x / 32][quad] = make_float4(most[0], most[1], most[2], most[3]);
  __syncthreads();
#pragma unroll
  for (const auto& of_warp : mem.of_columns) {
    const float4 m = of_warp[quad];
    most[0] = fmaxf(most[0], m.x), most[1] = fmaxf(most[1], m.y);
    most[2] = fmaxf(most[2], m.z), most[3] = fmaxf(most[3], m.w);
  }
}

/// Units of a thread's rows, or of its columns.
__device__ __forceinline__ void find_units(const Numbers& v, Share share, SplitShared& mem,
                                           float (&unit)[4]) {
  float most[4] = {};
  if (share == Share::Column) {
#pragma unroll
    for (int n = 0; n < 16; ++n) most[n % 4] = fmaxf(most[n % 4], fabsf(v[n / 4][n % 4]));
    column_max(most, mem);
  } else {
#pragma unroll
    for (int n = 0; n < 16; ++n) most[n / 4] = fmaxf(most[n / 4], fabsf(v[n / 4][n % 4]));
  }
  if (share == Share::Row) {
#pragma unroll
    for (float& m : most)
#pragma unroll
      for (int n = 8; n > 0; n /= 2) m = fmaxf(m, __shfl_xor_sync(kAll, m, n));
  } else if (share == Share::Tile) {
    const float of_thread = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    const float of_all = __uint_as_float(block_max(__float_as_uint(of_thread), mem));
#pragma unroll
    for (float& m : most) m = of_all;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) unit[j] = unit_below(__float_as_uint(most[j]));
}

/// Divides by the units.
__device__ __forceinline__ void scale(Numbers& v, Share share, const float (&unit)[4]) {
  float by[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) by[j] = inverse(unit[j]);
  if (share == Share::Column) {
#pragma unroll
    for (int n = 0; n < 16; ++n) v[n / 4][n % 4] *= by[n % 4];
  } else {
#pragma unroll
    for (int n = 0; n < 16; ++n) v[n / 4][n % 4] *= by[n / 4];
  }
}

__device__ __forceinline__ bool is_small(float x) {
  return fabsf(x) < kLeastExact && x != 0;
}
/// How many of a tile's numbers are small in one row or column, at most. Whole numbers: the order
/// in which the threads count does not matter.
__device__ __forceinline__ int most_small(const Numbers& v, int place, int column,
                                          SplitShared& mem) {
  bool any = false;
#pragma unroll
  for (int n = 0; n < 4 * kSplitRows; ++n) any |= is_small(v[n / 4][n % 4]);
  if (__syncthreads_or(any) == 0) return 0;
  int& count = mem.counts[threadIdx.x % 128];
  if (threadIdx.x < 128) count = 0;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < 4 * kSplitRows; ++n)
    if (is_small(v[n / 4][n % 4])) {
      atomicAdd(&mem.counts[place + n / 4 * 16], 1);
      atomicAdd(&mem.counts[64 + column + n % 4], 1);
    }
  __syncthreads();
  return static_cast<int>(block_max(static_cast<std::uint32_t>(count), mem));
}

template <Share kFirst>
__global__ __launch_bounds__(kSplitThreads) void split_kernel(const __grid_constant__ SplitArgs a) {
  __shared__ SplitShared mem;
  const bool second = static_cast<int>(blockIdx.x) >= a.jobs[0].tiles;
  const SplitJob& job = a.jobs[second ? 1 : 0];
  const Share share = second ? Share::Tile : kFirst;
  const int tile = static_cast<int>(blockIdx.x) - (second ? a.jobs[0].tiles : 0);
  const int place = static_cast<int>(threadIdx.x) / 16;
  const int quad = static_cast<int>(threadIdx.x) % 16;  // of columns
  const int row = tile / job.column_tiles * 64 + place;
  const int column = tile % job.column_tiles * 64 + quad * 4;
  let_next_kernel_start();
  wait_for_previous_kernel();
  Numbers v = {};
#pragma unroll
  for (int j = 0; j < kSplitRows; ++j)
    if (row + j * 16 < job.rows && column < job.columns)
      load_4(v[j], job.from + (row + j * 16) * job.stride + column);
  float unit[4];
  find_units(v, share, mem, unit);
  scale(v, share, unit);
  unsigned char* const to = job.panels + std::int64_t{tile} * kTileBytes + quad % 2 * 8;
#pragma unroll
  for (int j = 0; j < kSplitRows; ++j) {
    std::uint32_t words[2][kSplit];
    split(v[j][0], v[j][1], words[0]);
    split(v[j][2], v[j][3], words[1]);
    const int at = place + j * 16;
    const int swizzled = at * kPanelRowBytes + ((quad / 2) ^ (at % 8)) * 16;
#pragma unroll
    for (int p = 0; p < kSplit; ++p)
      *reinterpret_cast<uint2*>(to + p * kPanelBytes + swizzled) =
          make_uint2(words[0][p], words[1][p]);
  }
  const bool of_columns = share == Share::Column;
  if ((of_columns ? place : quad) == 0)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      job.units[tile].of[of_columns ? quad * 4 + j : place + j * 16] = unit[j];
  const int small = most_small(v, place, quad * 4, mem);
  if (threadIdx.x == 0) job.units[tile].small = static_cast<float>(small);
}

/// Tile `block` of 64 of an operand's rows or columns, over the buffer of the depth at `stage`.
template <bool kAcross>
__device__ __forceinline__ std::int64_t tile_index(const SplitMatrix& m, int block, int stage) {
  return kAcross ? std::int64_t{stage} * m.column_tiles + min(block, m.column_tiles - 1)
                 : std::int64_t{min(block, m.row_tiles - 1)} * m.column_tiles + stage;
}

/// The warp that copies tiles of the operands.
template <bool kAcrossLeft, bool kAcrossRight>
__device__ __forceinline__ void copy_operands(const SplitProduct& p, const Shared& mem, int lane) {
  // Lanes 0 and 1 have the left operand's panels, 2 and 3 the right one's.
  if (lane >= 2 * kPanels) return;
  const bool is_left = lane < kPanels;
  const Args& a = p.args;
  const SplitMatrix& m = is_left ? p.left : p.right;
  const auto place =
      static_cast<std::uint32_t>(lane / kPanels * kOperandBytes + lane % kPanels * kPanelBytes);
  Ring<kStages> ring;
  for (Walk<kColumns, kStageDepth> w(a); w.more(a); w.step(a)) {
    const int stage = w.at / kStageDepth;
    const std::int64_t tile =
        is_left ? tile_index<kAcrossLeft>(m, w.row / 64 + lane % kPanels, stage)
                : tile_index<kAcrossRight>(m, w.column / 64 + lane % kPanels, stage);
    barrier_wait(mem.free(ring.stage), ring.parity ^ 1);
    const std::uint32_t full = mem.full(ring.stage);
    barrier_expect(full, kSplit * kPanelBytes + kUnitBytes);
#pragma unroll
    for (int i = 0; i < kSplit; ++i)
      copy_bytes(mem.left(ring.stage) + place + static_cast<std::uint32_t>(i * kPartBytes),
                 m.panels + tile * kTileBytes + i * kPanelBytes, kPanelBytes, full);
    copy_bytes(mem.units(ring.stage) + static_cast<std::uint32_t>(lane * kUnitBytes),
               m.units + tile, kUnitBytes, full);
    ring.next();
  }
}

/// A product of two parts over a buffer of the depth.
template <bool kAcrossLeft, bool kAcrossRight>
__device__ __forceinline__ void multiply_parts(Sum& c, std::uint64_t left, std::uint64_t right,
                                               int left_part, int right_part, bool accumulate) {
#pragma unroll
  for (int s = 0; s < kStageDepth / 16; ++s)
    multiply_shared<kAcrossLeft, kAcrossRight, __half>(
        c, advance(left, left_part * kPartBytes + s * (kAcrossLeft ? 16 * kPanelRowBytes : 32)),
        advance(right, right_part * kPartBytes + s * (kAcrossRight ? 16 * kPanelRowBytes : 32)),
        accumulate || s > 0);
}

// Sums are kept 2^(2 kTop) times as large as they are, so that no product of units is below the
// least number where a sum is not.
constexpr float kSumUnit = 1.0F / (1U << 2 * kTop);
/// What a sum may be, of 2^(2 kTop) times it, for each number that is small in its unit: such a
/// number is off by at most 2^-36, and by 2^(kTop + 1 - 36) the sum, of which 2^-20 is allowed.
constexpr float kLeastSum = 0.5F;

__device__ __forceinline__ float load_shared(std::uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
/// What a lane's products of a buffer are to be multiplied by.
struct Units {
  float of[2][kPanels];  // [row][panel]
  float small[kPanels];  // numbers of both operands

  /// `left`, `right`: shared addresses of the units of a panel.
  __device__ __forceinline__ Units(std::uint32_t left, std::uint32_t right, int row) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const auto at = right + static_cast<std::uint32_t>(p * kUnitBytes);
      small[p] = load_shared(left + 64 * 4) + load_shared(at + 64 * 4);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        of[r][p] =
            load_shared(left + static_cast<std::uint32_t>(row + r * 8) * 4) * load_shared(at);
    }
  }
};
/// sum += c of these units, and of 2^-kShift of them.
template <bool kShifted>
__device__ __forceinline__ void promote(const Sum& c, const Units& u, Sum& sum) {
  constexpr float kScale = kShifted ? 1.0F / (1U << kShift) : 1.0F;
  float of[2][kPanels];
#pragma unroll
  for (int i = 0; i < 4; ++i) of[i / 2][i % 2] = u.of[i / 2][i % 2] * kScale;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[n][e] = fmaf(c[n][e], of[e / 2][n / 8], sum[n][e]);
  pin(sum);  // now, not when its registers are needed
}

/// A warpgroup that multiplies: 64 rows of every tile.
template <bool kAcrossLeft, bool kAcrossRight>
__device__ __forceinline__ void multiply(const Args& a, const Shared& mem, int warp, int lane) {
  const auto group = static_cast<std::uint32_t>(warp / 4);
  Ring<kStages> ring;
  for (Walk<kColumns, kStageDepth> w(a); w.more(a);
       w.open(a, w.item + static_cast<int>(gridDim.x))) {
    Sum sum = {};
    float least[2] = {};
    const int begin = w.at;
    for (; w.at < w.end; w.at += kStageDepth) {
      barrier_wait(mem.full(ring.stage), ring.parity);
      const std::uint64_t left = panel_descriptor(mem.left(ring.stage) + group * kPanelBytes,
                                                  kAcrossLeft ? kPanelBytes : 16);
      const std::uint64_t right =
          panel_descriptor(mem.right(ring.stage), kAcrossRight ? kPanelBytes : 16);
      Sum cross, c;
      products_begin();
      multiply_parts<kAcrossLeft, kAcrossRight>(cross, left, right, 1, 0, false);
      multiply_parts<kAcrossLeft, kAcrossRight>(cross, left, right, 0, 1, true);
      products_commit();
      multiply_parts<kAcrossLeft, kAcrossRight>(c, left, right, 0, 0, false);
      products_commit();
      const std::uint32_t at = mem.units(ring.stage);
      const Units units(at + group * kUnitBytes, at + kPanels * kUnitBytes,
                        warp % 4 * 16 + lane / 4);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        least[i / 2] = fmaf(units.of[i / 2][i % 2] * kLeastSum, units.small[i % 2], least[i / 2]);
      products_wait<1>();
      pin(cross);
      promote<true>(cross, units, sum);
      products_wait<0>();
      pin(c);
      barrier_arrive(mem.free(ring.stage));  // each lane for its own reads of units
      promote<false>(c, units, sum);
      ring.next();
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] *= kSumUnit;
#pragma unroll
    for (float& l : least) l *= kSumUnit;
    const Strip<false> strip{w.row + warp * 16, w.column, lane};
    correct<kAcrossLeft, kAcrossRight>(a, strip, begin, min(w.end, a.depth), least, sum);
    store_strip(a, strip, a.y + w.part * a.part_size, sum);
  }
}

template <bool kAcrossLeft, bool kAcrossRight>
__global__ __launch_bounds__(kThreads, 1) void float32_product_kernel(
    const __grid_constant__ SplitProduct p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Shared mem(shared);
  if (threadIdx.x == 0) mem.init_barriers();
  __syncthreads();
  wait_for_previous_kernel();
  const int warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (warp >= 4 * kGroups) {
    give_registers<24>();
    if (warp == 4 * kGroups) copy_operands<kAcrossLeft, kAcrossRight>(p, mem, lane);
  } else {
    take_registers<240>();
    multiply<kAcrossLeft, kAcrossRight>(p.args, mem, warp, lane);
  }
}

/// A matrix, split, and the memory of it.
struct Split {
  Tensor panels, units;
  SplitJob job;

  Split(Context& ctx, const Operand& o, std::int64_t width, std::int64_t depth) {
    const std::int64_t rows = o.across ? depth : width;
    const std::int64_t columns = o.across ? width : depth;
    const std::int64_t column_tiles = ceil_div(columns, 64);
    const std::int64_t tiles = ceil_div(rows, 64) * column_tiles;
    panels = ctx.empty({tiles, kTileBytes / 4}, DType::float32);
    units = ctx.empty({tiles, kUnitBytes / 4}, DType::float32);
    job = {.from = o.data,
           .stride = o.stride,
           .rows = static_cast<int>(rows),
           .columns = static_cast<int>(columns),
           .column_tiles = static_cast<int>(column_tiles),
           .tiles = static_cast<int>(tiles),
           .panels = static_cast<unsigned char*>(panels.view().raw()),
           .units = static_cast<TileUnits*>(units.view().raw())};
  }
  [[nodiscard]] SplitMatrix matrix() const {
    return {job.panels, job.units, job.tiles / job.column_tiles, job.column_tiles};
  }
};

void launch(Context& ctx, const Product& p, const Args& a) {
  const Split left(ctx, p.left, p.rows, p.depth);
  const Split right(ctx, p.right, p.columns, p.depth);
  launch_overlapped(p.left.across ? split_kernel<Share::Column> : split_kernel<Share::Row>,
                    static_cast<unsigned>(left.job.tiles + right.job.tiles), kSplitThreads, 0,
                    ctx.stream().handle, SplitArgs{{left.job, right.job}});
  const auto run = [&](auto kernel) {
    LRNN_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    launch_overlapped(kernel, static_cast<unsigned>(std::min(a.items, multiprocessors())), kThreads,
                      kShared, ctx.stream().handle, SplitProduct{a, left.matrix(), right.matrix()});
  };
  if (p.left.across) return run(float32_product_kernel<true, true>);
  if (p.right.across) return run(float32_product_kernel<false, true>);
  run(float32_product_kernel<false, false>);
}

/// Some rows of a product.
Product of_rows(Product p, std::int64_t first, std::int64_t count) {
  p.left.data += first * p.left.stride;
  p.y += first * p.y_stride;
  p.rows = count;
  return p;
}
/// The product over some of the depth of operands across, added to what is before it.
Product of_depth(Product p, std::int64_t first, std::int64_t count) {
  p.left.data += first * p.left.stride;
  p.right.data += first * p.right.stride;
  p.depth = count;
  if (first > 0) p.bias = nullptr, p.accumulate = true;
  return p;
}

void run_piece(Context& ctx, const Product& p) {
  run_in_parts(ctx, p, Plan(p, kCosts), [&](const Args& a) { launch(ctx, p, a); });
}

}  // namespace

bool applies(const Product& p) {
  constexpr std::int64_t kMostTiles = std::int64_t{1} << 30;
  const std::int64_t tiles =
      (ceil_div(p.rows, 64) + ceil_div(p.columns, 64)) * ceil_div(p.depth, kStageDepth);
  return suits(p, 4, 4) && tiles < kMostTiles;
}

double time(const Product& p) {
  return Plan(p, kCosts).time +
         kSplitTime * static_cast<double>(p.rows + p.columns) * static_cast<double>(p.depth);
}

void run(Context& ctx, const Product& p) {
  const std::int64_t length = p.left.across ? p.depth : p.rows;
  const std::int64_t width = p.left.across ? p.rows + p.columns : p.depth;
  const std::int64_t pieces = ceil_div(length * width, kMostSplit);
  const std::int64_t step = ceil_div(ceil_div(length, pieces), kRows) * kRows;
  for (std::int64_t first = 0; first < length; first += step) {
    const std::int64_t count = std::min(step, length - first);
    run_piece(ctx, p.left.across ? of_depth(p, first, count) : of_rows(p, first, count));
  }
}

}  // namespace lrnn::cuda::linear_float32_sm90::float16x2
