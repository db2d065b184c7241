// Attention in float32 arithmetic: float32 operands on every device, bfloat16 ones before sm_80.
//
// A block owns a tile of rows (queries, or keys in the pass for dK and dV), whose operands stay in
// shared memory as float32, and walks the tiles of the other side in order. Its 256 threads form a
// 16 x 16 grid; a thread owns a register tile of scores, and of the result the same rows by groups
// of neighbouring columns. Bound by FMA; shared memory is read in 16-byte accesses. Tile sizes keep
// a block below 64 KB of shared memory, the limit of sm_75.
#include "common/attention.cuh"

namespace lrnn::cuda::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 16;
constexpr float kLog2e = 1.44269504088896340736F;
constexpr float kLn2 = 0.69314718055994530942F;

/// Compile-time sizes of a kernel: owned rows, streamed columns, padded head dimension.
template <int kDim_, int kRows_, int kCols_>
struct Tile {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kPitch = kDim + 4;        // rows of operands; lanes hit different banks
  static constexpr int kScorePitch = kCols + 4;  // rows of scores
  static constexpr int kRowsPerThread = kRows / kSide;
  static constexpr int kColsPerThread = kCols / kSide;
  static constexpr int kWidth = kDim / kSide < 4 ? kDim / kSide : 4;  // neighbouring result columns
  static constexpr int kGroups = kDim / (kSide * kWidth);
  using Scores = float[kRowsPerThread][kColsPerThread];
  using Result = float[kRowsPerThread][kGroups][kWidth];
};

__device__ int thread_col() {
  return static_cast<int>(threadIdx.x) % kSide;
}
__device__ int thread_row() {
  return static_cast<int>(threadIdx.x) / kSide;
}

// Rows [first, first + kRows) as float32, zero from row `limit` and column `dim` on.
template <int kRows, int kDim, class T>
__device__ void load_tile(float* tile, const DeviceRows<const T>& rows, int first, int limit,
                          int dim, bool vectors) {
  constexpr int kVec = kWide<T>;
  constexpr int kChunks = kDim / kVec;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks;
    const int c = i % kChunks * kVec;
    float v[kVec] = {};
    if (first + r < limit && c < dim) {
      const T* const from = rows.row(first + r) + c;
      if (vectors) {
        load_vec<T, kVec>(from, v);
      } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e)
          if (c + e < dim) v[e] = to_float(from[e]);
      }
    }
    float* const to = tile + r * (kDim + 4) + c;
#pragma unroll
    for (int e = 0; e < kVec; e += 4)
      *reinterpret_cast<float4*>(to + e) = {v[e], v[e + 1], v[e + 2], v[e + 3]};
  }
}

// s = a b^T; a [kRows, kDim], b [kCols, kDim].
template <class Z>
__device__ void product_transposed(typename Z::Scores& s, const float* a, const float* b) {
  const float* const a_row = a + thread_row() * Z::kRowsPerThread * Z::kPitch;
  const float* const b_row = b + thread_col() * Z::kPitch;
#pragma unroll
  for (int r = 0; r < Z::kRowsPerThread; ++r)
#pragma unroll
    for (int c = 0; c < Z::kColsPerThread; ++c) s[r][c] = 0.0F;
#pragma unroll 4
  for (int k = 0; k < Z::kDim; k += 4) {
    float4 left[Z::kRowsPerThread];
#pragma unroll
    for (int r = 0; r < Z::kRowsPerThread; ++r)
      left[r] = *reinterpret_cast<const float4*>(a_row + r * Z::kPitch + k);
#pragma unroll
    for (int c = 0; c < Z::kColsPerThread; ++c) {
      const float4 right = *reinterpret_cast<const float4*>(b_row + c * kSide * Z::kPitch + k);
#pragma unroll
      for (int r = 0; r < Z::kRowsPerThread; ++r) {
        s[r][c] = fmaf(left[r].x, right.x, s[r][c]);
        s[r][c] = fmaf(left[r].y, right.y, s[r][c]);
        s[r][c] = fmaf(left[r].z, right.z, s[r][c]);
        s[r][c] = fmaf(left[r].w, right.w, s[r][c]);
      }
    }
  }
}

// o += p b; p [kRows, kCols] scores, b [kCols, kDim].
template <class Z>
__device__ void product(typename Z::Result& o, const float* p, const float* b) {
  const float* const p_row = p + thread_row() * Z::kRowsPerThread * Z::kScorePitch;
  const float* const b_row = b + thread_col() * Z::kWidth;
#pragma unroll 2
  for (int k = 0; k < Z::kCols; k += 4) {
    float left[Z::kRowsPerThread][4];
#pragma unroll
    for (int r = 0; r < Z::kRowsPerThread; ++r) {
      const float4 v = *reinterpret_cast<const float4*>(p_row + r * Z::kScorePitch + k);
      left[r][0] = v.x;
      left[r][1] = v.y;
      left[r][2] = v.z;
      left[r][3] = v.w;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int g = 0; g < Z::kGroups; ++g) {
        float right[Z::kWidth];
        load_vec<float, Z::kWidth>(b_row + (k + e) * Z::kPitch + g * kSide * Z::kWidth, right);
#pragma unroll
        for (int r = 0; r < Z::kRowsPerThread; ++r)
#pragma unroll
          for (int w = 0; w < Z::kWidth; ++w) o[r][g][w] = fmaf(left[r][e], right[w], o[r][g][w]);
      }
  }
}

template <class Z>
__device__ void store_scores(float* p, const typename Z::Scores& s) {
#pragma unroll
  for (int r = 0; r < Z::kRowsPerThread; ++r)
#pragma unroll
    for (int c = 0; c < Z::kColsPerThread; ++c)
      p[(thread_row() * Z::kRowsPerThread + r) * Z::kScorePitch + thread_col() + c * kSide] =
          s[r][c];
}

template <class Z>
__device__ void clear(typename Z::Result& o) {
#pragma unroll
  for (int r = 0; r < Z::kRowsPerThread; ++r)
#pragma unroll
    for (int g = 0; g < Z::kGroups; ++g)
#pragma unroll
      for (int w = 0; w < Z::kWidth; ++w) o[r][g][w] = 0.0F;
}

// rows[first + r] = o[r] scale[r]: up to row `limit`, zero from row `valid` on.
template <class Z, class T>
__device__ void store_result(const DeviceRows<T>& rows, int first, int valid, int limit, int dim,
                             bool vectors, const typename Z::Result& o,
                             const float (&scale)[Z::kRowsPerThread]) {
#pragma unroll
  for (int r = 0; r < Z::kRowsPerThread; ++r) {
    const int row = first + thread_row() * Z::kRowsPerThread + r;
    if (row >= limit) continue;
#pragma unroll
    for (int g = 0; g < Z::kGroups; ++g) {
      const int c = (thread_col() + g * kSide) * Z::kWidth;
      float v[Z::kWidth];
#pragma unroll
      for (int w = 0; w < Z::kWidth; ++w) v[w] = row < valid ? o[r][g][w] * scale[r] : 0.0F;
      T* const to = rows.row(row) + c;
      if (vectors) {
        if (c < dim) store_vec<T, Z::kWidth>(to, v);
      } else {
#pragma unroll
        for (int w = 0; w < Z::kWidth; ++w)
          if (c + w < dim) to[w] = from_float<T>(v[w]);
      }
    }
  }
}

template <class Z>
__device__ void fill(float (&v)[Z::kRowsPerThread], float value) {
#pragma unroll
  for (int r = 0; r < Z::kRowsPerThread; ++r) v[r] = value;
}

// A row of scores is spread over 16 neighbouring lanes.
__device__ float max_of_row(float v) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2)
    v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFU, v, offset));
  return v;
}
__device__ float sum_of_row(float v) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2)
    v += __shfl_xor_sync(0xFFFFFFFFU, v, offset);
  return v;
}

// Owned rows: queries. Columns: keys.
template <class T, class Z>
__global__ __launch_bounds__(kThreads, 2) void attention_forward_fma_kernel(ForwardArgs<T> a) {
  extern __shared__ __align__(16) float shared[];
  float* const Q = shared;
  float* const X = Q + Z::kRows * Z::kPitch;  // K, then V
  float* const S = X + Z::kCols * Z::kPitch;
  const int tiles = (a.z.seqlen + Z::kRows - 1) / Z::kRows;
  const Item item(static_cast<int>(blockIdx.x), a.z.heads, a.z.batch, tiles, true);
  const Sequence seq(a.z, item.b);
  const int first = item.tile * Z::kRows;
  const int dim = a.z.head_dim;
  const auto q = head_of(a.q, item.b, a.z.seqlen, item.head, dim);
  const auto k = head_of(a.k, item.b, a.z.slots, item.head / a.z.group(), dim);
  const auto v = head_of(a.v, item.b, a.z.slots, item.head / a.z.group(), dim);
  const auto o = head_of(a.o, item.b, a.z.seqlen, item.head, dim);
  const float log2_scale = a.z.scale * kLog2e;
  const int row0 = first + thread_row() * Z::kRowsPerThread;

  typename Z::Result out;
  float max[Z::kRowsPerThread];
  float sum[Z::kRowsPerThread];
  clear<Z>(out);
  fill<Z>(max, -INFINITY);
  fill<Z>(sum, 0.0F);
  const int last = first < seq.length ? seq.visible(min(first + Z::kRows, seq.length) - 1) : 0;
  load_tile<Z::kRows, Z::kDim, T>(Q, q, first, seq.length, dim, a.z.vectors);
  for (int j = 0; j < last; j += Z::kCols) {
    __syncthreads();  // the previous product has read X and S
    load_tile<Z::kCols, Z::kDim, T>(X, k, j, seq.keys, dim, a.z.vectors);
    __syncthreads();
    typename Z::Scores s;
    product_transposed<Z>(s, Q, X);
#pragma unroll
    for (int r = 0; r < Z::kRowsPerThread; ++r) {
      const int visible = seq.visible(row0 + r) - j - thread_col();
      float top = max[r];
#pragma unroll
      for (int c = 0; c < Z::kColsPerThread; ++c) {
        s[r][c] = c * kSide < visible ? s[r][c] * log2_scale : -INFINITY;
        top = fmaxf(top, s[r][c]);
      }
      top = max_of_row(top);  // finite: every query sees key 0
      const float shrink = exp2f(max[r] - top);
      max[r] = top;
      float part = 0.0F;
#pragma unroll
      for (int c = 0; c < Z::kColsPerThread; ++c) {
        s[r][c] = exp2f(s[r][c] - top);
        part += s[r][c];
      }
      sum[r] = fmaf(sum[r], shrink, part);
#pragma unroll
      for (int g = 0; g < Z::kGroups; ++g)
#pragma unroll
        for (int w = 0; w < Z::kWidth; ++w) out[r][g][w] *= shrink;
    }
    store_scores<Z>(S, s);
    __syncthreads();  // S is complete, K has been read
    load_tile<Z::kCols, Z::kDim, T>(X, v, j, seq.keys, dim, a.z.vectors);
    __syncthreads();
    product<Z>(out, S, X);
  }
  float inverse[Z::kRowsPerThread];
#pragma unroll
  for (int r = 0; r < Z::kRowsPerThread; ++r) {
    sum[r] = sum_of_row(sum[r]);
    inverse[r] = 1.0F / sum[r];
    const int row = row0 + r;
    if (a.lse != nullptr && thread_col() == 0 && row < a.z.seqlen)
      a.lse[(static_cast<std::int64_t>(item.b) * a.z.heads + item.head) * a.z.seqlen + row] =
          row < seq.length ? (max[r] + log2f(sum[r])) * kLn2 : 0.0F;
  }
  store_result<Z, T>(o, first, seq.length, a.z.seqlen, dim, a.z.vectors, out, inverse);
}

// Owned rows: keys of one key/value head. Columns: queries of the heads of its group, in order.
template <class T, class Z>
__global__ __launch_bounds__(kThreads, 2) void attention_dkdv_fma_kernel(BackwardArgs<T> a) {
  extern __shared__ __align__(16) float shared[];
  float* const K = shared;
  float* const V = K + Z::kRows * Z::kPitch;
  float* const X = V + Z::kRows * Z::kPitch;  // Q, then dO, then Q
  float* const S = X + Z::kCols * Z::kPitch;  // P^T, then dS^T
  float* const lse = S + Z::kRows * Z::kScorePitch;
  float* const delta = lse + Z::kCols;
  const int tiles = (a.z.slots + Z::kRows - 1) / Z::kRows;
  const Item item(static_cast<int>(blockIdx.x), a.z.heads_kv, a.z.batch, tiles, false);
  const Sequence seq(a.z, item.b);
  const int first = item.tile * Z::kRows;
  const int dim = a.z.head_dim;
  const auto k = head_of(a.k, item.b, a.z.slots, item.head, dim);
  const auto v = head_of(a.v, item.b, a.z.slots, item.head, dim);
  const float log2_scale = a.z.scale * kLog2e;
  const int row0 = first + thread_row() * Z::kRowsPerThread;

  typename Z::Result dk;
  typename Z::Result dv;
  clear<Z>(dk);
  clear<Z>(dv);
  const int begin = seq.causal ? max(0, first - seq.offset) / Z::kCols * Z::kCols : 0;
  const int end = first < seq.keys ? seq.length : 0;
  load_tile<Z::kRows, Z::kDim, T>(K, k, first, seq.keys, dim, a.z.vectors);
  load_tile<Z::kRows, Z::kDim, T>(V, v, first, seq.keys, dim, a.z.vectors);
  for (int h = item.head * a.z.group(); h < (item.head + 1) * a.z.group(); ++h) {
    const auto q = head_of(a.q, item.b, a.z.seqlen, h, dim);
    const auto d_o = head_of(a.d_o, item.b, a.z.seqlen, h, dim);
    const std::int64_t stats = (static_cast<std::int64_t>(item.b) * a.z.heads + h) * a.z.seqlen;
    for (int i = begin; i < end; i += Z::kCols) {
      __syncthreads();  // the previous product has read X and S
      load_tile<Z::kCols, Z::kDim, T>(X, q, i, seq.length, dim, a.z.vectors);
      if (threadIdx.x < Z::kCols) {
        const int c = static_cast<int>(threadIdx.x);
        const bool valid = i + c < seq.length;
        lse[c] = valid ? a.lse[stats + i + c] * kLog2e : 0.0F;
        delta[c] = valid ? a.delta[stats + i + c] : 0.0F;
      }
      __syncthreads();
      typename Z::Scores p;
      product_transposed<Z>(p, K, X);
#pragma unroll
      for (int r = 0; r < Z::kRowsPerThread; ++r)
#pragma unroll
        for (int c = 0; c < Z::kColsPerThread; ++c) {
          const int col = thread_col() + c * kSide;
          const bool seen = i + col < seq.length && row0 + r < seq.visible(i + col);
          p[r][c] = seen ? exp2f(fmaf(p[r][c], log2_scale, -lse[col])) : 0.0F;
        }
      store_scores<Z>(S, p);
      __syncthreads();  // S is complete, Q has been read
      load_tile<Z::kCols, Z::kDim, T>(X, d_o, i, seq.length, dim, a.z.vectors);
      __syncthreads();
      product<Z>(dv, S, X);
      typename Z::Scores dp;
      product_transposed<Z>(dp, V, X);
      __syncthreads();  // S and dO have been read
#pragma unroll
      for (int r = 0; r < Z::kRowsPerThread; ++r)
#pragma unroll
        for (int c = 0; c < Z::kColsPerThread; ++c)
          p[r][c] *= dp[r][c] - delta[thread_col() + c * kSide];
      store_scores<Z>(S, p);
      load_tile<Z::kCols, Z::kDim, T>(X, q, i, seq.length, dim, a.z.vectors);
      __syncthreads();
      product<Z>(dk, S, X);
    }
  }
  float factor[Z::kRowsPerThread];
  fill<Z>(factor, a.z.scale);
  store_result<Z, T>(head_of(a.dk, item.b, a.z.slots, item.head, dim), first, seq.keys, a.z.slots,
                     dim, a.z.vectors, dk, factor);
  fill<Z>(factor, 1.0F);
  store_result<Z, T>(head_of(a.dv, item.b, a.z.slots, item.head, dim), first, seq.keys, a.z.slots,
                     dim, a.z.vectors, dv, factor);
}

// Owned rows: queries. Columns: keys.
template <class T, class Z>
__global__ __launch_bounds__(kThreads, 2) void attention_dq_fma_kernel(BackwardArgs<T> a) {
  extern __shared__ __align__(16) float shared[];
  float* const Q = shared;
  float* const dO = Q + Z::kRows * Z::kPitch;
  float* const X = dO + Z::kRows * Z::kPitch;  // K, then V, then K
  float* const S = X + Z::kCols * Z::kPitch;   // dS
  const int tiles = (a.z.seqlen + Z::kRows - 1) / Z::kRows;
  const Item item(static_cast<int>(blockIdx.x), a.z.heads, a.z.batch, tiles, true);
  const Sequence seq(a.z, item.b);
  const int first = item.tile * Z::kRows;
  const int dim = a.z.head_dim;
  const auto k = head_of(a.k, item.b, a.z.slots, item.head / a.z.group(), dim);
  const auto v = head_of(a.v, item.b, a.z.slots, item.head / a.z.group(), dim);
  const std::int64_t stats =
      (static_cast<std::int64_t>(item.b) * a.z.heads + item.head) * a.z.seqlen;
  const float log2_scale = a.z.scale * kLog2e;
  const int row0 = first + thread_row() * Z::kRowsPerThread;

  float lse[Z::kRowsPerThread];
  float delta[Z::kRowsPerThread];
#pragma unroll
  for (int r = 0; r < Z::kRowsPerThread; ++r) {
    const bool valid = row0 + r < seq.length;
    lse[r] = valid ? a.lse[stats + row0 + r] * kLog2e : 0.0F;
    delta[r] = valid ? a.delta[stats + row0 + r] : 0.0F;
  }
  typename Z::Result dq;
  clear<Z>(dq);
  const int last = first < seq.length ? seq.visible(min(first + Z::kRows, seq.length) - 1) : 0;
  load_tile<Z::kRows, Z::kDim, T>(Q, head_of(a.q, item.b, a.z.seqlen, item.head, dim), first,
                                  seq.length, dim, a.z.vectors);
  load_tile<Z::kRows, Z::kDim, T>(dO, head_of(a.d_o, item.b, a.z.seqlen, item.head, dim), first,
                                  seq.length, dim, a.z.vectors);
  for (int j = 0; j < last; j += Z::kCols) {
    __syncthreads();  // the previous product has read X and S
    load_tile<Z::kCols, Z::kDim, T>(X, k, j, seq.keys, dim, a.z.vectors);
    __syncthreads();
    typename Z::Scores p;
    product_transposed<Z>(p, Q, X);
#pragma unroll
    for (int r = 0; r < Z::kRowsPerThread; ++r) {
      const int visible = row0 + r < seq.length ? seq.visible(row0 + r) - j - thread_col() : 0;
#pragma unroll
      for (int c = 0; c < Z::kColsPerThread; ++c)
        p[r][c] = c * kSide < visible ? exp2f(fmaf(p[r][c], log2_scale, -lse[r])) : 0.0F;
    }
    __syncthreads();  // K has been read
    load_tile<Z::kCols, Z::kDim, T>(X, v, j, seq.keys, dim, a.z.vectors);
    __syncthreads();
    typename Z::Scores dp;
    product_transposed<Z>(dp, dO, X);
#pragma unroll
    for (int r = 0; r < Z::kRowsPerThread; ++r)
#pragma unroll
      for (int c = 0; c < Z::kColsPerThread; ++c) p[r][c] *= dp[r][c] - delta[r];
    store_scores<Z>(S, p);
    __syncthreads();  // S is complete, V has been read
    load_tile<Z::kCols, Z::kDim, T>(X, k, j, seq.keys, dim, a.z.vectors);
    __syncthreads();
    product<Z>(dq, S, X);
  }
  float factor[Z::kRowsPerThread];
  fill<Z>(factor, a.z.scale);
  store_result<Z, T>(head_of(a.dq, item.b, a.z.seqlen, item.head, dim), first, seq.length,
                     a.z.seqlen, dim, a.z.vectors, dq, factor);
}

template <class T, class Z>
void launch_forward(Context& ctx, const ForwardArgs<T>& a) {
  constexpr std::size_t floats = (Z::kRows + Z::kCols) * Z::kPitch + Z::kRows * Z::kScorePitch;
  const std::int64_t blocks = std::int64_t{a.z.batch} * a.z.heads * tiles_of(a.z.seqlen, Z::kRows);
  launch(ctx, attention_forward_fma_kernel<T, Z>, blocks, kThreads, floats * sizeof(float), a);
}

template <class T, class Z>
void launch_backward(Context& ctx, const BackwardArgs<T>& a) {
  constexpr std::size_t floats =
      (2 * Z::kRows + Z::kCols) * Z::kPitch + Z::kRows * Z::kScorePitch + 2 * Z::kCols;
  const std::int64_t pairs = a.z.batch;
  launch(ctx, attention_dkdv_fma_kernel<T, Z>, pairs * a.z.heads_kv * tiles_of(a.z.slots, Z::kRows),
         kThreads, floats * sizeof(float), a);
  launch(ctx, attention_dq_fma_kernel<T, Z>, pairs * a.z.heads * tiles_of(a.z.seqlen, Z::kRows),
         kThreads, floats * sizeof(float), a);
}

}  // namespace

template <class T>
void forward_fma(Context& ctx, const ForwardArgs<T>& a) {
  if (a.z.head_dim <= 32) return launch_forward<T, Tile<32, 64, 64>>(ctx, a);
  if (a.z.head_dim <= 64) return launch_forward<T, Tile<64, 64, 64>>(ctx, a);
  if (a.z.head_dim <= 128) return launch_forward<T, Tile<128, 64, 32>>(ctx, a);
  return launch_forward<T, Tile<256, 32, 16>>(ctx, a);
}
template <class T>
void backward_fma(Context& ctx, const BackwardArgs<T>& a) {
  if (a.z.head_dim <= 32) return launch_backward<T, Tile<32, 64, 32>>(ctx, a);
  if (a.z.head_dim <= 64) return launch_backward<T, Tile<64, 64, 32>>(ctx, a);
  if (a.z.head_dim <= 128) return launch_backward<T, Tile<128, 32, 32>>(ctx, a);
  return launch_backward<T, Tile<256, 16, 16>>(ctx, a);
}

template void forward_fma(Context&, const ForwardArgs<float>&);
template void forward_fma(Context&, const ForwardArgs<__nv_bfloat16>&);
template void backward_fma(Context&, const BackwardArgs<float>&);
template void backward_fma(Context&, const BackwardArgs<__nv_bfloat16>&);

}  // namespace lrnn::cuda::attention
