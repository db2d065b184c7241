// Forward attention: the choice of a kernel, and the tensor core kernel of sm_80 and later.
#include <type_traits>

#include "common/attention_mma.cuh"
#include "common/attention_sm90.cuh"

namespace lrnn::cuda {
namespace attention {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

/// Compile-time sizes: padded head dimension, queries and keys of a tile.
template <int kDim_, int kRows_, int kCols_>
struct Tile {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kRowTiles = kRows / (16 * kWarps);  // of 16 queries, per warp
  static constexpr int kColTiles = kCols / 8;
  static constexpr int kDimTiles = kDim / 8;
  static constexpr std::size_t kShared = sizeof(bf16) * (kRows + 2 * kCols) * kPitch<kDim>;
};

// One step of the online softmax: c holds scores and becomes P; the running maximum (in units of
// log2), the lane's part of the running sum and the output so far are brought up to date.
template <class Z>
__device__ __forceinline__ void softmax_step(float (&c)[Z::kRowTiles][Z::kColTiles][4],
                                             float (&max)[Z::kRowTiles][2],
                                             float (&sum)[Z::kRowTiles][2],
                                             float (&out)[Z::kRowTiles][Z::kDimTiles][4],
                                             float log2_scale) {
#pragma unroll
  for (int m = 0; m < Z::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < Z::kColTiles; ++n)
        top = fmaxf(top, fmaxf(c[m][n][2 * half], c[m][n][2 * half + 1]));
      // Finite from the first tile on, since every query sees key 0.
      top = fmaxf(max[m][half], quad_max(top) * log2_scale);
      const float shrink = exp2_approx(max[m][half] - top);
      max[m][half] = top;
      float part = 0.0F;
#pragma unroll
      for (int n = 0; n < Z::kColTiles; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          c[m][n][e] = exp2_approx(fmaf(c[m][n][e], log2_scale, -top));
          part += c[m][n][e];
        }
      sum[m][half] = fmaf(sum[m][half], shrink, part);
#pragma unroll
      for (int n = 0; n < Z::kDimTiles; ++n) {
        out[m][n][2 * half] *= shrink;
        out[m][n][2 * half + 1] *= shrink;
      }
    }
}

// A block owns kRows queries of one head, a warp 16 kRowTiles of them, and walks the key tiles. The
// next values load under the scores of this tile, the next keys under its second product. Bound by
// the tensor cores at large d, by exp2 at d = 64.
template <class Z>
__global__ __launch_bounds__(kThreads) void attention_forward_kernel(ForwardArgs<bf16> a) {
  extern __shared__ __align__(16) bf16 shared[];
  bf16* const Q = shared;
  bf16* const K = Q + Z::kRows * kPitch<Z::kDim>;
  bf16* const V = K + Z::kCols * kPitch<Z::kDim>;
  const int tiles = (a.z.seqlen + Z::kRows - 1) / Z::kRows;
  const Item item(static_cast<int>(blockIdx.x), a.z.heads, a.z.batch, tiles, true);
  const Sequence seq(a.z, item.b);
  const int first = item.tile * Z::kRows;
  const int dim = a.z.head_dim;
  const bool vectors = a.z.vectors;
  const auto q = head_of(a.q, item.b, a.z.seqlen, item.head, dim);
  const auto k = head_of(a.k, item.b, a.z.slots, item.head / a.z.group(), dim);
  const auto v = head_of(a.v, item.b, a.z.slots, item.head / a.z.group(), dim);
  const float log2_scale = a.z.scale * kLog2e;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16 * Z::kRowTiles;
  const int row0 = first + warp_row + lane / 4;  // of this lane's first row

  float out[Z::kRowTiles][Z::kDimTiles][4];
  float max[Z::kRowTiles][2];
  float sum[Z::kRowTiles][2];
  clear(out);
#pragma unroll
  for (int m = 0; m < Z::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[m][half] = -INFINITY;
      sum[m][half] = 0.0F;
    }
  const int last = first < seq.length ? seq.visible(min(first + Z::kRows, seq.length) - 1) : 0;
  const int unmasked = seq.visible(first);  // keys below this are seen by every query of the tile
  if (last > 0) {
    load_tile<Z::kRows, Z::kDim, kThreads>(Q, q, first, seq.length, dim, vectors);
    load_tile<Z::kCols, Z::kDim, kThreads>(K, k, 0, seq.keys, dim, vectors);
    copy_async_commit();
  }
  for (int j = 0; j < last; j += Z::kCols) {
    copy_async_wait<0>();
    __syncthreads();  // Q and K are here, V has been read
    load_tile<Z::kCols, Z::kDim, kThreads>(V, v, j, seq.keys, dim, vectors);
    copy_async_commit();
    float c[Z::kRowTiles][Z::kColTiles][4];
    clear(c);
    product_transposed<Z::kRowTiles, Z::kColTiles, Z::kDim, kPitch<Z::kDim>>(
        c, Q + warp_row * kPitch<Z::kDim>, K, lane);
    if (j + Z::kCols > unmasked) {
#pragma unroll
      for (int m = 0; m < Z::kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int visible = seq.visible(row0 + m * 16 + half * 8) - j - lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < Z::kColTiles; ++n) {
            if (n * 8 >= visible) c[m][n][2 * half] = -INFINITY;
            if (n * 8 + 1 >= visible) c[m][n][2 * half + 1] = -INFINITY;
          }
        }
    }
    softmax_step<Z>(c, max, sum, out, log2_scale);
    copy_async_wait<0>();
    __syncthreads();  // V is here, K has been read
    if (j + Z::kCols < last)
      load_tile<Z::kCols, Z::kDim, kThreads>(K, k, j + Z::kCols, seq.keys, dim, vectors);
    copy_async_commit();
    product_registers<Z::kRowTiles, Z::kColTiles, Z::kDimTiles, kPitch<Z::kDim>>(out, c, V, lane);
  }
  const std::int64_t stats =
      (static_cast<std::int64_t>(item.b) * a.z.heads + item.head) * a.z.seqlen;
  float inverse[Z::kRowTiles][2];
#pragma unroll
  for (int m = 0; m < Z::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(sum[m][half]);
      inverse[m][half] = 1.0F / total;
      const int row = row0 + m * 16 + half * 8;
      if (a.lse != nullptr && lane % 4 == 0 && row < a.z.seqlen)
        a.lse[stats + row] = row < seq.length ? (max[m][half] + log2f(total)) * kLn2 : 0.0F;
    }
  store_tiles(head_of(a.o, item.b, a.z.seqlen, item.head, dim), first + warp_row, seq.length,
              a.z.seqlen, 0, dim, vectors, out, inverse, lane);
}

template <class Z>
void launch_mma(Context& ctx, const ForwardArgs<bf16>& a) {
  const std::int64_t blocks = std::int64_t{a.z.batch} * a.z.heads * tiles_of(a.z.seqlen, Z::kRows);
  launch(ctx, attention_forward_kernel<Z>, blocks, kThreads, Z::kShared, a);
}

void forward_mma(Context& ctx, const ForwardArgs<bf16>& a) {
  if (a.z.head_dim <= 32) return launch_mma<Tile<32, 128, 64>>(ctx, a);
  if (a.z.head_dim <= 64) return launch_mma<Tile<64, 128, 64>>(ctx, a);
  if (a.z.head_dim <= 96) return launch_mma<Tile<96, 128, 64>>(ctx, a);
  if (a.z.head_dim <= 128) return launch_mma<Tile<128, 128, 64>>(ctx, a);
  launch_mma<Tile<256, 64, 32>>(ctx, a);
}

}  // namespace
}  // namespace attention

void attention_forward(Context& ctx, const AttentionForward& a) {
  using namespace attention;
  visit_float("attention_forward", a.in.q.dtype(), [&]<class T>() {
    const ForwardArgs<T> args{
        .z = sizes_of<T>("attention_forward", a.in, {a.in.q, a.in.k, a.in.v, a.o}),
        .q = rows_of<T>(a.in.q),
        .k = rows_of<T>(a.in.k),
        .v = rows_of<T>(a.in.v),
        .o = rows_of<T>(a.o),
        .lse = a.lse ? a.lse.data<float>() : nullptr};
    if (a.in.positions && args.z.seqlen == 1) return forward_decode(ctx, args);
    if constexpr (std::is_same_v<T, bf16>) {
#ifdef LRNN_WITH_SM90A
      if (fits_sm90(args.z)) return forward_sm90(ctx, args);
#endif
      if (has_mma()) return forward_mma(ctx, args);
    }
    forward_fma(ctx, args);
  });
}

}  // namespace lrnn::cuda
