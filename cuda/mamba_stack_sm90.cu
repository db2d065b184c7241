// One token of 65 to 128 sequences through a stack of Mamba blocks, four kernels a layer: in_proj
// with the convolution, x_proj, the scan, and out_proj with the addition of the next layer's norm.
//
// Of r = x + r the last one stores n = r weight, without the factor 1 / rms of a row: in_proj
// applies that to its sums. All it needs is the row's sum of squares, which comes in one part for
// each tile of columns.
//
// A block of out_proj owns some columns of y, all rows and one of four parts of K; the blocks of
// all parts are a cluster, of which each finishes a quarter of the rows. Two warpgroups multiply 64
// rows of x each, the left operand, by all columns, one more warp copies panels of W and x. Of 2048
// columns a block has as many as make 29 clusters (an H200 takes 30 if they do not share
// multiprocessors), so that x comes through as many ports as possible: by 64 columns 32 clusters
// sat on half of the multiprocessors and ended 1 us later. Sums are received where panels of W were
// whose buffers are not used again, as soon as all blocks have read those.
//
// out_proj lets in_proj start only when the scan before it has ended. Then all kernels before that
// have ended as well, so that the scan of the next layer may read its states as soon as there is
// room, beside x_proj. A layer of 2048 takes 1.1 us less than if the states wait for in_proj's end.
//
// Weights of large layers are the first to leave L2: what fills it then pushes out weights that
// have been read, and states, which must be written, go later, when the next states come and memory
// has time. 48 layers of 2048 take 1.4 % less; with states as the first to leave they take more.
//
// Bound by the latency of x, 256 KB of a block beside 144 of W: what counts is how much of it is on
// its way. Stamps of 2048 x 4096 with 128 rows on an H200, us from the end of the scan, with
// buffers for all 16 panels of W and five of x: first panel 1.0, last product 6.9, exchange 9.0,
// end 9.4 (all of W from memory takes 4.1 us). With ten and eight a layer takes 1.3 us less. If all
// panels of W come before, products end at 5.4, but the scan, in whose way they are, 2 us later.
#include "lrnn/ops/add_norm.hpp"

#include "common/linear_sm90_product.cuh"
#include "common/mamba_stack_sm90.cuh"
#include "common/projected_conv1d.cuh"
#include "common/projected_selective_scan.cuh"
#include "ops/mamba_stack_parts.hpp"

namespace lrnn::cuda::linear_sm90 {
namespace {

constexpr int kParts = 4;  // of K

/// Sizes of a block of out_proj: columns of y by eights, buffers of W and x.
template <int kColumnTiles_, int kStages_, int kInputStages_>
struct ResidualTile {
  static constexpr int kRows = RowScale::kRows;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kColumns = 8 * kColumnTiles;
  static constexpr int kStages = kStages_;
  static constexpr int kInputStages = kInputStages_;
  static constexpr int kEarlyPanels = 6;  // of W, that are asked for while the scan runs
  static constexpr bool kShort = true;    // x has barriers of its own, W as many buffers or more
  static constexpr int kGroups = kRows / 64;
  static constexpr int kComputers = kWarpgroup * kGroups;  // threads
  static constexpr int kThreads = kComputers + 32;
  static constexpr int kReaders = 4 * kGroups;  // warps that read a panel
  static constexpr int kWeightBytes = kColumns * kPanelRowBytes;
  static constexpr int kInputBytes = kRows * kPanelRowBytes;
  static constexpr int kBufferBytes = kStages * kWeightBytes + kInputStages * kInputBytes;
  static constexpr int kBarrierBytes = 8 * kStages + 16 * kInputStages + 24;
  // A warp hands 16 rows on, of a lane four sums in each tile of columns.
  static constexpr int kOwnRows = 16;  // of a warpgroup, that a block finishes
  static constexpr int kOwnTiles = kGroups * kColumnTiles;
  static constexpr int kSentBytes = kOwnTiles * 32 * 16;  // from one block to another
  static constexpr int kItems = (kOwnTiles + kComputers / 32 - 1) / (kComputers / 32);
  // They are received where panels of W were that no others take the place of, squares of rows
  // behind the barriers.
  static constexpr int kReceivedBytes = kParts * kSentBytes;
  static constexpr int kReceivedPanels = (kReceivedBytes + kWeightBytes - 1) / kWeightBytes;
  __host__ __device__ static constexpr int first_received(int panels) {
    const int again = panels - kStages;  // buffers that are used twice
    return again > 0 && again + kReceivedPanels <= kStages ? again : 0;
  }
  static constexpr int kSquareBytes = kOwnTiles * kOwnRows * 4;
  static constexpr int kSharedBytes = 1024 + kBufferBytes + kBarrierBytes + kSquareBytes;
  static_assert(kInputStages <= kStages && kReceivedPanels <= kStages && kParts == kWarpgroup / 32);
};

/// r += x W^T, rounded; n = r norm_weight; squares of r by tiles of columns.
struct ResidualProduct {
  TensorView x, weight, norm_weight;
  MutableTensorView residual, n, squares;
  bool weight_once;
};

struct ResidualArgs {
  Args product;
  const float* norm_weight;
  float* residual;  // [rows, columns]
  bf16* n;          // [rows, columns]
  float* squares;   // [tiles of columns, kRows]
};

/// Shared addresses of a block.
template <class Z>
struct ResidualShared : Shared<Z> {
  int first_received;  // panel of W

  __device__ __forceinline__ ResidualShared(const void* p, const Args& a)
      : Shared<Z>(p), first_received(Z::first_received(a.per_part)) {}

  /// A lane's sums of part `from` of K; own tile i is tile i % kColumnTiles of a warpgroup.
  [[nodiscard]] __device__ __forceinline__ std::uint32_t sums(int from, int i) const {
    return this->weight(first_received) +
           static_cast<std::uint32_t>(from * Z::kSentBytes + i * 32 * 16) + threadIdx.x % 32 * 16U;
  }
  /// Sum of squares of a row that the block finishes, over the columns of a tile.
  [[nodiscard]] __device__ __forceinline__ std::uint32_t square(int i, int row) const {
    return this->received() + 8U + static_cast<std::uint32_t>(4 * (i * Z::kOwnRows + row));
  }
};

/// A warpgroup's 64 rows: products of the block's panels. Arrives at the cluster's barrier when
/// sums may be received.
template <class Z>
__device__ __forceinline__ void multiply_rows(const ResidualShared<Z>& mem, const Work& w,
                                              int group, float (&c)[Z::kColumnTiles][4]) {
  pin(c);
  // Buffers that are not used again are free as soon as they have been read.
  const int received = mem.first_received + Z::kReceivedPanels;
  const int last = w.count <= Z::kStages + mem.first_received ? min(w.count, received) : w.count;
  const auto rows = static_cast<std::uint32_t>(group * 64 * kPanelRowBytes);
  for (int i = 0; i < w.count; ++i) {
    barrier_wait(mem.full(i), i / Z::kStages % 2);
    barrier_wait(mem.input_full(i), i / Z::kInputStages % 2);
    const std::uint64_t left = panel_descriptor(mem.input(i) + rows, 16);
    const std::uint64_t right = panel_descriptor(mem.weight(i), 16);
    multiply_panel(c, left, right);
    products_wait<0>();
    if (threadIdx.x % 32 == 0) barrier_arrive(mem.free(i));
    if (i + 1 == last) cluster_arrive();
  }
  if (w.count == 0) cluster_arrive();
  pin(c);
}

/// Hands the sums of each warp to the block that finishes them.
template <class Z>
__device__ __forceinline__ void hand_on_rows(const ResidualShared<Z>& mem, const Work& w, int group,
                                             const float (&c)[Z::kColumnTiles][4]) {
  const int owner = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) % kWarpgroup / 32, 0);
  const std::uint32_t to = mem.sums(w.part, group * Z::kColumnTiles);
  if (owner == w.part) {
#pragma unroll
    for (int j = 0; j < Z::kColumnTiles; ++j) store_shared(to + 512U * j, c[j]);
    return;
  }
  const std::uint32_t there = address_in(owner, to);
  const std::uint32_t barrier = address_in(owner, mem.received());
#pragma unroll
  for (int j = 0; j < Z::kColumnTiles; ++j) send(there + 512U * j, c[j], barrier);
}

/// What a thread finishes: of every item two neighbouring columns of two rows that are eight apart.
template <class Z>
struct ResidualFinish {
  const ResidualArgs& a;
  const Work& w;
  int warp, lane;
  float2 weight[Z::kItems];
  float2 residual[Z::kItems][2];

  __device__ __forceinline__ ResidualFinish(const ResidualArgs& a, const Work& w)
      : a(a),
        w(w),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {
#pragma unroll
    for (int k = 0; k < Z::kItems; ++k)
      weight[k] = *reinterpret_cast<const float2*>(a.norm_weight +
                                                   min(column_of(k), a.product.columns - 2));
  }
  /// Own tile of item k.
  __device__ __forceinline__ int tile_of(int k) const {
    return warp + k * (Z::kComputers / 32);
  }
  __device__ __forceinline__ int column_of(int k) const {
    return w.column + tile_of(k) % Z::kColumnTiles * 8 + lane % 4 * 2;
  }
  __device__ __forceinline__ int row_of(int k, int e) const {
    return tile_of(k) / Z::kColumnTiles * 64 + w.part * Z::kOwnRows + e * 8 + lane / 4;
  }
  /// Place of row e of item k, or of one that exists.
  __device__ __forceinline__ std::int64_t at(int k, int e) const {
    return std::int64_t{min(row_of(k, e), a.product.rows - 1)} * a.product.columns +
           min(column_of(k), a.product.columns - 2);
  }
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int k = 0; k < Z::kItems; ++k)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        residual[k][e] = __ldcg(reinterpret_cast<const float2*>(a.residual + at(k, e)));
  }
  /// All items at once: one by one, each waits for its latencies.
  __device__ __forceinline__ void run(const ResidualShared<Z>& mem) const {
    barrier_wait(mem.received(), 0);
    float sum[Z::kItems][4];
#pragma unroll
    for (int k = 0; k < Z::kItems; ++k)
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        float part[4];
        load_shared(part, mem.sums(p, min(tile_of(k), Z::kOwnTiles - 1)));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[k][e] = p == 0 ? part[e] : sum[k][e] + part[e];
      }
#pragma unroll
    for (int k = 0; k < Z::kItems; ++k) finish(mem, k, sum[k]);
  }
  __device__ __forceinline__ void finish(const ResidualShared<Z>& mem, int k,
                                         const float (&sum)[4]) const {
    const bool own = tile_of(k) < Z::kOwnTiles;
    const bool exists = own && column_of(k) < a.product.columns;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // A projected value is rounded as if it had been stored.
      const auto rounded = [](float v) { return to_float(from_float<bf16>(v)); };
      float2 r = residual[k][e];
      r.x += rounded(sum[2 * e]);
      r.y += rounded(sum[2 * e + 1]);
      if (exists && row_of(k, e) < a.product.rows) store(at(k, e), r, weight[k]);
      float square = exists ? fmaf(r.y, r.y, r.x * r.x) : 0.0F;
      square += __shfl_xor_sync(0xFFFFFFFFU, square, 1);
      square += __shfl_xor_sync(0xFFFFFFFFU, square, 2);
      if (own && lane % 4 == 0) store_shared(mem.square(tile_of(k), e * 8 + lane / 4), square);
    }
  }
  __device__ __forceinline__ void store(std::int64_t i, float2 r, float2 weight) const {
    *reinterpret_cast<float2*>(a.residual + i) = r;
    const float n[2] = {r.x * weight.x, r.y * weight.y};
    store_packed(a.n + i, n);
  }
};

/// Adds what the tiles of a row have left.
template <class Z>
__device__ __forceinline__ void store_squares(const ResidualArgs& a, const ResidualShared<Z>& mem,
                                              const Work& w) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= Z::kGroups * Z::kOwnRows) return;
  const int group = i / Z::kOwnRows;
  const int row = i % Z::kOwnRows;
  float sum = 0.0F;
#pragma unroll
  for (int j = 0; j < Z::kColumnTiles; ++j) {
    float square[1];
    load_shared(square, mem.square(group * Z::kColumnTiles + j, row));
    sum += square[0];
  }
  a.squares[w.column / Z::kColumns * Z::kRows + group * 64 + w.part * Z::kOwnRows + row] = sum;
}

template <class Z>
__global__ __launch_bounds__(Z::kThreads) void residual_product_kernel(
    ResidualArgs a, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) unsigned char residual_buffers[];
  const ResidualShared<Z> mem(residual_buffers, a.product);
  const Work w(a.product, kParts, Z{});
  const Copies<Z, Columns<Z, kParts, false>> copies{a.product, maps, mem, w};
  const bool copies_panels = threadIdx.x == Z::kComputers;
  if (copies_panels) mem.init_barriers((kParts - 1) * Z::kSentBytes);
  __syncthreads();
  const int group = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (group == Z::kGroups) {
    const int early = min(copies.ahead(), Z::kEarlyPanels);
    if (copies_panels)
      for (int i = 0; i < early; ++i) copies.copy_weight(i);
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (copies_panels) {
      for (int i = early; i < copies.ahead(); ++i) copies.copy_weight(i);
      copies.run();
    }
    cluster_arrive();
    cluster_wait();
    return;
  }
  ResidualFinish<Z> finish(a, w);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (threadIdx.x == 0) copies.begin_inputs();
  __syncwarp();
  finish.load();
  float c[Z::kColumnTiles][4] = {};
  multiply_rows(mem, w, group, c);
  cluster_wait();  // until sums may be received
  hand_on_rows(mem, w, group, c);
  group_wait(1, Z::kComputers);  // the block's own
  finish.run(mem);
  group_wait(1, Z::kComputers);
  store_squares(a, mem, w);
}

/// As many panels of x as there is room for; or tiles so narrow that few columns fill a device, two
/// blocks of a multiprocessor.
using WideTile = ResidualTile<9, 10, 8>;
using NarrowTile = ResidualTile<4, 6, 5>;

int tile_columns(std::int64_t columns) {
  constexpr std::int64_t kNarrow = 1024;
  return columns <= kNarrow ? NarrowTile::kColumns : WideTile::kColumns;
}

template <class Z>
void launch_residual_product(cudaStream_t stream, const ResidualArgs& args, const Maps& maps) {
  const auto kernel = residual_product_kernel<Z>;
  allow_shared(kernel, Z::kSharedBytes);
  launch_clusters(kernel, kParts,
                  static_cast<unsigned>(kParts * ceil_div(args.product.columns, Z::kColumns)),
                  Z::kThreads, Z::kSharedBytes, stream, args, maps);
}

void residual_product(cudaStream_t stream, const ResidualProduct& f) {
  const Product product{
      .x = f.x, .weight = f.weight, .stable_weight = true, .weight_once = f.weight_once};
  const ResidualArgs args{
      .product = product_args(product, 1, kParts),
      .norm_weight = f.norm_weight.data<float>(),
      .residual = f.residual.data<float>(),
      .n = f.n.data<bf16>(),
      .squares = f.squares.data<float>(),
  };
  const int columns = tile_columns(args.product.columns);
  const Maps maps = product_maps(product, args.product, columns);
  if (columns == NarrowTile::kColumns)
    return launch_residual_product<NarrowTile>(stream, args, maps);
  launch_residual_product<WideTile>(stream, args, maps);
}

/// What lies between the kernels of a layer, for all layers.
struct Values {
  Tensor n, uz, v, squares;

  Values(Context& ctx, const MambaStackStep& a)
      : n(ctx.empty(a.x.shape(), DType::bfloat16)),
        uz(ctx.empty({a.x.dim(0), 1, 2 * channels(a)}, DType::bfloat16)),
        v(ctx.empty({a.x.dim(0), 1, channels(a)}, DType::bfloat16)),
        squares(ctx.empty({tiles(a), RowScale::kRows}, DType::float32)) {}

  static std::int64_t channels(const MambaStackStep& a) { return a.layers.front().A_log.dim(0); }
  static std::int64_t tiles(const MambaStackStep& a) {
    return ceil_div(a.x.dim(1), tile_columns(a.x.dim(1)));
  }
  [[nodiscard]] TensorView out_input() const {
    return v.view().reshape({v.view().dim(0), v.view().dim(2)});
  }
};

/// Whether sizes and types suit, and there are norms between layers.
bool usual(const MambaStackStep& a) {
  return a.x.dtype() == DType::bfloat16 && a.residual_out.dtype() == DType::float32 &&
         a.x.dim(0) > 64 && a.x.dim(0) <= RowScale::kRows && a.x.dim(1) % kPanel == 0 &&
         Values::tiles(a) <= RowScale::kMostParts && a.layers.size() > 1;
}
/// Whether the kernels of a layer can address its operands.
bool addressable(const MambaStackStep& a, const MambaStackLayer& layer, Values& values) {
  const std::int64_t inputs = a.x.dim(1);
  return scales_rows(lrnn::detail::mamba_stack_conv(layer, values.n, values.uz)) &&
         applies(values.out_input(), layer.out_proj) &&
         allows_vectors(layer.norm_weight.data<float>(), inputs, inputs, 2) &&
         allows_vectors(a.residual_out.data<float>(), inputs, inputs, 2);
}

/// Whether a layer's weights and states fill most of L2's 50 MB, as from 1536 inputs on. With 768
/// a step takes 0.8 % longer if weights leave first.
bool is_large(const MambaStackLayer& layer) {
  constexpr std::size_t kLarge = 16 << 20;
  return layer.in_proj.nbytes() >= kLarge;
}

/// early: behind an out_proj of this stack.
void scan_step(Context& ctx, const ProjectedSelectiveScanStep& a, bool early) {
  if (early && takes(a)) return projected_selective_scan_step_early(ctx, a);
  lrnn::projected_selective_scan_step(ctx, a);
}

}  // namespace

bool mamba_stack_step(Context& ctx, const MambaStackStep& a) {
  if (!usual(a)) return false;
  Values values(ctx, a);
  const auto suits = [&](const MambaStackLayer& layer) { return addressable(a, layer, values); };
  if (!std::all_of(a.layers.begin(), a.layers.end(), suits)) return false;
  lrnn::add_norm_forward(ctx, {.x = a.x,
                               .residual = a.residual,
                               .weight = a.layers.front().norm_weight,
                               .eps = a.eps,
                               .y = values.n,
                               .residual_out = a.residual_out});
  RowScale scale{};
  for (std::size_t i = 0; i < a.layers.size(); ++i) {
    const MambaStackLayer& layer = a.layers[i];
    projected_conv1d_step(ctx, lrnn::detail::mamba_stack_conv(layer, values.n, values.uz), scale,
                          is_large(layer));
    scan_step(ctx, lrnn::detail::mamba_stack_scan(layer, values.uz, values.v), i > 0);
    if (i + 1 == a.layers.size()) break;
    residual_product(ctx.stream().handle, {.x = values.out_input(),
                                           .weight = layer.out_proj,
                                           .norm_weight = a.layers[i + 1].norm_weight,
                                           .residual = a.residual_out,
                                           .n = values.n,
                                           .squares = values.squares,
                                           .weight_once = is_large(layer)});
    scale = {.squares = values.squares.view().data<float>(),
             .parts = static_cast<int>(Values::tiles(a)),
             .inverse_width = 1.0F / static_cast<float>(a.x.dim(1)),
             .eps = static_cast<float>(a.eps)};
  }
  lrnn::linear_forward(ctx, {.x = values.out_input(),
                             .weight = a.layers.back().out_proj,
                             .y = a.y,
                             .stable_weight = true});
  return true;
}

}  // namespace lrnn::cuda::linear_sm90
