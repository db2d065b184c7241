// x of many sequences and one token, the product before the scan of
// projected_selective_scan_sm90.cu.
//
// There is little to compute, so latency is all. A block owns 64 columns of x, up to 64 rows and
// one of eight parts of K; the blocks of all parts are a cluster, of which each finishes eight
// rows. One warpgroup multiplies, one more warp copies: W before the kernel before has ended,
// panels of u as many as fit behind it. A thread sends its sums, as they lie in its registers, to
// the thread of its number in the block that finishes them. Lanes four apart, whose fragments have
// the same rows, then share out columns that are eight apart, so that a lane finishes neighbours.
//
// Stamps of 160 x 4096 with 128 rows on an H200, beside states that are on their way: 0.5 us from
// the end of in_proj to the first panel, 1.7 to the last product, 1.6 for the exchange. A recorded
// layer took 48.0 us for 48.7 with the product of common/linear_sm90_product.cuh, with eight
// buffers of u for five and a state more ahead 0.3 less. x as words with tags, for which the scan
// waits instead of for the end of this kernel, came no earlier: its questions go through queues
// full of states.
#include "common/linear_sm90_product.cuh"
#include "common/projected_selective_scan.cuh"

namespace lrnn::cuda::linear_sm90 {
namespace {

constexpr int kParts = 8;  // of K

/// Sizes of a block of the product, and what it finishes.
template <int kWeightBuffers, int kInputBuffers>
struct InputsTile : Tile<64, 1, 1, kWeightBuffers, kInputBuffers> {
  using Base = Tile<64, 1, 1, kWeightBuffers, kInputBuffers>;
  static constexpr int kComputers = Base::kThreads - 32;     // threads
  static constexpr int kOwn = Base::kRowTiles / kParts;      // tiles that the block finishes
  static constexpr int kOwnRows = 8 * kOwn;                  // of a warpgroup
  static constexpr int kSentBytes = kOwn * kComputers * 16;  // from one block to another
  static_assert(Base::kRowTiles % kParts == 0);
  // Sums are received behind the buffers: no block waits until others have read theirs.
  static constexpr int kSharedBytes =
      1024 + Base::kBufferBytes + Base::kBarrierBytes + kParts * kSentBytes;
};

/// Where a block receives sums: at shared address `place` parts of K, of tiles, of threads.
template <class Z>
struct RowSums {
  std::uint32_t place, barrier;

  [[nodiscard]] __device__ __forceinline__ std::uint32_t at(int from, int tile) const {
    return place + 16U * threadIdx.x +
           static_cast<std::uint32_t>(from * Z::kSentBytes + tile * Z::kComputers * 16);
  }
  /// Hands tiles to the blocks that finish them. At any time the warps of a block send to different
  /// ones.
  __device__ __forceinline__ void send_all(const Work& w, const float (&c)[Z::kRowTiles][4]) const {
    const int warp = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / 32, 0);
#pragma unroll 1
    for (int turn = 1; turn <= kParts; ++turn) {
      const int owner = (w.part + warp + turn) % kParts;
      const std::uint32_t there = address_in(owner, barrier);
#pragma unroll
      for (int i = 0; i < Z::kRowTiles; ++i) {
        if (i / Z::kOwn != owner) continue;
        const std::uint32_t to = at(w.part, i % Z::kOwn);
        if (owner == w.part)
          store_shared(to, c[i]);
        else
          send(address_in(owner, to), c[i], there);
      }
    }
  }
  /// The tiles that this block finishes, when all are there, parts added in the order of K.
  __device__ __forceinline__ void add(float (&sum)[Z::kOwn][4]) const {
    barrier_wait(barrier, 0);
#pragma unroll
    for (int p = 0; p < kParts; ++p)
#pragma unroll
      for (int j = 0; j < Z::kOwn; ++j) {
        float part[4];
        load_shared(part, at(p, j));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] = p == 0 ? part[e] : sum[j][e] + part[e];
      }
  }
};

/// What a lane finishes: two neighbouring columns of two neighbouring rows in every tile.
template <class Z>
struct RowsPlace {
  bool upper;  // has the upper eight of the warp's columns
  int row;     // of the block, the first
  int column;  // of the product, the first

  __device__ __forceinline__ RowsPlace(const Work& w, int group) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / 32;
    upper = lane / 4 % 2 != 0;
    row = group_row<Z>(group) + w.part * Z::kOwnRows + lane % 4 * 2;
    column = w.column + group_column<Z>(group) + warp * 16 + (upper ? 8 : 0) + lane / 8 * 2;
  }
  /// Those of row e of a tile.
  [[nodiscard]] __device__ __forceinline__ float2 neighbours(const float (&sum)[4], int e) const {
    const float low = sum[e];
    const float high = sum[2 + e];
    const float other = __shfl_xor_sync(0xFFFFFFFFU, upper ? low : high, 4);
    return upper ? float2{other, high} : float2{low, other};
  }
};

template <class Z>
struct InputsShared : Shared<Z> {
  __device__ __forceinline__ explicit InputsShared(const void* p) : Shared<Z>(p) {}
  [[nodiscard]] __device__ __forceinline__ RowSums<Z> sums() const {
    return {this->received() + 16U, this->received()};
  }
};

/// What a thread has of the rows that its block finishes.
template <class Z>
__device__ __forceinline__ void store_inputs(const Args& a, const Work& w, bf16* x,
                                             const float (&sum)[Z::kOwn][4]) {
  static_assert(Z::kOwn == 1);
  const RowsPlace<Z> place(w, 0);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float2 v = place.neighbours(sum[0], e);
    const float pair[2] = {v.x, v.y};
    const int row = place.row + e;
    if (row < w.rows && place.column < a.columns)
      store_packed(x + std::int64_t{w.row + row} * a.columns + place.column, pair);
  }
}

template <class Z>
__global__ __launch_bounds__(Z::kThreads) void inputs_product_kernel(
    Args a, bf16* x, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) unsigned char inputs_buffers[];
  if (!a.behind_wait) let_next_kernel_start();
  const InputsShared<Z> mem(inputs_buffers);
  const Work w(a, kParts, Z{});
  const Copies<Z, Columns<Z, kParts, false>> copies{a, maps, mem, w};
  const bool copies_panels = threadIdx.x == Z::kComputers;
  if (copies_panels) mem.init_barriers((kParts - 1) * Z::kSentBytes);
  __syncthreads();
  cluster_arrive();
  if (threadIdx.x >= Z::kComputers) {
    if (copies_panels) copies.begin();
    cluster_wait();
    wait_for_previous_kernel();
    if (copies_panels) copies.run();
    return;
  }
  cluster_wait();  // until the barriers of the others are there
  wait_for_previous_kernel();
  if (threadIdx.x == 0) copies.begin_inputs();
  __syncwarp();
  float c[Z::kRowTiles][4] = {};
  multiply_panels<Z, 0>(mem, w, 0, c);
  mem.sums().send_all(w, c);
  float sum[Z::kOwn][4];
  mem.sums().add(sum);
  store_inputs<Z>(a, w, x, sum);
}

/// Buffers for all panels of 4096 channels: no block of the scan, whose states come in the way,
/// finds room beside. Of few panels the product is over so soon that room counts more.
using LongRows = InputsTile<8, 8>;
using ShortRows = InputsTile<3, 3>;

template <class Z>
void launch_product(cudaStream_t stream, const Args& args, bf16* x, const Maps& maps) {
  const auto kernel = inputs_product_kernel<Z>;
  allow_shared(kernel, Z::kSharedBytes);
  launch_clusters(
      kernel, kParts,
      static_cast<unsigned>(kParts * args.row_tiles * ceil_div(args.columns, Z::kColumns)),
      Z::kThreads, Z::kSharedBytes, stream, args, x, maps);
}

}  // namespace

void project_inputs(Context& ctx, const ProjectedSelectiveScanStep& f, MutableTensorView x,
                    bool early) {
  const Product product{
      .x = f.in.u, .weight = f.projection, .stable_weight = true, .behind_wait = !early};
  const Args args = product_args(product, ceil_div(f.in.u.dim(0), LongRows::kRows), kParts);
  const Maps maps = product_maps(product, args, LongRows::kColumns);
  const cudaStream_t stream = ctx.stream().handle;
  if (args.per_part <= 4) return launch_product<ShortRows>(stream, args, x.data<bf16>(), maps);
  launch_product<LongRows>(stream, args, x.data<bf16>(), maps);
}

}  // namespace lrnn::cuda::linear_sm90
