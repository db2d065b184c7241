/// What the kernels of float32 products (common/linear_float32_sm90.cuh) share: how the work is cut
/// into tiles and parts of the depth, and how a warp's sums become rows of y.
#pragma once

#include <cfloat>

#include "lrnn/core/tensor.hpp"

#include "common/capability.cuh"
#include "common/linear_float32_sm90.cuh"
#include "common/rows.cuh"
#include "common/wgmma.cuh"
#include "runtime.hpp"

namespace lrnn::cuda::linear_float32_sm90 {

constexpr int kRows = 128;       // of a tile
constexpr int kStageDepth = 64;  // of the depth, in a buffer
constexpr unsigned kAll = 0xFFFFFFFFU;

struct Args {
  Operand left, right;
  const float* bias;
  float* y;
  std::int64_t y_stride;
  std::int64_t part_size;  // of y: a part of the depth writes its own
  bool accumulate;
  int rows, columns, depth;
  int column_tiles, tiles;
  int part_depth;  // a multiple of kStageDepth
  int items;       // tiles by parts of the depth
};

/// Walks the depth of this block's items, kStep at a time.
template <int kColumns, int kStep>
struct Walk {
  int item, row, column, part;  // the tile begins at (row, column)
  int at, end;                  // of the depth; a multiple of kStageDepth apart

  __device__ __forceinline__ explicit Walk(const Args& a) { open(a, static_cast<int>(blockIdx.x)); }
  __device__ __forceinline__ void open(const Args& a, int next) {
    item = next;
    const int tile = item % a.tiles;
    part = item / a.tiles;
    row = tile / a.column_tiles * kRows;
    column = tile % a.column_tiles * kColumns;
    at = part * a.part_depth;
    end = min(at + a.part_depth, (a.depth + kStageDepth - 1) / kStageDepth * kStageDepth);
  }
  __device__ __forceinline__ bool more(const Args& a) const { return item < a.items; }
  /// Whether it went on to another item.
  __device__ __forceinline__ bool step(const Args& a) {
    at += kStep;
    if (at != end) return false;
    open(a, item + static_cast<int>(gridDim.x));
    return true;
  }
};

/// Where in y a warp's sums are: a lane has rows g and g + 8, or, paired, 2 g and 2 g + 1.
template <bool kPaired>
struct Strip {
  int row, column, lane;  // the first row and column

  __device__ __forceinline__ int row_of(int of_lane, int r) const {
    return row + (kPaired ? of_lane / 4 * 2 + r : of_lane / 4 + r * 8);
  }
  __device__ __forceinline__ int column_of(int of_lane, int n) const {
    return column + of_lane % 4 * 2 + n * 8;
  }
};

/// What a row or column of y sums over, in memory.
struct Terms {
  const float* first;
  std::int64_t step;  // of the depth

  __device__ __forceinline__ Terms(const Operand& o, bool across, int row)
      : first(o.data + (across ? row : row * o.stride)), step(across ? o.stride : 1) {}
};

/// A part of a sum in float32, by a warp, for which others of its block wait.
template <bool kAcrossLeft, bool kAcrossRight>
__device__ __noinline__ float float32_sum(const Args& a, int row, int column, int begin, int end,
                                          int lane) {
  // Terms that a lane asks for at once. With more, the products around the call get registers with
  // which they take 1 to 2 % longer.
  constexpr int kAhead = kAcrossLeft ? 2 : 3;
  const Terms left(a.left, kAcrossLeft, row);
  const Terms right(a.right, kAcrossRight, column);
  float sum = 0;
  for (int first = begin; first < end; first += 32 * kAhead) {
    float x[kAhead], w[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const std::int64_t k = min(first + lane + 32 * i, end - 1);
      x[i] = left.first[k * left.step];
      w[i] = right.first[k * right.step];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + lane + 32 * i < end) sum = fmaf(x[i], w[i], sum);
    if (__any_sync(kAll, isnan(sum))) break;  // which stays NaN: a step that diverged is short
  }
#pragma unroll
  for (int n = 16; n > 0; n /= 2) sum += __shfl_xor_sync(kAll, sum, n);
  return sum;
}

/// y = v (+ bias), or y += v, in two columns of a row.
__device__ __forceinline__ void store(const float* bias, bool accumulate, float* y, float2 v,
                                      int column) {
  if (bias != nullptr) {
    const float2 b = *reinterpret_cast<const float2*>(bias + column);
    v.x += b.x, v.y += b.y;
  }
  float2* const to = reinterpret_cast<float2*>(y + column);
  if (accumulate) {
    const float2 old = *to;
    v.x += old.x, v.y += old.y;
  }
  *to = v;
}

/// Takes sums again in float32 that are not finite, or below least[r] in size.
template <bool kAcrossLeft, bool kAcrossRight, bool kPaired, int kTiles>
__device__ __forceinline__ void correct(const Args& a, const Strip<kPaired>& at, int begin, int end,
                                        const float (&least)[2], float (&sum)[kTiles][4]) {
  float zero = least[0] + least[1];
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) zero = fmaf(sum[n][e], 0.0F, zero);
  if (!__any_sync(kAll, zero != 0)) return;
  std::uint64_t wrong = 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = fabsf(sum[n][e]);
      if (!(x >= least[e / 2] && x <= FLT_MAX) && at.row_of(at.lane, e / 2) < a.rows &&
          at.column_of(at.lane, n) < a.columns)
        wrong |= std::uint64_t{1} << (n * 4 + e);
    }
  for (unsigned lanes; (lanes = __ballot_sync(kAll, wrong != 0)) != 0;) {
    const int leader = __ffs(static_cast<int>(lanes)) - 1;
    const int i =
        __shfl_sync(kAll, __ffsll(static_cast<long long>(wrong)) - 1, leader);  // of its sums
    const float v = float32_sum<kAcrossLeft, kAcrossRight>(
        a, at.row_of(leader, i % 4 / 2), at.column_of(leader, i / 4) + i % 2, begin, end, at.lane);
    if (at.lane != leader) continue;
    wrong &= wrong - 1;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (i == n * 4 + e) sum[n][e] = v;
  }
}

/// A warp's 16 rows of a tile.
template <bool kPaired, int kTiles>
__device__ __forceinline__ void store_strip(const Args& a, const Strip<kPaired>& at, float* y,
                                            const float (&sum)[kTiles][4]) {
  const bool whole = at.column + kTiles * 8 <= a.columns;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = at.row_of(at.lane, r);
    if (row >= a.rows) continue;
    const int column = at.column_of(at.lane, 0);
    float2* const to = reinterpret_cast<float2*>(y + row * a.y_stride + column);
    float2 v[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) v[n] = {sum[n][2 * r], sum[n][2 * r + 1]};
    const auto add_all = [&](const float2* from) {
      float2 more[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        more[n] = whole || column + n * 8 < a.columns ? from[n * 4] : float2{};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) v[n].x += more[n].x, v[n].y += more[n].y;
    };
    if (a.bias != nullptr) add_all(reinterpret_cast<const float2*>(a.bias + column));
    if (a.accumulate) add_all(to);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (whole || column + n * 8 < a.columns) to[n * 4] = v[n];
  }
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

constexpr int kMaxParts = 64;

/// What a kernel takes on an H200, microseconds.
struct Costs {
  int columns;   // of its tiles
  double start;  // all that goes before
  double stage;  // products of a buffer
  double store;  // of a tile
  double sum;    // the kernel that adds parts
  double part;   // a place of a part, written and read
};

/// Into how many parts the depth is cut: such that it takes the least time on an H200, on any
/// device.
struct Plan {
  std::int64_t column_tiles, tiles;
  std::int64_t part_stages = 1;
  std::int64_t parts = 1;
  double time = 0;  // microseconds

  Plan(const Product& p, const Costs& c)
      : column_tiles(ceil_div(p.columns, c.columns)),
        tiles(ceil_div(p.rows, kRows) * column_tiles) {
    constexpr int kDevice = 132;
    const std::int64_t stages = ceil_div(p.depth, kStageDepth);
    for (std::int64_t n = 1; n <= kMaxParts && n <= stages; ++n) {
      const std::int64_t length = ceil_div(stages, n);
      double t = c.start + static_cast<double>(ceil_div(tiles * n, kDevice)) *
                               (static_cast<double>(length) * c.stage + c.store);
      if (n > 1)
        t += c.sum + c.part * static_cast<double>(p.rows) * static_cast<double>(p.columns) *
                         static_cast<double>(n);
      if (n == 1 || t < time) time = t, part_stages = length;
    }
    parts = ceil_div(stages, part_stages);
  }
};

/// Adds the parts of two neighbouring sums in their order.
struct AddParts {
  const float* sums;
  std::int64_t count, part_size, columns;
  const float* bias;
  DeviceRows<float> y;
  bool accumulate;

  __device__ void operator()(std::int64_t row, std::int64_t column) const {
    const float* const at = sums + row * columns + column;
    float2 sum = *reinterpret_cast<const float2*>(at);
#pragma unroll 4
    for (std::int64_t n = 1; n < count; ++n) {
      const float2 v = *reinterpret_cast<const float2*>(at + n * part_size);
      sum.x += v.x, sum.y += v.y;
    }
    store(bias, accumulate, y.row(row), sum, static_cast<int>(column));
  }
};

/// y by launch(args), which makes sums over parts of the depth.
template <class Launch>
void run_in_parts(Context& ctx, const Product& p, const Plan& plan, Launch&& launch) {
  Args a{.left = p.left,
         .right = p.right,
         .bias = p.bias,
         .y = p.y,
         .y_stride = p.y_stride,
         .part_size = 0,
         .accumulate = p.accumulate,
         .rows = static_cast<int>(p.rows),
         .columns = static_cast<int>(p.columns),
         .depth = static_cast<int>(p.depth),
         .column_tiles = static_cast<int>(plan.column_tiles),
         .tiles = static_cast<int>(plan.tiles),
         .part_depth = static_cast<int>(plan.part_stages) * kStageDepth,
         .items = static_cast<int>(plan.tiles * plan.parts)};
  if (plan.parts == 1) return launch(a);
  Tensor sums = ctx.empty({plan.parts, p.rows, p.columns}, DType::float32);
  a.bias = nullptr;
  a.y = sums.view().data<float>();
  a.y_stride = p.columns;
  a.part_size = p.rows * p.columns;
  a.accumulate = false;
  launch(a);
  for_each_vector<2>(
      ctx.stream().handle, p.rows, p.columns,
      AddParts{a.y, plan.parts, a.part_size, p.columns, p.bias, {p.y, p.y_stride}, p.accumulate});
}

/// Whether sizes and y suit the kernels, and whose operands allow vectors of so many numbers.
inline bool suits(const Product& p, int left_vector, int right_vector) {
  constexpr std::int64_t kMostSize = std::int64_t{1} << 30;  // sizes are 32-bit here
  const auto readable = [](const Operand& o, std::int64_t width, int n) {
    return allows_vectors(o.data, width, o.stride, n);
  };
  return std::max({p.rows, p.columns, p.depth}) <= kMostSize &&
         ceil_div(p.rows, kRows) * ceil_div(p.columns, 64) < kMostSize / kMaxParts &&
         (p.right.across || !p.left.across) &&
         readable(p.left, p.left.across ? p.rows : p.depth, left_vector) &&
         readable(p.right, p.right.across ? p.columns : p.depth, right_vector) &&
         allows_vectors(p.y, p.columns, p.y_stride, 2) && allows_vectors(p.bias, 2, 2, 2) &&
         compute_capability() == 90;
}

}  // namespace lrnn::cuda::linear_float32_sm90
