// Residual addition and normalisation.
//
// A row lives in registers from its only load to its only store. A warp owns a row of up to 768
// columns (256 in the backward pass, which holds three times as much, and where there are few
// rows), a block one of up to 8192; a thread owns kCount groups of kN neighbouring columns. Of many
// rows of LayerNorm a warp takes some in turns. Any other width takes the strided kernels, one
// block per row, which read the row once per pass. All are bound by HBM: x, residual in, y,
// residual_out forward; dy, r, dresidual_out in, dx, dresidual backward; few rows by latency.
//
// Backward runs a fixed number of blocks over interleaved rows. Each adds its share of dweight and
// dbias to one row of partial sums, folded in order by a second kernel.
#include <algorithm>

#include "lrnn/ops/add_norm.hpp"

#include "common/capability.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda {
namespace {

constexpr int kWarpRowThreads = 256;
constexpr int kStridedThreads = 256;
constexpr int kMaxBlockThreads = 512;
constexpr int kResidentThreads = 640;  // of a multiprocessor in backward: enough rows in flight

/// A tensor stored in T or in float32; absent if null.
template <class T>
struct EitherConst {
  const void* data;
  bool wide;

  template <int N>
  __device__ __forceinline__ void load(std::int64_t i, float (&out)[N]) const {
    if (wide)
      load_vec<float, N>(static_cast<const float*>(data) + i, out);
    else
      load_vec<T, N>(static_cast<const T*>(data) + i, out);
  }
  __device__ __forceinline__ void prefetch(std::int64_t i) const {
    prefetch_to_l2(static_cast<const char*>(data) + i * (wide ? 4 : sizeof(T)));
  }
};
template <class T>
struct Either {
  void* data;
  bool wide;

  template <int N>
  __device__ __forceinline__ void store(std::int64_t i, const float (&in)[N]) const {
    if (wide)
      store_vec<float, N>(static_cast<float*>(data) + i, in);
    else
      store_vec<T, N>(static_cast<T*>(data) + i, in);
  }
};

template <class T>
struct Forward {
  bool layer;
  std::int64_t rows, width;
  float eps;
  const T* x;
  EitherConst<T> residual;
  const float* weight;
  const float* bias;
  T* y;
  Either<T> residual_out;
  float* rstd;
  float* mean;

  template <int N>
  __device__ __forceinline__ void load_sum(std::int64_t i, float (&r)[N]) const {
    load_vec<T, N>(x + i, r);
    if (residual.data == nullptr) return;
    float other[N];
    residual.load(i, other);
#pragma unroll
    for (int k = 0; k < N; ++k) r[k] += other[k];
  }
  /// `r` is centred on entry.
  template <int N>
  __device__ __forceinline__ void store_y(std::int64_t i, std::int64_t column, float scale,
                                          const float (&r)[N], const float (&w)[N]) const {
    float out[N];
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = r[k] * scale * w[k];
    if (bias != nullptr) {
      float b[N];
      load_vec<float, N>(bias + column, b);
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] += b[k];
    }
    store_vec<T, N>(y + i, out);
  }
  __device__ __forceinline__ void store_statistics(std::int64_t row, float row_mean,
                                                   float row_rstd) const {
    if (rstd != nullptr) rstd[row] = row_rstd;
    if (mean != nullptr) mean[row] = row_mean;
  }
};

template <class T>
struct Backward {
  bool layer;
  std::int64_t rows, width;
  const T* dy;
  EitherConst<T> r;
  const float* weight;
  const float* rstd;
  const float* mean;
  EitherConst<T> dresidual_out;
  T* dx;
  Either<T> dresidual;
  float* dweight;  // [blocks, width] partial sums
  float* dbias;    // the same, may be null

  /// Normalised row n and g = weight dy at element i.
  template <int N>
  __device__ __forceinline__ void load_pair(std::int64_t i, float row_mean, float row_rstd,
                                            float (&n)[N], float (&d)[N]) const {
    r.load(i, n);
    load_vec<T, N>(dy + i, d);
#pragma unroll
    for (int k = 0; k < N; ++k) n[k] = (n[k] - row_mean) * row_rstd;
  }
  /// The gradient that arrives through residual_out, or 0.
  template <int N>
  __device__ __forceinline__ void load_other(std::int64_t i, float (&other)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) other[k] = 0.0F;
    if (dresidual_out.data != nullptr) dresidual_out.load(i, other);
  }
  template <int N>
  __device__ __forceinline__ void store_gradient(std::int64_t i, const float (&dr)[N]) const {
    store_vec<T, N>(dx + i, dr);
    if (dresidual.data != nullptr) dresidual.store(i, dr);
  }
};

/// Sum over the threads that share a row. All threads of the block call it if kBlockRow.
template <bool kBlockRow>
__device__ __forceinline__ float row_sum(float v, float* slots) {
  if constexpr (kBlockRow) return block_sum(v, slots);
  return warp_sum(v);
}

/// Both such sums, or the first alone, behind one barrier. Every warp adds what the warps found by
/// the same butterfly, which takes fewer registers than a loop.
template <bool kBlockRow, bool kBoth>
__device__ __forceinline__ float2 row_sums(float2 v, float2* slots) {
  v.x = warp_sum(v.x);
  if constexpr (kBoth) v.y = warp_sum(v.y);
  if constexpr (kBlockRow) {
    const unsigned lane = threadIdx.x % 32;
    if (lane == 0) slots[threadIdx.x / 32] = v;
    __syncthreads();
    v = lane < blockDim.x / 32 ? slots[lane] : float2{0.0F, 0.0F};
    v.x = warp_sum(v.x);
    if constexpr (kBoth) v.y = warp_sum(v.y);
  }
  return v;
}

/// The place of a thread: its lane among `lanes` that share a row, and the row of the group.
template <bool kBlockRow>
struct Place {
  int lane, lanes;
  std::int64_t row, row_step;

  __device__ Place() {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kBlockRow) {
      lane = thread;
      lanes = static_cast<int>(blockDim.x);
      row = blockIdx.x;
      row_step = gridDim.x;
    } else {
      constexpr int warps = kWarpRowThreads / 32;
      lane = thread % 32;
      lanes = 32;
      row = static_cast<std::int64_t>(blockIdx.x) * warps + thread / 32;
      row_step = static_cast<std::int64_t>(gridDim.x) * warps;
    }
  }
  /// First column of group j of the thread.
  template <int N>
  __device__ __forceinline__ int column(int j) const {
    return (j * lanes + lane) * N;
  }
};

template <bool kBlockRow>
constexpr int kRowThreads = kBlockRow ? kMaxBlockThreads : kWarpRowThreads;

/// Takes the mean off and returns the sum of squares over the thread's columns.
template <int kN, int kCount, bool kBlockRow>
__device__ __forceinline__ float centre(const Place<kBlockRow>& p, int width, float mean,
                                        float (&r)[kCount][kN]) {
  float sum = 0.0F;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (p.template column<kN>(j) >= width) continue;
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      r[j][k] -= mean;
      sum = fmaf(r[j][k], r[j][k], sum);
    }
  }
  return sum;
}

/// kFewRows: nothing but the latency of a row counts, so weights are read while the kernel before
/// still runs.
template <class T, int kN, int kCount, bool kBlockRow, bool kFewRows>
__global__ __launch_bounds__(kRowThreads<kBlockRow>) void forward_kernel(Forward<T> a) {
  __shared__ float slots[2][32];
  let_next_kernel_start();
  const Place<kBlockRow> p;
  float w[kCount][kN];
  if constexpr (kFewRows)
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int column = p.template column<kN>(j);
      if (column >= a.width) continue;
      load_vec<float, kN>(a.weight + column, w[j]);
      // Between two norms of a model more passes the caches than they hold.
      if (a.residual.data != nullptr && p.row < a.rows && column % 32 == 0)
        a.residual.prefetch(p.row * a.width + column);
    }
  wait_for_previous_kernel();
  if (p.row >= a.rows) return;  // whole warps; blocks never leave when they own the row
  const int width = static_cast<int>(a.width);
  const std::int64_t base = p.row * a.width;
  const float inverse_width = 1.0F / static_cast<float>(width);
  float r[kCount][kN];
  float sum = 0.0F;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int column = p.template column<kN>(j);
    if (column < width) {
      a.load_sum(base + column, r[j]);
      if (a.residual_out.data != nullptr) a.residual_out.store(base + column, r[j]);
    }
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      if (column >= width) r[j][k] = 0.0F;
      sum += r[j][k];
    }
  }
  const float mean = a.layer ? row_sum<kBlockRow>(sum, slots[0]) * inverse_width : 0.0F;
  sum = centre(p, width, mean, r);
  const float square = row_sum<kBlockRow>(sum, slots[1]) * inverse_width;
  const float rstd = 1.0F / sqrtf(square + a.eps);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int column = p.template column<kN>(j);
    if (column >= width) continue;
    if constexpr (!kFewRows) load_vec<float, kN>(a.weight + column, w[j]);
    a.store_y(base + column, column, rstd, r[j], w[j]);
  }
  if (p.lane == 0) a.store_statistics(p.row, mean, rstd);
}

/// The rows of a warp that are on their way to its part of shared memory, in the order in which it
/// takes them.
template <class T>
struct RowsAhead {
  static constexpr int kSlots = 3;
  const Forward<T>& a;
  int lane, x_bytes, residual_bytes;
  unsigned char* slots;

  __device__ RowsAhead(const Forward<T>& a, unsigned char* shared)
      : a(a),
        lane(static_cast<int>(threadIdx.x) % 32),
        x_bytes(static_cast<int>(a.width) * static_cast<int>(sizeof(T))),
        residual_bytes(residual_size(a) * static_cast<int>(a.width)),
        slots(shared + static_cast<int>(threadIdx.x) / 32 * kSlots * (x_bytes + residual_bytes)) {}

  __host__ __device__ static int residual_size(const Forward<T>& a) {
    return a.residual.data == nullptr ? 0 : a.residual.wide ? 4 : static_cast<int>(sizeof(T));
  }
  [[nodiscard]] __device__ __forceinline__ unsigned char* slot(int i) const {
    return slots + i * (x_bytes + residual_bytes);
  }
  /// Asks for a row, if there is one; each counts in the waiting of every lane.
  __device__ __forceinline__ void request(std::int64_t row, int to) const {
    if (row < a.rows) {
      copy(slot(to), reinterpret_cast<const unsigned char*>(a.x) + row * x_bytes, x_bytes);
      copy(slot(to) + x_bytes,
           static_cast<const unsigned char*>(a.residual.data) + row * residual_bytes,
           residual_bytes);
    }
    copy_async_commit();
  }
  /// x + residual of the oldest row, which has come, at a column.
  template <int N>
  __device__ __forceinline__ void load_sum(int from, int column, float (&r)[N]) const {
    load_vec<T, N>(reinterpret_cast<const T*>(slot(from)) + column, r);
    if (residual_bytes == 0) return;
    float other[N];
    EitherConst<T>{slot(from) + x_bytes, a.residual.wide}.load(column, other);
#pragma unroll
    for (int k = 0; k < N; ++k) r[k] += other[k];
  }

 private:
  /// Neighbouring lanes copy neighbouring 16 bytes.
  __device__ __forceinline__ void copy(unsigned char* to, const unsigned char* from,
                                       int bytes) const {
#pragma unroll 3
    for (int i = 16 * lane; i < bytes; i += 16 * 32) copy_async_16(to + i, from + i, true);
  }
};

/// Many rows of LayerNorm: those of a warp in turns, the next ones on their way while it finishes
/// one, which hides the second sum; weight and bias stay in registers. 16384 rows of 768 take
/// 0.0422 ms for 0.0430 by a warp for each row, RMSNorm 0.0420 either way. With 8 columns an access
/// 0.0455; with weight and bias read for every row, and so one block more, 0.046.
template <class T, int kN, int kCount>
__global__ __launch_bounds__(kWarpRowThreads, 2) void layer_norm_turns_kernel(Forward<T> a) {
  extern __shared__ __align__(16) unsigned char rows_ahead[];
  let_next_kernel_start();
  const Place<false> p;
  const RowsAhead<T> ahead(a, rows_ahead);
  const int width = static_cast<int>(a.width);
  float w[kCount][kN];
  float b[kCount][kN] = {};
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int column = p.template column<kN>(j);
    if (column >= width) continue;
    load_vec<float, kN>(a.weight + column, w[j]);
    if (a.bias != nullptr) load_vec<float, kN>(a.bias + column, b[j]);
  }
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < ahead.kSlots; ++i) ahead.request(p.row + i * p.row_step, i);
  const float inverse_width = 1.0F / static_cast<float>(width);
  int slot = 0;
  for (std::int64_t row = p.row; row < a.rows; row += p.row_step) {
    const std::int64_t base = row * a.width;
    copy_async_wait<ahead.kSlots - 1>();
    __syncwarp();  // what other lanes have copied
    float r[kCount][kN];
    float sum = 0.0F;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int column = p.template column<kN>(j);
      if (column < width) {
        ahead.load_sum(slot, column, r[j]);
        if (a.residual_out.data != nullptr) a.residual_out.store(base + column, r[j]);
      }
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        if (column >= width) r[j][k] = 0.0F;
        sum += r[j][k];
      }
    }
    __syncwarp();  // until all have read the slot
    ahead.request(row + ahead.kSlots * p.row_step, slot);
    slot = slot + 1 == ahead.kSlots ? 0 : slot + 1;
    const float mean = warp_sum(sum) * inverse_width;
    sum = centre(p, width, mean, r);
    const float rstd = 1.0F / sqrtf(warp_sum(sum) * inverse_width + a.eps);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int column = p.template column<kN>(j);
      if (column >= width) continue;
      float out[kN];
#pragma unroll
      for (int k = 0; k < kN; ++k) out[k] = r[j][k] * rstd * w[j][k] + b[j][k];
      store_vec<T, kN>(a.y + base + column, out);
    }
    if (p.lane == 0) a.store_statistics(row, mean, rstd);
  }
}

/// Any width. A thread meets the same columns in every pass, so the sum may replace `residual`.
template <class T>
__global__ __launch_bounds__(kStridedThreads) void forward_strided_kernel(Forward<T> a) {
  __shared__ float slots[2][32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t row = blockIdx.x;
  const std::int64_t base = row * a.width;
  const float inverse_width = 1.0F / static_cast<float>(a.width);
  float r[1];
  float mean = 0.0F;
  if (a.layer) {
    for (std::int64_t c = threadIdx.x; c < a.width; c += kStridedThreads) {
      a.load_sum(base + c, r);
      mean += r[0];
    }
    mean = block_sum(mean, slots[0]) * inverse_width;
  }
  float square = 0.0F;
  for (std::int64_t c = threadIdx.x; c < a.width; c += kStridedThreads) {
    a.load_sum(base + c, r);
    square = fmaf(r[0] - mean, r[0] - mean, square);
  }
  square = block_sum(square, slots[1]) * inverse_width;
  const float rstd = 1.0F / sqrtf(square + a.eps);
  for (std::int64_t c = threadIdx.x; c < a.width; c += kStridedThreads) {
    a.load_sum(base + c, r);
    if (a.residual_out.data != nullptr) a.residual_out.store(base + c, r);
    r[0] -= mean;
    const float w[1] = {a.weight[c]};
    a.store_y(base + c, c, rstd, r, w);
  }
  if (threadIdx.x == 0) a.store_statistics(row, mean, rstd);
}

/// Adds the sums of the warps of a block in order into row blockIdx.x of `partial`. Called by all
/// threads of the block; `shared` holds width floats.
template <int kN, int kCount>
__device__ void add_warps(const float (&sum)[kCount][kN], int width, float* shared,
                          float* partial) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int w = 0; w < kWarpRowThreads / 32; ++w) {
    if (warp == w) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const int column = (j * 32 + lane) * kN;
        if (column >= width) continue;
#pragma unroll
        for (int k = 0; k < kN; ++k)
          shared[column + k] = (w == 0 ? 0.0F : shared[column + k]) + sum[j][k];
      }
    }
    __syncthreads();
  }
  for (int c = static_cast<int>(threadIdx.x); c < width; c += kWarpRowThreads)
    partial[static_cast<std::int64_t>(blockIdx.x) * width + c] = shared[c];
  __syncthreads();
}

template <int kN, int kCount, bool kBlockRow>
__device__ __forceinline__ void store_partial(const float (&sum)[kCount][kN], int width,
                                              float* shared, float* partial) {
  if constexpr (kBlockRow) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int column = (j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kN;
      if (column < width)
        store_vec<float, kN>(partial + static_cast<std::int64_t>(blockIdx.x) * width + column,
                             sum[j]);
    }
  } else {
    add_warps<kN, kCount>(sum, width, shared, partial);
  }
}

/// Registers must allow the blocks of a multiprocessor: LayerNorm with 16 columns per thread, say
/// two blocks of 320 threads at 5120 columns, takes more than 96 if it may, and then runs alone.
template <bool kBlockRow, int kColumns>
constexpr int kBackwardThreads = !kBlockRow      ? kWarpRowThreads
                                 : kColumns == 8 ? 2 * kMaxBlockThreads
                                                 : kResidentThreads;

/// kLayer keeps the sums of LayerNorm out of the registers of RMSNorm. Where registers allow two
/// blocks per SM even so, what arrives through residual_out is loaded before the sums of the row
/// are known.
template <class T, int kN, int kCount, bool kBlockRow, bool kLayer>
__global__ __launch_bounds__(kBackwardThreads<kBlockRow, kN * kCount>) void backward_kernel(
    Backward<T> a) {
  __shared__ float2 slots[2][32];
  __shared__ float shared[kBlockRow ? 1 : 32 * kN * kCount];
  const Place<kBlockRow> p;
  constexpr bool kEarly = kN * kCount <= 8;
  const int width = static_cast<int>(a.width);
  const float inverse_width = 1.0F / static_cast<float>(width);
  float dweight[kCount][kN] = {};
  float dbias[kLayer ? kCount : 1][kN] = {};
  int parity = 0;  // alternate slots, so that one barrier per row suffices
  for (std::int64_t row = p.row; row < a.rows; row += p.row_step, parity ^= 1) {
    const std::int64_t base = row * a.width;
    const float rstd = a.rstd[row];
    const float mean = kLayer ? a.mean[row] : 0.0F;
    float n[kCount][kN];
    float g[kCount][kN];
    float other[kEarly ? kCount : 1][kN];
    float2 sums{0.0F, 0.0F};  // of n g and of g
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int column = p.template column<kN>(j);
      if (column >= width) continue;
      float w[kN];
      a.load_pair(base + column, mean, rstd, n[j], g[j]);
      if constexpr (kEarly) a.load_other(base + column, other[j]);
      load_vec<float, kN>(a.weight + column, w);
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        dweight[j][k] = fmaf(g[j][k], n[j][k], dweight[j][k]);
        if constexpr (kLayer) dbias[j][k] += g[j][k];
        g[j][k] *= w[k];
        sums.x = fmaf(g[j][k], n[j][k], sums.x);
        if constexpr (kLayer) sums.y += g[j][k];
      }
    }
    sums = row_sums<kBlockRow, kLayer>(sums, slots[parity]);
    const float mean_ng = sums.x * inverse_width;
    const float mean_g = kLayer ? sums.y * inverse_width : 0.0F;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int column = p.template column<kN>(j);
      if (column >= width) continue;
      float(&dr)[kN] = other[kEarly ? j : 0];
      if constexpr (!kEarly) a.load_other(base + column, dr);
#pragma unroll
      for (int k = 0; k < kN; ++k) dr[k] = fmaf(rstd, g[j][k] - n[j][k] * mean_ng - mean_g, dr[k]);
      a.store_gradient(base + column, dr);
    }
  }
  store_partial<kN, kCount, kBlockRow>(dweight, width, shared, a.dweight);
  if constexpr (kLayer)
    if (a.dbias != nullptr) store_partial<kN, kCount, kBlockRow>(dbias, width, shared, a.dbias);
}

/// Any width. A thread owns the same columns of every row of the block and keeps their sums in
/// the row of partial sums itself.
template <class T>
__global__ __launch_bounds__(kStridedThreads) void backward_strided_kernel(Backward<T> a) {
  __shared__ float slots[4][32];
  const float inverse_width = 1.0F / static_cast<float>(a.width);
  float* const dweight = a.dweight + blockIdx.x * a.width;
  float* const dbias = a.dbias != nullptr ? a.dbias + blockIdx.x * a.width : nullptr;
  int parity = 0;
  for (std::int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, parity ^= 2) {
    const std::int64_t base = row * a.width;
    const float rstd = a.rstd[row];
    const float mean = a.layer ? a.mean[row] : 0.0F;
    const bool first = row == blockIdx.x;
    float n[1];
    float d[1];
    float sum_ng = 0.0F;
    float sum_g = 0.0F;
    for (std::int64_t c = threadIdx.x; c < a.width; c += kStridedThreads) {
      a.load_pair(base + c, mean, rstd, n, d);
      dweight[c] = fmaf(d[0], n[0], first ? 0.0F : dweight[c]);
      if (dbias != nullptr) dbias[c] = (first ? 0.0F : dbias[c]) + d[0];
      const float g = d[0] * a.weight[c];
      sum_ng = fmaf(g, n[0], sum_ng);
      sum_g += g;
    }
    const float mean_ng = block_sum(sum_ng, slots[parity]) * inverse_width;
    const float mean_g = a.layer ? block_sum(sum_g, slots[parity + 1]) * inverse_width : 0.0F;
    for (std::int64_t c = threadIdx.x; c < a.width; c += kStridedThreads) {
      float dr[1];
      a.load_pair(base + c, mean, rstd, n, d);
      a.load_other(base + c, dr);
      dr[0] = fmaf(rstd, d[0] * a.weight[c] - n[0] * mean_ng - mean_g, dr[0]);
      a.store_gradient(base + c, dr);
    }
  }
}

/// How the threads share a row of `width` columns: 8 columns per thread and unit of `count`.
struct Layout {
  int count;
  bool block_row;
  unsigned threads;
};

Layout layout_of(std::int64_t width, std::int64_t widest_of_warp) {
  if (width <= widest_of_warp)
    return {static_cast<int>(std::max<std::int64_t>(1, (width + 255) / 256)), false,
            kWarpRowThreads};
  const int count = width <= 8 * kMaxBlockThreads ? 1 : 2;
  const std::int64_t threads = (width + 8 * count - 1) / (8 * count);
  return {count, true, static_cast<unsigned>((threads + 31) / 32 * 32)};
}

/// Blocks of backward per multiprocessor; registers allow 1024 threads with 8 columns each, fewer
/// with 16.
std::int64_t resident_blocks(int count, std::int64_t threads) {
  if (count == 1) return (kResidentThreads + threads - 1) / threads;
  return std::max<std::int64_t>(1, kResidentThreads / threads);
}

/// Calls f.operator()<columns per access, accesses, block per row>().
template <class T, class F>
void visit_layout(const Layout& l, F&& f) {
  constexpr int n = kWide<T>;
  constexpr int unit = 8 / n;
  if (l.block_row)
    return l.count == 1 ? f.template operator()<n, unit, true>()
                        : f.template operator()<n, 2 * unit, true>();
  if (l.count == 1) return f.template operator()<n, unit, false>();
  if (l.count == 2) return f.template operator()<n, 2 * unit, false>();
  return f.template operator()<n, 3 * unit, false>();
}

template <class T>
bool is_wide(TensorView t) {
  return t && t.dtype() == DType::float32;
}

/// Whether the register kernels take rows of this width; `operands` are all that they touch.
template <class T>
bool takes_registers(std::int64_t width, std::initializer_list<TensorView> operands) {
  if (width > 16 * kMaxBlockThreads) return false;
  return std::all_of(operands.begin(), operands.end(), [&](const TensorView& t) {
    const std::size_t access = size_of(t.dtype()) * static_cast<std::size_t>(kWide<T>);
    return width % kWide<T> == 0 && reinterpret_cast<std::uintptr_t>(t.raw()) % access == 0;
  });
}

float* optional_data(MutableTensorView t) {
  return t ? t.data<float>() : nullptr;
}
const float* optional_data(TensorView t) {
  return t ? t.data<float>() : nullptr;
}

/// Whether rows, of bfloat16, are many and as wide as layer_norm_turns_kernel takes them, on the
/// device that it was measured on.
template <class T>
bool takes_turns(const Forward<T>& f) {
  constexpr std::int64_t kManyRows = 8192;
  return f.layer && f.rows >= kManyRows && f.width > 512 && f.width <= 768 &&
         compute_capability() == 90;
}
template <class T>
void launch_turns(cudaStream_t stream, const Forward<T>& f) {
  constexpr int kColumns = 4;
  constexpr int warps = kWarpRowThreads / 32;
  const auto kernel = layer_norm_turns_kernel<T, kColumns, 768 / 32 / kColumns>;
  const auto bytes = static_cast<std::size_t>(warps * RowsAhead<T>::kSlots * f.width) *
                     (sizeof(T) + static_cast<std::size_t>(RowsAhead<T>::residual_size(f)));
  allow_shared(kernel, bytes);
  launch_overlapped(kernel, static_cast<unsigned>(2 * multiprocessors()), kWarpRowThreads, bytes,
                    stream, f);
}

template <class T>
void forward(Context& ctx, const AddNormForward& a) {
  const std::int64_t width = a.x.dim(a.x.rank() - 1);
  const std::int64_t rows = a.x.numel() / width;
  const Forward<T> f{a.kind == NormKind::Layer,
                     rows,
                     width,
                     static_cast<float>(a.eps),
                     a.x.data<T>(),
                     {a.residual.raw(), is_wide<T>(a.residual)},
                     a.weight.data<float>(),
                     optional_data(a.bias),
                     a.y.data<T>(),
                     {a.residual_out.raw(), is_wide<T>(a.residual_out)},
                     optional_data(a.rstd),
                     optional_data(a.mean)};
  const cudaStream_t stream = ctx.stream().handle;
  if (!takes_registers<T>(width, {a.x, a.residual, a.weight, a.bias, a.y, a.residual_out})) {
    launch_overlapped(forward_strided_kernel<T>, static_cast<unsigned>(rows), kStridedThreads, 0,
                      stream, f);
    return;
  }
  if constexpr (sizeof(T) == 2)
    if (takes_turns(f)) return launch_turns(stream, f);
  // Few rows leave most of the device idle: more threads take one.
  constexpr std::int64_t kFewRows = 512;
  const bool few = rows <= kFewRows;
  const Layout l = layout_of(width, few ? 256 : 768);
  constexpr int warps = kWarpRowThreads / 32;
  const auto blocks = static_cast<unsigned>(l.block_row ? rows : (rows + warps - 1) / warps);
  visit_layout<T>(l, [&]<int kN, int kCount, bool kBlockRow>() {
    // A block of up to 512 threads with 8 columns each is faster by 4 at a time, where float32 rows
    // then are read without gaps: 16384 rows of 2560 in 0.126 ms for 0.137 (LayerNorm), 0.124 for
    // 0.129. Neither warps (768 columns: 0.045 for 0.043) nor wider blocks are, nor is backward.
    constexpr bool kHalves = kBlockRow && kN == 8 && kCount == 1;
    constexpr int kColumns = kHalves ? 4 : kN;
    const auto kernel =
        few ? forward_kernel<T, kN, kCount, kBlockRow, true>
            : forward_kernel<T, kColumns, kN * kCount / kColumns, kBlockRow, false>;
    launch_overlapped(kernel, blocks, l.threads, 0, stream, f);
  });
}

template <class T>
void backward(Context& ctx, const AddNormBackward& a) {
  const std::int64_t width = a.dy.dim(a.dy.rank() - 1);
  const std::int64_t rows = a.dy.numel() / width;
  const bool registers =
      takes_registers<T>(width, {a.dy, a.r, a.weight, a.dresidual_out, a.dx, a.dresidual});
  const Layout l = layout_of(width, 256);
  constexpr int warps = kWarpRowThreads / 32;
  const std::int64_t shares = registers && !l.block_row ? (rows + warps - 1) / warps : rows;
  const std::int64_t threads = registers ? l.threads : kStridedThreads;
  // For 132 multiprocessors; the sums must not depend on the device.
  const std::int64_t blocks = std::min(shares, 132 * resident_blocks(l.count, threads));
  Tensor dweight = ctx.empty({blocks, width}, DType::float32);
  Tensor dbias = a.dbias ? ctx.empty({blocks, width}, DType::float32) : Tensor();
  float* const dweight_data = dweight.view().data<float>();
  float* const dbias_data = a.dbias ? dbias.view().data<float>() : nullptr;
  const Backward<T> f{a.kind == NormKind::Layer,
                      rows,
                      width,
                      a.dy.data<T>(),
                      {a.r.raw(), is_wide<T>(a.r)},
                      a.weight.data<float>(),
                      a.rstd.data<float>(),
                      optional_data(a.mean),
                      {a.dresidual_out.raw(), is_wide<T>(a.dresidual_out)},
                      a.dx.data<T>(),
                      {a.dresidual.raw(), is_wide<T>(a.dresidual)},
                      dweight_data,
                      dbias_data};
  const cudaStream_t stream = ctx.stream().handle;
  const auto grid = static_cast<unsigned>(blocks);
  const auto run = [&]<int kCount, bool kBlockRow>() {
    const auto kernel = f.layer ? backward_kernel<T, kWide<T>, kCount, kBlockRow, true>
                                : backward_kernel<T, kWide<T>, kCount, kBlockRow, false>;
    kernel<<<grid, l.threads, 0, stream>>>(f);
  };
  constexpr int unit = 8 / kWide<T>;
  if (!registers)
    backward_strided_kernel<T><<<grid, kStridedThreads, 0, stream>>>(f);
  else if (!l.block_row)
    run.template operator()<unit, false>();
  else if (l.count == 1)
    run.template operator()<unit, true>();
  else
    run.template operator()<2 * unit, true>();
  LRNN_CUDA_CHECK_LAUNCH();
  const Partials weight_sums = {dweight_data, width, a.dweight.data<float>()};
  const Partials bias_sums =
      a.dbias ? Partials{dbias_data, width, a.dbias.data<float>()} : Partials{};
  fold_partials(stream, static_cast<int>(blocks), weight_sums, bias_sums);
}

}  // namespace

void add_norm_forward(Context& ctx, const AddNormForward& a) {
  visit_float("add_norm_forward", a.x.dtype(), [&]<class T>() { forward<T>(ctx, a); });
}
void add_norm_backward(Context& ctx, const AddNormBackward& a) {
  visit_float("add_norm_backward", a.dy.dtype(), [&]<class T>() { backward<T>(ctx, a); });
}

}  // namespace lrnn::cuda
