// One token of 65 to 128 sequences through a stack of Mamba blocks, four kernels a layer: in_proj
// with the convolution, x_proj, the scan, and out_proj with the addition of the next layer's norm.
//
// Of r = x + r the last one stores n = r weight, without the factor 1 / rms of a row: in_proj
// applies that to its sums. All it needs is the row's sum of squares, which comes in one part for
// each tile of columns.
//
// A block of out_proj owns 64 columns of y, all rows and one of four parts of K; the blocks of all
// parts are a cluster, of which each finishes a quarter of the rows. Two warpgroups multiply, one
// more warp copies panels of W and x.
//
// Weights of large layers are the first to leave L2: what fills it then pushes out weights that
// have been read, and states, which must be written, go later, when the next states come and memory
// has time. 48 layers of 2048 take 1.4 % less; with states as the first to leave they take more.
//
// Stamps of 2048 x 4096 with 128 rows on an H200: 6.8 us from the end of the scan to the last
// product, for 384 KB a block of which 128 are W (4.1 us from memory; copies from L2 alone come
// more than twice as fast), 1.4 for the exchange, 0.8 for the rest. A recorded layer took 49.7 us
// where out_proj and norm one by one make it 51.3; one of 768 inputs 21.6 in place of 24.1.
#include "lrnn/ops/add_norm.hpp"

#include "common/linear_sm90_rows.cuh"
#include "common/mamba_stack_sm90.cuh"
#include "common/projected_conv1d.cuh"
#include "ops/mamba_stack_parts.hpp"

namespace lrnn::cuda::linear_sm90 {
namespace {

constexpr int kParts = 4;  // of K

/// Sizes of a block of out_proj.
template <int kWeightBuffers, int kInputBuffers>
struct ResidualTile : RowsTile<Tile<RowScale::kRows, 1, 2, kWeightBuffers, kInputBuffers>, kParts> {
  using Base = RowsTile<Tile<RowScale::kRows, 1, 2, kWeightBuffers, kInputBuffers>, kParts>;
  static constexpr int kWarpsOfRow = Base::kColumns / 16;
  static constexpr int kSquareBytes = Base::kComputers / 32 * Base::kOwnRows * 4;
  static constexpr int kSharedBytes = 1024 + Base::kBufferBytes + Base::kBarrierBytes;
  static_assert(kParts * Base::kSentBytes + kSquareBytes <= Base::kBufferBytes);
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

/// Shared addresses of a block. Sums are received where the buffers were.
template <class Z>
struct ResidualShared : Shared<Z> {
  __device__ __forceinline__ explicit ResidualShared(const void* p) : Shared<Z>(p) {}

  [[nodiscard]] __device__ __forceinline__ RowSums<Z> sums() const {
    return {this->base, this->received()};
  }
  /// Sum of squares of a row that the block finishes, over the columns of a warp.
  __device__ __forceinline__ std::uint32_t square(int warp, int row) const {
    return this->base +
           static_cast<std::uint32_t>(kParts * Z::kSentBytes + 4 * (warp * Z::kOwnRows + row));
  }
};

/// What a thread finishes.
template <class Z>
struct ResidualFinish {
  const ResidualArgs& a;
  int warp, lane;
  RowsPlace<Z> place;
  float2 weight;
  float2 residual[Z::kOwn][2];

  __device__ __forceinline__ ResidualFinish(const ResidualArgs& a, const Work& w, int group)
      : a(a),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32),
        place(w, group),
        weight(*reinterpret_cast<const float2*>(a.norm_weight + place.column)) {}

  __device__ __forceinline__ int row_of(int tile, int e) const { return place.row + tile * 8 + e; }
  __device__ __forceinline__ std::int64_t at(int tile, int e) const {
    return std::int64_t{min(row_of(tile, e), a.product.rows - 1)} * a.product.columns +
           place.column;
  }
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int j = 0; j < Z::kOwn; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        residual[j][e] = __ldcg(reinterpret_cast<const float2*>(a.residual + at(j, e)));
  }
  __device__ __forceinline__ void run(const ResidualShared<Z>& mem,
                                      const float (&sum)[Z::kOwn][4]) const {
#pragma unroll
    for (int j = 0; j < Z::kOwn; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 v = place.neighbours(sum[j], e);
        // A projected value is rounded as if it had been stored.
        const auto rounded = [](float v) { return to_float(from_float<bf16>(v)); };
        float2 r = residual[j][e];
        r.x += rounded(v.x);
        r.y += rounded(v.y);
        if (row_of(j, e) < a.product.rows) store(at(j, e), r);
        float square = fmaf(r.y, r.y, r.x * r.x);
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2)
          square += __shfl_xor_sync(0xFFFFFFFFU, square, offset);
        if (lane < 4) store_shared(mem.square(warp, j * 8 + lane * 2 + e), square);
      }
  }
  __device__ __forceinline__ void store(std::int64_t i, float2 r) const {
    *reinterpret_cast<float2*>(a.residual + i) = r;
    const float n[2] = {r.x * weight.x, r.y * weight.y};
    store_packed(a.n + i, n);
  }
};

/// Adds what the warps of a row have left.
template <class Z>
__device__ __forceinline__ void store_squares(const ResidualArgs& a, const ResidualShared<Z>& mem,
                                              const Work& w) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= 2 * Z::kOwnRows) return;
  const int group = i / Z::kOwnRows;
  const int row = i % Z::kOwnRows;
  float sum = 0.0F;
#pragma unroll
  for (int warp = 0; warp < Z::kWarpsOfRow; ++warp) {
    float square[1];
    load_shared(square, mem.square(group * Z::kWarpsOfRow + warp, row));
    sum += square[0];
  }
  a.squares[w.column / Z::kColumns * Z::kRows + group * Z::kGroupRows + w.part * Z::kOwnRows +
            row] = sum;
}

template <class Z>
__global__ __launch_bounds__(Z::kThreads) void residual_product_kernel(
    ResidualArgs a, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) unsigned char residual_buffers[];
  let_next_kernel_start();
  const ResidualShared<Z> mem(residual_buffers);
  const Work w(a.product, kParts, Z{});
  const Copies<Z, Columns<Z, kParts, false>> copies{a.product, maps, mem, w};
  const bool copies_panels = threadIdx.x == Z::kComputers;
  if (copies_panels) mem.init_barriers((kParts - 1) * Z::kSentBytes);
  __syncthreads();
  const int group = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (group == Z::kGroups) {
    if (copies_panels) copies.begin();
    wait_for_previous_kernel();
    if (copies_panels) copies.run();
    cluster_arrive();
    cluster_wait();
    return;
  }
  ResidualFinish<Z> finish(a, w, group);
  wait_for_previous_kernel();
  if (threadIdx.x == 0) copies.begin_inputs();
  __syncwarp();
  finish.load();
  float c[Z::kRowTiles][4] = {};
  multiply_panels<Z, 0>(mem, w, group, c);
  cluster_arrive();  // all that was in the buffers has been read
  cluster_wait();
  mem.sums().send_all(w, c);
  float sum[Z::kOwn][4];
  mem.sums().add(sum);
  finish.run(mem, sum);
  group_wait(1, Z::kComputers);
  store_squares(a, mem, w);
}

/// Two blocks of a multiprocessor, or panels that are all on their way at once: clusters of four do
/// not all fit if they have a multiprocessor for each block.
using LongRows = ResidualTile<5, 4>;
using ShortRows = ResidualTile<6, 6>;

template <class Z>
void launch_residual_product(cudaStream_t stream, const ResidualArgs& args, const Maps& maps) {
  const auto kernel = residual_product_kernel<Z>;
  allow_shared(kernel, Z::kSharedBytes);
  launch_clusters(kernel, kParts,
                  static_cast<unsigned>(kParts * args.product.columns / Z::kColumns), Z::kThreads,
                  Z::kSharedBytes, stream, args, maps);
}

void residual_product(cudaStream_t stream, const ResidualProduct& f) {
  const int rows = static_cast<int>(f.x.dim(0));
  const int panels = ceil_div(f.x.dim(1), kPanel);
  const ResidualArgs args{
      .product = {.rows = rows,
                  .columns = static_cast<int>(f.weight.dim(0)),
                  .row_tiles = 1,
                  .tile_rows = tile_rows(rows, 1),
                  .panels = panels,
                  .per_part = ceil_div(panels, kParts),
                  .stable_weight = true,
                  .behind_wait = false,
                  .weight_once = f.weight_once},
      .norm_weight = f.norm_weight.data<float>(),
      .residual = f.residual.data<float>(),
      .n = f.n.data<bf16>(),
      .squares = f.squares.data<float>(),
  };
  const Maps maps{head_map(f.weight.data<bf16>(), matrix(f.weight), LongRows::kColumns),
                  head_map(f.x.data<bf16>(), matrix(f.x), args.product.tile_rows)};
  if (args.product.per_part <= ShortRows::kInputStages)
    return launch_residual_product<ShortRows>(stream, args, maps);
  launch_residual_product<LongRows>(stream, args, maps);
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
  static std::int64_t tiles(const MambaStackStep& a) { return a.x.dim(1) / LongRows::kColumns; }
  [[nodiscard]] TensorView out_input() const {
    return v.view().reshape({v.view().dim(0), v.view().dim(2)});
  }
};

/// Whether sizes and types suit, and there are norms between layers.
bool usual(const MambaStackStep& a) {
  return a.x.dtype() == DType::bfloat16 && a.residual_out.dtype() == DType::float32 &&
         a.x.dim(0) > 64 && a.x.dim(0) <= RowScale::kRows && a.x.dim(1) % LongRows::kColumns == 0 &&
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
    lrnn::projected_selective_scan_step(ctx,
                                        lrnn::detail::mamba_stack_scan(layer, values.uz, values.v));
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
