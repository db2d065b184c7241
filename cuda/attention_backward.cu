// Backward attention: Delta, the choice of kernels, and the tensor core kernels of sm_80 and later.
//
// Two passes recompute the probabilities: one block sums dK and dV of a tile of keys over the
// queries that see it, another dQ of a tile of queries over its keys. Seven products instead of the
// five of a pass that adds dQ atomically, but every sum has one fixed order. Probabilities and
// their gradients stay in registers: the C tile of one product, rounded, is the A tile of the next.
#include <type_traits>

#include "common/attention_mma.cuh"
#include "common/attention_sm90.cuh"
#include "common/reduce.cuh"

namespace lrnn::cuda {
namespace attention {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;  // owned by a block: 16 per warp
constexpr int kDeltaThreads = 256;

/// Compile-time sizes: padded head dimension, rows of the other side that are in work at a time.
template <int kDim_, int kCols_>
struct Tile {
  static constexpr int kDim = kDim_;
  static constexpr int kCols = kCols_;
  static constexpr int kPitch = attention::kPitch<kDim>;
  static constexpr int kColTiles = kCols / 8;
  static constexpr int kDimTiles = kDim / 8;
  static constexpr int kSteps = kDim / 16;
  // Small heads leave registers for the fragments of the owned rows.
  static constexpr bool kKeep = kDim <= 64;
  static constexpr int kBlocks = kDim <= 64 ? 3 : 2;
  static constexpr std::size_t kShared =
      sizeof(bf16) * (2 * kRows + 4 * kCols) * kPitch + sizeof(float) * 4 * kCols;
};

/// Rows of one warp as the left operand of products.
template <class Z>
struct Owned {
  const bf16* rows;
  std::uint32_t fragments[Z::kKeep ? Z::kSteps : 1][4];

  __device__ __forceinline__ void load(int lane) {
    if constexpr (Z::kKeep) {
#pragma unroll
      for (int k = 0; k < Z::kSteps; ++k) fragment(k, lane, fragments[k]);
    }
  }
  __device__ __forceinline__ void fragment(int k, int lane, std::uint32_t (&a)[4]) const {
    load_matrices(a, rows + (lane % 16) * Z::kPitch + lane / 16 * 8 + 16 * k);
  }
  /// c = rows b^T.
  __device__ __forceinline__ void multiply(float (&c)[1][Z::kColTiles][4], const bf16* b,
                                           int lane) const {
    clear(c);
    const bf16* const b_row = b + (lane % 8 + lane / 16 * 8) * Z::kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < Z::kSteps; ++k) {
      std::uint32_t left[4];
      if constexpr (Z::kKeep) {
#pragma unroll
        for (int e = 0; e < 4; ++e) left[e] = fragments[k][e];
      } else {
        fragment(k, lane, left);
      }
#pragma unroll
      for (int n = 0; n < Z::kColTiles; n += 2) {
        std::uint32_t right[4];
        load_matrices(right, b_row + n * 8 * Z::kPitch + 16 * k);
        multiply_add(c[0][n], left, right[0], right[1]);
        multiply_add(c[0][n + 1], left, right[2], right[3]);
      }
    }
  }
};

/// Two buffers of two tiles that are loaded while others are in work.
template <class Z>
struct Stages {
  bf16* first;

  __device__ __forceinline__ bf16* tile(int buffer, int which) const {
    return first + (2 * buffer + which) * Z::kCols * Z::kPitch;
  }
};

// A block owns kRows keys of one key/value head and walks the query tiles of the heads of its group
// in order: S^T = K Q^T, P^T, dV += P^T dO, dP^T = V dO^T, dS^T, dK += dS^T Q.
template <class Z>
__global__ __launch_bounds__(kThreads,
                             Z::kBlocks) void attention_dkdv_kernel(BackwardArgs<bf16> a) {
  extern __shared__ __align__(16) bf16 shared[];
  bf16* const K = shared;
  bf16* const V = K + kRows * Z::kPitch;
  const Stages<Z> stages{V + kRows * Z::kPitch};
  float* const statistics = reinterpret_cast<float*>(stages.tile(2, 0));  // [2, 2, kCols]
  const int tiles = (a.z.slots + kRows - 1) / kRows;
  const Item item(static_cast<int>(blockIdx.x), a.z.heads_kv, a.z.batch, tiles, false);
  const Sequence seq(a.z, item.b);
  const int first = item.tile * kRows;
  const int dim = a.z.head_dim;
  const bool vectors = a.z.vectors;
  const auto k = head_of(a.k, item.b, a.z.slots, item.head, dim);
  const auto v = head_of(a.v, item.b, a.z.slots, item.head, dim);
  const float log2_scale = a.z.scale * kLog2e;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int row0 = first + warp_row + lane / 4;

  const int begin = seq.causal ? max(0, first - seq.offset) / Z::kCols * Z::kCols : 0;
  const int end = first < seq.keys ? seq.length : 0;
  const int per_head = end > begin ? (end - begin + Z::kCols - 1) / Z::kCols : 0;
  const int count = per_head * a.z.group();

  const auto load_stage = [&](int it) {
    const int buffer = it % 2;
    const int head = item.head * a.z.group() + it / per_head;
    const int i = begin + it % per_head * Z::kCols;
    load_tile<Z::kCols, Z::kDim, kThreads>(stages.tile(buffer, 0),
                                           head_of(a.q, item.b, a.z.seqlen, head, dim), i,
                                           seq.length, dim, vectors);
    load_tile<Z::kCols, Z::kDim, kThreads>(stages.tile(buffer, 1),
                                           head_of(a.d_o, item.b, a.z.seqlen, head, dim), i,
                                           seq.length, dim, vectors);
    const std::int64_t row =
        (static_cast<std::int64_t>(item.b) * a.z.heads + head) * a.z.seqlen + i;
    for (int c = static_cast<int>(threadIdx.x); c < Z::kCols; c += kThreads) {
      const bool valid = i + c < seq.length;
      statistics[2 * buffer * Z::kCols + c] = valid ? a.lse[row + c] * kLog2e : 0.0F;
      statistics[(2 * buffer + 1) * Z::kCols + c] = valid ? a.delta[row + c] : 0.0F;
    }
  };

  float dk[1][Z::kDimTiles][4];
  float dv[1][Z::kDimTiles][4];
  clear(dk);
  clear(dv);
  Owned<Z> keys{K + warp_row * Z::kPitch, {}};
  Owned<Z> values{V + warp_row * Z::kPitch, {}};
  if (count > 0) {
    load_tile<kRows, Z::kDim, kThreads>(K, k, first, seq.keys, dim, vectors);
    load_tile<kRows, Z::kDim, kThreads>(V, v, first, seq.keys, dim, vectors);
    load_stage(0);
    copy_async_commit();
  }
  for (int it = 0; it < count; ++it) {
    copy_async_wait<0>();
    __syncthreads();  // this stage is here, the other has been read
    if (it == 0) {
      keys.load(lane);
      values.load(lane);
    }
    if (it + 1 < count) load_stage(it + 1);
    copy_async_commit();
    const bf16* const Q = stages.tile(it % 2, 0);
    const bf16* const dO = stages.tile(it % 2, 1);
    const float* const lse = statistics + it % 2 * 2 * Z::kCols + lane % 4 * 2;
    const float* const delta = lse + Z::kCols;
    const int i = begin + it % per_head * Z::kCols;
    float p[1][Z::kColTiles][4];
    keys.multiply(p, Q, lane);
    const bool all_seen = i + Z::kCols <= seq.length && first + kRows <= seq.visible(i);
#pragma unroll
    for (int n = 0; n < Z::kColTiles; ++n) {
      const float2 l = *reinterpret_cast<const float2*>(lse + n * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[0][n][e] = exp2_approx(fmaf(p[0][n][e], log2_scale, e % 2 == 0 ? -l.x : -l.y));
        if (!all_seen) {
          const int query = i + n * 8 + lane % 4 * 2 + e % 2;
          const int key = row0 + e / 2 * 8;
          if (query >= seq.length || key >= seq.visible(query)) p[0][n][e] = 0.0F;
        }
      }
    }
    product_registers<1, Z::kColTiles, Z::kDimTiles, Z::kPitch>(dv, p, dO, lane);
    float dp[1][Z::kColTiles][4];
    values.multiply(dp, dO, lane);
#pragma unroll
    for (int n = 0; n < Z::kColTiles; ++n) {
      const float2 d = *reinterpret_cast<const float2*>(delta + n * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) p[0][n][e] *= dp[0][n][e] - (e % 2 == 0 ? d.x : d.y);
    }
    product_registers<1, Z::kColTiles, Z::kDimTiles, Z::kPitch>(dk, p, Q, lane);
  }
  const float scale[1][2] = {{a.z.scale, a.z.scale}};
  const float one[1][2] = {{1.0F, 1.0F}};
  store_tiles(head_of(a.dk, item.b, a.z.slots, item.head, dim), first + warp_row, seq.keys,
              a.z.slots, 0, dim, vectors, dk, scale, lane);
  store_tiles(head_of(a.dv, item.b, a.z.slots, item.head, dim), first + warp_row, seq.keys,
              a.z.slots, 0, dim, vectors, dv, one, lane);
}

// A block owns kRows queries of one head and walks the key tiles it sees: S = Q K^T, P,
// dP = dO V^T, dS, dQ += dS K.
template <class Z>
__global__ __launch_bounds__(kThreads, Z::kBlocks) void attention_dq_kernel(BackwardArgs<bf16> a) {
  extern __shared__ __align__(16) bf16 shared[];
  bf16* const Q = shared;
  bf16* const dO = Q + kRows * Z::kPitch;
  const Stages<Z> stages{dO + kRows * Z::kPitch};
  const int tiles = (a.z.seqlen + kRows - 1) / kRows;
  const Item item(static_cast<int>(blockIdx.x), a.z.heads, a.z.batch, tiles, true);
  const Sequence seq(a.z, item.b);
  const int first = item.tile * kRows;
  const int dim = a.z.head_dim;
  const bool vectors = a.z.vectors;
  const auto k = head_of(a.k, item.b, a.z.slots, item.head / a.z.group(), dim);
  const auto v = head_of(a.v, item.b, a.z.slots, item.head / a.z.group(), dim);
  const std::int64_t stats =
      (static_cast<std::int64_t>(item.b) * a.z.heads + item.head) * a.z.seqlen;
  const float log2_scale = a.z.scale * kLog2e;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int row0 = first + warp_row + lane / 4;

  float lse[2];
  float delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + 8 * half;
    const bool valid = row < seq.length;
    lse[half] = valid ? a.lse[stats + row] * kLog2e : 0.0F;
    delta[half] = valid ? a.delta[stats + row] : 0.0F;
  }
  const auto load_stage = [&](int j, int buffer) {
    load_tile<Z::kCols, Z::kDim, kThreads>(stages.tile(buffer, 0), k, j, seq.keys, dim, vectors);
    load_tile<Z::kCols, Z::kDim, kThreads>(stages.tile(buffer, 1), v, j, seq.keys, dim, vectors);
  };
  float dq[1][Z::kDimTiles][4];
  clear(dq);
  Owned<Z> queries{Q + warp_row * Z::kPitch, {}};
  Owned<Z> gradients{dO + warp_row * Z::kPitch, {}};
  const int last = first < seq.length ? seq.visible(min(first + kRows, seq.length) - 1) : 0;
  const int unmasked = seq.visible(first);  // keys below this are seen by every query of the tile
  if (last > 0) {
    load_tile<kRows, Z::kDim, kThreads>(Q, head_of(a.q, item.b, a.z.seqlen, item.head, dim), first,
                                        seq.length, dim, vectors);
    load_tile<kRows, Z::kDim, kThreads>(dO, head_of(a.d_o, item.b, a.z.seqlen, item.head, dim),
                                        first, seq.length, dim, vectors);
    load_stage(0, 0);
    copy_async_commit();
  }
  for (int j = 0, buffer = 0; j < last; j += Z::kCols, buffer ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this stage is here, the other has been read
    if (j == 0) {
      queries.load(lane);
      gradients.load(lane);
    }
    if (j + Z::kCols < last) load_stage(j + Z::kCols, buffer ^ 1);
    copy_async_commit();
    const bf16* const K = stages.tile(buffer, 0);
    const bf16* const V = stages.tile(buffer, 1);
    float p[1][Z::kColTiles][4];
    queries.multiply(p, K, lane);
#pragma unroll
    for (int n = 0; n < Z::kColTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[0][n][e] = exp2_approx(fmaf(p[0][n][e], log2_scale, -lse[e / 2]));
        if (j + Z::kCols > unmasked) {
          const int key = j + n * 8 + lane % 4 * 2 + e % 2;
          if (key >= seq.visible(row0 + e / 2 * 8)) p[0][n][e] = 0.0F;
        }
      }
    float dp[1][Z::kColTiles][4];
    gradients.multiply(dp, V, lane);
#pragma unroll
    for (int n = 0; n < Z::kColTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[0][n][e] *= dp[0][n][e] - delta[e / 2];
    product_registers<1, Z::kColTiles, Z::kDimTiles, Z::kPitch>(dq, p, K, lane);
  }
  const float scale[1][2] = {{a.z.scale, a.z.scale}};
  store_tiles(head_of(a.dq, item.b, a.z.seqlen, item.head, dim), first + warp_row, seq.length,
              a.z.seqlen, 0, dim, vectors, dq, scale, lane);
}

template <class Z>
void launch_mma(Context& ctx, const BackwardArgs<bf16>& a) {
  const std::int64_t batch = a.z.batch;
  launch(ctx, attention_dkdv_kernel<Z>, batch * a.z.heads_kv * tiles_of(a.z.slots, kRows), kThreads,
         Z::kShared, a);
  launch(ctx, attention_dq_kernel<Z>, batch * a.z.heads * tiles_of(a.z.seqlen, kRows), kThreads,
         Z::kShared, a);
}

void backward_mma(Context& ctx, const BackwardArgs<bf16>& a) {
  if (a.z.head_dim <= 32) return launch_mma<Tile<32, 64>>(ctx, a);
  if (a.z.head_dim <= 64) return launch_mma<Tile<64, 64>>(ctx, a);
  if (a.z.head_dim <= 96) return launch_mma<Tile<96, 64>>(ctx, a);
  if (a.z.head_dim <= 128) return launch_mma<Tile<128, 64>>(ctx, a);
  backward_fma(ctx, a);  // dK and dV of wider heads do not fit in registers
}

// A warp owns one head of one position. Bound by HBM.
template <class T>
struct DeltaArgs {
  DeviceRows<const T> o, d_o;
  const std::int32_t* lengths;
  float* delta;  // [B, Hq, L]
  std::int64_t items;
  int heads, seqlen, dim;
};
template <class T>
__global__ __launch_bounds__(kDeltaThreads) void attention_delta_kernel(DeltaArgs<T> a) {
  const std::int64_t item =
      (static_cast<std::int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x) / 32;
  if (item >= a.items) return;
  const std::int64_t row = item / a.heads;
  const int head = static_cast<int>(item % a.heads);
  const std::int64_t b = row / a.seqlen;
  const int t = static_cast<int>(row % a.seqlen);
  const std::int64_t first = std::int64_t{head} * a.dim;
  const T* const o = a.o.row(row) + first;
  const T* const d_o = a.d_o.row(row) + first;
  float sum = 0.0F;
  if (a.lengths == nullptr || t < a.lengths[b])
    for (int c = static_cast<int>(threadIdx.x) % 32; c < a.dim; c += 32)
      sum = fmaf(to_float(o[c]), to_float(d_o[c]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) a.delta[(b * a.heads + head) * a.seqlen + t] = sum;
}

template <class T>
void launch_delta(Context& ctx, const BackwardArgs<T>& a, float* delta) {
  const std::int64_t items = std::int64_t{a.z.batch} * a.z.seqlen * a.z.heads;
  const DeltaArgs<T> args{a.o,   a.d_o,     a.z.lengths, delta,
                          items, a.z.heads, a.z.seqlen,  a.z.head_dim};
  constexpr int kPerBlock = kDeltaThreads / 32;
  attention_delta_kernel<T><<<static_cast<unsigned>((items + kPerBlock - 1) / kPerBlock),
                              kDeltaThreads, 0, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace
}  // namespace attention

void attention_backward(Context& ctx, const AttentionBackward& a) {
  using namespace attention;
  visit_float("attention_backward", a.in.q.dtype(), [&]<class T>() {
    BackwardArgs<T> args{.z = sizes_of<T>("attention_backward", a.in,
                                          {a.in.q, a.in.k, a.in.v, a.o, a.d_o, a.dq, a.dk, a.dv}),
                         .q = rows_of<T>(a.in.q),
                         .k = rows_of<T>(a.in.k),
                         .v = rows_of<T>(a.in.v),
                         .o = rows_of<T>(a.o),
                         .d_o = rows_of<T>(a.d_o),
                         .lse = a.lse.data<float>(),
                         .delta = nullptr,
                         .dq = rows_of<T>(a.dq),
                         .dk = rows_of<T>(a.dk),
                         .dv = rows_of<T>(a.dv)};
#ifdef LRNN_WITH_SM90A
    if constexpr (std::is_same_v<T, bf16>) {
      if (fits_sm90(args.z)) return backward_sm90(ctx, args);
    }
#endif
    Tensor delta = ctx.empty(a.lse.shape(), DType::float32);
    args.delta = delta.view().template data<float>();
    launch_delta<T>(ctx, args, delta.view().template data<float>());
    if constexpr (std::is_same_v<T, bf16>) {
      if (has_mma()) return backward_mma(ctx, args);
    }
    backward_fma(ctx, args);
  });
}

}  // namespace lrnn::cuda
