/// Product of few rows with a weight, y = x W^T: one token of each sequence of a batch. Bound by
/// latency: a chain of such products of 0.1 to 2.4 million weights takes 1.4 to 2.3 us each for one
/// row (H200), of which reading W, once, is at most half.
///
/// A block owns kTiles groups of eight columns of y, that is, of rows of W. Its warps share K. Lane
/// 4 g + c of a warp reads the c-th 16 of every 64 bytes of rows g, g + 8, ... of W and of x, and
/// multiplies them from registers; x comes from the caches, as every block reads it. The sums of
/// the warps are added in their order and handed to an epilogue.
///
/// How K is cut depends on N and K alone, so the bits of a row of y are the same beside any other
/// rows and on any device of a kind.
///
/// A norm in front of a product may be a part of it, for up to kNormedRows rows: see RmsNorm. Their
/// bits differ from those of rows that were normalised before.
#pragma once

#include <algorithm>
#include <climits>

#include "common/capability.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"

namespace lrnn::cuda::few_rows {

constexpr int kColumns = 8;    // of y that a warp reads at a time
constexpr int kLanes = 4;      // that read neighbouring parts of a row of W
constexpr int kAhead = 4;      // loads of a row of W that a thread has in flight
constexpr int kMaxWarps = 16;  // of a block

/// Elements of a row of W that a warp reads at a time: 64 bytes, 16 in each of kLanes.
template <class T>
constexpr int kStep = 64 / static_cast<int>(sizeof(T));
/// Most rows of a product. Tensor cores take 16; float32 has one accumulator for each row.
template <class T>
constexpr int kMaxRows = sizeof(T) == 2 ? 16 : 4;

template <class T>
struct Args {
  DeviceRows<const T> x;       ///< [rows, depth]
  DeviceRows<const T> weight;  ///< [columns, depth]
  int rows, columns, depth;    ///< kWide<T> divides depth
  bool stable_weight;          ///< not written by the kernels just before
};

/// y = sum (+ bias), or y += sum.
template <class T>
struct StoreSum {
  const T* bias;  ///< [columns], or null
  DeviceRows<T> y;
  bool accumulate;

  __device__ __forceinline__ void operator()(int r, int c, float sum) const {
    T* const to = y.row(r) + c;
    if (bias != nullptr) sum += to_float(bias[c]);
    if (accumulate) sum += to_float(*to);
    *to = from_float<T>(sum);
  }
};

/// The part of `depth` that a warp takes: [first, last).
struct Part {
  int first, last;
};
template <class T>
__device__ __forceinline__ Part part_of_warp(int depth, int warp, int warps) {
  const int steps = (depth + kStep<T> - 1) / kStep<T>;
  const int width = (steps + warps - 1) / warps * kStep<T>;
  return {min(warp * width, depth), min((warp + 1) * width, depth)};
}

/// Distance of rows of sums: eight words more than a row of 16 or 32, so that rows written together
/// hit different banks.
template <int kTiles>
constexpr int kPitch = kTiles > 1 ? 8 * kTiles + 8 : 8;

/// Where a thread's elements come from: the weight past the L1 cache, which is left to x.
enum class Source { Weight, Input };

/// 8 or 16 bytes. Volatile, else the compiler moves loads between the products, to save registers,
/// where they are waited for.
template <Source kSource, class T, int N>
__device__ __forceinline__ void load_ahead(Packed<T, N>& to, const T* from) {
  auto& w = to.words;
  if constexpr (kSource == Source::Weight)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(from)
                 : "memory");
  else if constexpr (Packed<T, N>::kBytes == 16)
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(from)
                 : "memory");
  else
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(w[0]), "=r"(w[1])
                 : "l"(from)
                 : "memory");
}

/// kCount rows, kSpacing apart, of which a thread reads kWide<T> elements at a time. The last row
/// stands for those behind it: what comes of them is not used.
template <class T, int kCount, int kSpacing, Source kSource>
struct RowReader {
  using Elements = Packed<T, kWide<T>>;
  const T* row[kCount];
  int last;

  __device__ __forceinline__ RowReader(const DeviceRows<const T>& rows, int first, int count,
                                       int offset, int last)
      : last(last - offset) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      row[i] = rows.row(min(first + i * kSpacing, count - 1)) + offset;
  }
  /// Elements from column k of the thread on, 0 from `last` on.
  __device__ __forceinline__ void load(Elements (&to)[kCount], int k) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[i] = {};
      if (k < last) load_ahead<kSource>(to[i], row[i] + k);
    }
  }
  /// Asks for the lines of columns [k, last), of which this is the first of kLanes threads.
  __device__ __forceinline__ void prefetch(int k) const {
    constexpr int kLine = 128 / static_cast<int>(sizeof(T));
#pragma unroll 1
    for (; k < last; k += kLine)
#pragma unroll
      for (int i = 0; i < kCount; ++i) prefetch_to_l2(row[i] + k);
  }
};

template <class T, int kTiles>
using WeightReader = RowReader<T, kTiles, kColumns, Source::Weight>;

/// kAhead steps of the rows of a reader.
template <class Reader, class T, int kCount>
struct Ring {
  typename Reader::Elements slots[kAhead][kCount];

  __device__ __forceinline__ void fill(const Reader& from, int k) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) from.load(slots[i], k + i * kStep<T>);
  }
};

/// Loads the first steps of a warp's part of W; at return what other kernels write can be read, of
/// which on_inputs() asks for what the sums do not need. A stable weight is read while they run.
template <class T, int kTiles, class OnInputs>
__device__ __forceinline__ void begin_weight(const Args<T>& a,
                                             const WeightReader<T, kTiles>& weight,
                                             Ring<WeightReader<T, kTiles>, T, kTiles>& w, int first,
                                             int lane, const OnInputs& on_inputs) {
  if (!a.stable_weight) {
    if (lane % kLanes == 0) weight.prefetch(first);
    wait_for_previous_kernel();
  }
  w.fill(weight, first);
  wait_for_previous_kernel();
  on_inputs();
}

/// Sums of one step on tensor cores: x is A, with rows up to 8 kHalves, and eight rows of W are B.
///
/// A k step of mma wants elements 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 from lane 4 g + c. It gets
/// 8 c .. 8 c + 3 of both operands, the next step 8 c + 4 .. 8 c + 7: the order of a sum is free.
template <int kTiles, int kHalves>
__device__ __forceinline__ void multiply_step(const Packed<bf16, kWide<bf16>> (&x)[kHalves],
                                              const Packed<bf16, kWide<bf16>> (&w)[kTiles],
                                              float (&sums)[kTiles][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t* const low = x[0].words + 2 * half;
    const std::uint32_t* const high = x[kHalves - 1].words + 2 * half;
    const std::uint32_t rows[4] = {low[0], kHalves == 2 ? high[0] : 0, low[1],
                                   kHalves == 2 ? high[1] : 0};
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      multiply_add(sums[t], rows, w[t].words[2 * half], w[t].words[2 * half + 1]);
  }
}

/// Sums of a warp.
template <int kTiles, int kHalves, class OnInputs>
__device__ __forceinline__ void sum_part(const Args<bf16>& a, int column, Part part, int lane,
                                         float (&sums)[kTiles][4], const OnInputs& on_inputs) {
  using Input = RowReader<bf16, kHalves, 8, Source::Input>;
  const int group = lane / kLanes;
  const int offset = lane % kLanes * kWide<bf16>;
  const WeightReader<bf16, kTiles> weight(a.weight, column + group, a.columns, offset, part.last);
  const Input input(a.x, group, a.rows, offset, part.last);
  Ring<WeightReader<bf16, kTiles>, bf16, kTiles> w;
  Ring<Input, bf16, kHalves> x;
  begin_weight(a, weight, w, part.first, lane, on_inputs);
  x.fill(input, part.first);
#pragma unroll 1
  for (int k0 = part.first; k0 < part.last; k0 += kAhead * kStep<bf16>)
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      multiply_step<kTiles, kHalves>(x.slots[i], w.slots[i], sums);
      const int next = k0 + (i + kAhead) * kStep<bf16>;
      weight.load(w.slots[i], next);
      input.load(x.slots[i], next);
    }
}

/// To `to` [8 kHalves, kPitch].
template <int kTiles, int kHalves>
__device__ __forceinline__ void put_sums(const float (&sums)[kTiles][4], int lane, float* to) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float* const at =
          to + (lane / 4 + half * 8) * kPitch<kTiles> + t * kColumns + lane % kLanes * 2;
      at[0] = sums[t][2 * half];
      at[1] = sums[t][2 * half + 1];
    }
}

/// A warp's sums go to `sums` [8 kHalves, kPitch] of its own.
template <int kTiles, int kHalves, class OnInputs>
__device__ __forceinline__ void warp_sums(const Args<bf16>& a, int column, Part part, int lane,
                                          float* sums, const OnInputs& on_inputs) {
  float c[kTiles][4] = {};
  sum_part<kTiles, kHalves>(a, column, part, lane, c, on_inputs);
  put_sums<kTiles, kHalves>(c, lane, sums);
}

/// The same in float32, for up to kRows rows. Lane 4 g + c adds the elements of its offset; the
/// four of a column are added in a butterfly. x comes from the caches sooner than W, so it is read
/// where it is used.
template <int kTiles, int kRows, class OnInputs>
__device__ __forceinline__ void warp_sums(const Args<float>& a, int column, Part part, int lane,
                                          float* sums, const OnInputs& on_inputs) {
  using Input = RowReader<float, kRows, 1, Source::Input>;
  constexpr int kElements = kWide<float>;
  const int group = lane / kLanes;
  const int offset = lane % kLanes * kElements;
  const WeightReader<float, kTiles> weight(a.weight, column + group, a.columns, offset, part.last);
  const Input input(a.x, 0, a.rows, offset, part.last);
  Ring<WeightReader<float, kTiles>, float, kTiles> w;
  begin_weight(a, weight, w, part.first, lane, on_inputs);
  float acc[kTiles][kRows] = {};
#pragma unroll 1
  for (int k0 = part.first; k0 < part.last; k0 += kAhead * kStep<float>)
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = k0 + i * kStep<float>;
      typename Input::Elements x[kRows];
      input.load(x, k);
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < kElements; ++e)
            acc[t][r] = fmaf(x[r].get(e), w.slots[i][t].get(e), acc[t][r]);
      weight.load(w.slots[i], k + kAhead * kStep<float>);
    }
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = acc[t][r];
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2)
        sum += __shfl_xor_sync(0xFFFFFFFFU, sum, distance);
      if (lane % kLanes == 0) sums[r * kPitch<kTiles> + t * kColumns + group] = sum;
    }
}

/// What becomes of the rows of x before they are multiplied: nothing.
struct AsTheyAre {
  static constexpr bool kNorm = false;
};

/// Or r = x (+ residual), normalised: y = rstd (r * weight) W^T, rstd = 1 / sqrt(mean(r^2) + eps),
/// with r * weight rounded. As rstd is a factor of the sums, no product waits for it. Every block
/// does that; the first stores r. A launch less than with a norm by itself.
template <class Residual>
struct RmsNorm {
  static constexpr bool kNorm = true;
  const Residual* residual;  ///< [rows, depth], or null
  const float* weight;       ///< [depth]
  Residual* residual_out;    ///< [rows, depth], or null
  float* rstd;               ///< [rows], or null
  float inverse_depth, eps;

  /// Whether this block stores r and rstd.
  __device__ __forceinline__ bool stores() const { return blockIdx.x == 0; }
};

/// Most rows that a block normalises. Its warps normalise the parts of K that they multiply.
constexpr int kNormedRows = 4;
/// Elements of a row that a warp takes, all of which it has in flight.
constexpr int kNormedPart = kAhead * kStep<bf16>;
/// Distance of its rows in shared memory: two that are read together hit different banks.
constexpr int kNormedPitch = kNormedPart + 32;

/// What a warp of a block that normalises has in shared memory beside its sums.
struct NormedPart {
  alignas(16) bf16 rows[kNormedRows][kNormedPitch];
  float squares[kNormedRows];  ///< sums of r^2
};

/// A lane's elements of the rows of a group, of which the first is row `first` of the norm's.
template <class Residual>
struct NormedElements {
  static constexpr int kCount = kNormedPart / 32;
  Packed<bf16, kCount> x[kNormedRows];
  Packed<Residual, kCount> residual[kNormedRows];
  Packed<float, kCount> weight = {};

  __device__ __forceinline__ void load(const Args<bf16>& a, const RmsNorm<Residual>& norm,
                                       int first, int k, int last) {
#pragma unroll
    for (int r = 0; r < kNormedRows; ++r) {
      x[r] = {};
      residual[r] = {};
      if (k >= last || r >= a.rows) continue;
      load_ahead<Source::Input>(x[r], a.x.row(r) + k);
      if (norm.residual != nullptr)
        load_ahead<Source::Input>(
            residual[r], norm.residual + static_cast<std::int64_t>(first + r) * a.depth + k);
    }
  }
  /// Leaves r * weight in `to`, r in `residual`, and sums of squares in `squares`.
  __device__ __forceinline__ void normalize(int rows, NormedPart& to, int lane,
                                            float (&squares)[kNormedRows]) {
#pragma unroll
    for (int r = 0; r < kNormedRows; ++r) {
      squares[r] = 0.0F;
      if (r >= rows) continue;
      float sums[kCount];
      float scaled[kCount];
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        sums[e] = x[r].get(e) + residual[r].get(e);
        squares[r] = fmaf(sums[e], sums[e], squares[r]);
        scaled[e] = sums[e] * weight.get(e);
      }
      residual[r].set(sums);
      Packed<bf16, kCount> rounded;
      rounded.set(scaled);
      *reinterpret_cast<uint2*>(&to.rows[r][lane * kCount]) =
          make_uint2(rounded.words[0], rounded.words[1]);
    }
  }
  __device__ __forceinline__ void store_residual(const RmsNorm<Residual>& norm, int first, int rows,
                                                 int depth, int k) const {
#pragma unroll
    for (int r = 0; r < kNormedRows; ++r)
      if (r < rows)
        residual[r].store(norm.residual_out + static_cast<std::int64_t>(first + r) * depth + k);
  }
};

/// The same as warp_sums of a group of rows, of which the first is row `first` of the norm's,
/// normalised but for rstd.
template <class Residual, class OnInputs>
__device__ __forceinline__ void warp_sums_of_normed(const Args<bf16>& a,
                                                    const RmsNorm<Residual>& norm, int first,
                                                    bool stores, int column, Part part, int lane,
                                                    float* sums, NormedPart& normed,
                                                    const OnInputs& on_inputs) {
  const int group = lane / kLanes;
  const int offset = lane % kLanes * kWide<bf16>;
  const WeightReader<bf16, 1> weight(a.weight, column + group, a.columns, offset, part.last);
  Ring<WeightReader<bf16, 1>, bf16, 1> w;
  NormedElements<Residual> own;
  const int k = part.first + lane * own.kCount;
  if (k < part.last) load_ahead<Source::Input>(own.weight, norm.weight + k);
  begin_weight(a, weight, w, part.first, lane, on_inputs);
  own.load(a, norm, first, k, part.last);
  float squares[kNormedRows];
  own.normalize(a.rows, normed, lane, squares);
  __syncwarp();
  const bf16* const row = normed.rows[min(group, a.rows - 1)] + offset;
  float c[1][4] = {};
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const uint4 words = *reinterpret_cast<const uint4*>(row + i * kStep<bf16>);
    const Packed<bf16, kWide<bf16>> x[1] = {{{words.x, words.y, words.z, words.w}}};
    multiply_step<1, 1>(x, w.slots[i], c);
  }
  if (stores && norm.residual_out != nullptr && k < part.last)
    own.store_residual(norm, first, a.rows, a.depth, k);
#pragma unroll
  for (int r = 0; r < kNormedRows; ++r) {
    if (r >= a.rows) break;
    const float square = warp_sum(squares[r]);
    if (lane == 0) normed.squares[r] = square;
  }
  put_sums<1, 1>(c, lane, sums);
}

/// Of row r of a group, from what `warps` warps have added up.
template <class Residual>
__device__ __forceinline__ float rstd_of(const RmsNorm<Residual>& norm, const NormedPart* parts,
                                         int warps, int r) {
  float square = 0.0F;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) square += parts[w].squares[r];
  return rsqrtf(fmaf(square, norm.inverse_depth, norm.eps));
}

/// Rows [first, first + rows.rows) of a product, of which blockIdx.y counts groups of kRows.
template <class T>
struct RowGroup {
  int first;
  Args<T> rows;

  __device__ __forceinline__ RowGroup(const Args<T>& all, int size)
      : first(static_cast<int>(blockIdx.y) * size), rows(all) {
    rows.x.data += first * all.x.stride;
    rows.rows = min(size, all.rows - first);
  }
};

/// What an epilogue needs beside its sums: what its load(row, column) returns, if it has one.
template <class Epilogue>
struct OperandsOf {
  __device__ __forceinline__ void load(const Epilogue&, int, int) {}
  template <class... Sums>
  __device__ __forceinline__ void finish(const Epilogue& epilogue, int row, int column,
                                         Sums... sums) {
    epilogue(row, column, sums...);
  }
};
template <class Epilogue>
  requires requires { typename Epilogue::Operands; }
struct OperandsOf<Epilogue> {
  typename Epilogue::Operands held;

  __device__ __forceinline__ void load(const Epilogue& epilogue, int row, int column) {
    held = epilogue.load(row, column);
  }
  template <class... Sums>
  __device__ __forceinline__ void finish(const Epilogue& epilogue, int row, int column,
                                         Sums... sums) {
    epilogue(row, column, sums..., held);
  }
};

/// What a block does. kRows: 8 or 16 in bfloat16. `sums`: kRows kPitch floats for each warp. The
/// epilogue is called once for each row and column, with the sum in float32; if it reads anything
/// but weights, it may ask for that by prefetch(row, column) before the kernels before this one
/// end, and return it from load(row, column), of which the first is called before the sums are
/// taken. With a norm one NormedPart for each warp, behind the sums.
template <class T, int kTiles, int kRows, class Epilogue, class Norm>
__device__ __forceinline__ void product(const Args<T>& all, int block, float* sums,
                                        const Epilogue& epilogue, const Norm& norm) {
  const RowGroup<T> group(all, kRows);
  const Args<T>& a = group.rows;
  constexpr int kWidth = kTiles * kColumns;
  constexpr int kSums = kRows * kPitch<kTiles>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int column = block * kWidth;
  if constexpr (requires { epilogue.prefetch(0, 0); })
    for (int i = static_cast<int>(threadIdx.x); i < a.rows * kWidth;
         i += static_cast<int>(blockDim.x))
      if (column + i % kWidth < a.columns)
        epilogue.prefetch(group.first + i / kWidth, column + i % kWidth);
  constexpr int kPerLane = sizeof(T) == 2 ? kRows / 8 : kRows;
  OperandsOf<Epilogue> operands;
  const auto load = [&](int i) {
    if (i < a.rows * kWidth && column + i % kWidth < a.columns)
      operands.load(epilogue, group.first + i / kWidth, column + i % kWidth);
  };
  const Part part = part_of_warp<T>(a.depth, warp, warps);
  const auto on_inputs = [&] { load(static_cast<int>(threadIdx.x)); };
  auto* const parts = reinterpret_cast<NormedPart*>(sums + warps * kSums);
  if constexpr (Norm::kNorm)
    warp_sums_of_normed(a, norm, group.first, norm.stores(), column, part, lane,
                        sums + warp * kSums, parts[warp], on_inputs);
  else
    warp_sums<kTiles, kPerLane>(a, column, part, lane, sums + warp * kSums, on_inputs);
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < a.rows * kWidth;) {
    const int r = i / kWidth;
    const int c = i % kWidth;
    float sum = 0.0F;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) sum += sums[w * kSums + r * kPitch<kTiles> + c];
    if constexpr (Norm::kNorm) {
      const float rstd = rstd_of(norm, parts, warps, r);
      sum *= rstd;
      if (norm.rstd != nullptr && norm.stores() && c == 0) norm.rstd[group.first + r] = rstd;
    }
    if (column + c < a.columns) operands.finish(epilogue, group.first + r, column + c, sum);
    i += static_cast<int>(blockDim.x);
    load(i);
  }
}

template <class T, int kTiles, int kRows, class Epilogue, class Norm>
__global__ __launch_bounds__(32 * kMaxWarps) void product_kernel(Args<T> a, Epilogue epilogue,
                                                                 Norm norm) {
  extern __shared__ float sums[];
  let_next_kernel_start();
  product<T, kTiles, kRows>(a, static_cast<int>(blockIdx.x), sums, epilogue, norm);
}

/// Two products of the same x in one launch; `first_blocks` of the blocks do the first.
template <class T, int kTiles, int kRows, class First, class Second, class Norm>
__global__ __launch_bounds__(32 * kMaxWarps) void product_pair_kernel(Args<T> a, First first,
                                                                      Args<T> b, Second second,
                                                                      int first_blocks, Norm norm) {
  extern __shared__ float sums[];
  let_next_kernel_start();
  const int block = static_cast<int>(blockIdx.x);
  if (block < first_blocks)
    product<T, kTiles, kRows>(a, block, sums, first, norm);
  else
    product<T, kTiles, kRows>(b, block - first_blocks, sums, second, norm);
}

/// Whether device and operands suit the kernel: few rows, those of x and W in 16-byte accesses.
/// More than kMaxRows read the weight again, from L2.
template <class T>
bool applies(TensorView x, TensorView weight, std::int64_t most_rows = kMaxRows<T>) {
  const std::int64_t rows = detail::row_count(x);
  const std::int64_t columns = weight.dim(0);
  const std::int64_t depth = x.dim(-1);
  constexpr int kMargin = 1 << 16;  // sums of sizes that the kernel takes in 32 bits
  return rows > 0 && rows <= most_rows && std::max(columns, depth) <= INT_MAX - kMargin &&
         allows_vectors(x.data<T>(), depth, rows > 1 ? detail::row_stride(x) : 0, kWide<T>) &&
         allows_vectors(weight.data<T>(), depth, columns > 1 ? detail::row_stride(weight) : 0,
                        kWide<T>) &&
         (sizeof(T) == 4 || has_mma());
}

/// Elements of a weight that may be read twice.
constexpr std::int64_t kSmallWeight = std::int64_t{1} << 20;

/// Rows up to which the kernel is the fastest.
template <class T>
std::int64_t most_rows(TensorView weight) {
  return weight.numel() <= kSmallWeight ? 2 * kMaxRows<T> : kMaxRows<T>;
}

/// Warps of a block: what a warp reads fits in the loads that it has in flight, if kMaxWarps do. A
/// few at least, for the epilogue.
template <class T>
int warps_of(int depth) {
  constexpr int kPerWarp = kAhead * kStep<T>;
  constexpr int kMinWarps = 4;
  return std::clamp((depth + kPerWarp - 1) / kPerWarp, kMinWarps, kMaxWarps);
}

/// Calls f.operator()<kTiles, kRows>(). More tiles where there are enough blocks without, because
/// every block reads all of x, the sooner the larger x is. Neither changes a sum.
template <class T, class F>
void visit_sizes(const Args<T>& a, F&& f) {
  const auto visit_rows = [&]<int kTiles>() {
    if constexpr (sizeof(T) == 2)
      return a.rows > 8 ? f.template operator()<kTiles, 16>() : f.template operator()<kTiles, 8>();
    else
      return a.rows > 2   ? f.template operator()<kTiles, 4>()
             : a.rows > 1 ? f.template operator()<kTiles, 2>()
                          : f.template operator()<kTiles, 1>();
  };
  if (a.columns >= (a.rows > 8 ? 2048 : 4096)) return visit_rows.template operator()<2>();
  visit_rows.template operator()<1>();
}

/// The same; rows that are normalised, at most kNormedRows, fit in the smallest of these.
template <class T, class Norm, class F>
void visit_sizes(const Args<T>& a, const Norm&, F&& f) {
  if constexpr (Norm::kNorm)
    f.template operator()<1, 8>();
  else
    visit_sizes(a, f);
}

/// Blocks, threads and shared memory of a product.
template <int kTiles>
unsigned blocks_of(int columns) {
  constexpr int kWidth = kTiles * kColumns;
  return static_cast<unsigned>((columns + kWidth - 1) / kWidth);
}
template <int kRows>
unsigned groups_of(int rows) {
  return static_cast<unsigned>((rows + kRows - 1) / kRows);
}
template <int kTiles, int kRows, class Norm>
std::size_t shared_of(int warps) {
  constexpr std::size_t kPerWarp =
      sizeof(float) * kRows * kPitch<kTiles> + (Norm::kNorm ? sizeof(NormedPart) : 0);
  return kPerWarp * static_cast<std::size_t>(warps);
}

template <class T, class Epilogue, class Norm = AsTheyAre>
void launch(cudaStream_t stream, const Args<T>& a, const Epilogue& epilogue,
            const Norm& norm = {}) {
  const int warps = warps_of<T>(a.depth);
  visit_sizes(a, norm, [&]<int kTiles, int kRows>() {
    launch_overlapped(product_kernel<T, kTiles, kRows, Epilogue, Norm>,
                      dim3(blocks_of<kTiles>(a.columns), groups_of<kRows>(a.rows)),
                      static_cast<unsigned>(32 * warps), shared_of<kTiles, kRows, Norm>(warps),
                      stream, a, epilogue, norm);
  });
}

/// Both products of a.x, which is b.x.
template <class T, class First, class Second, class Norm = AsTheyAre>
void launch_pair(cudaStream_t stream, const Args<T>& a, const First& first, const Args<T>& b,
                 const Second& second, const Norm& norm = {}) {
  const int warps = warps_of<T>(a.depth);
  visit_sizes(a, norm, [&]<int kTiles, int kRows>() {
    const unsigned first_blocks = blocks_of<kTiles>(a.columns);
    launch_overlapped(product_pair_kernel<T, kTiles, kRows, First, Second, Norm>,
                      dim3(first_blocks + blocks_of<kTiles>(b.columns), groups_of<kRows>(a.rows)),
                      static_cast<unsigned>(32 * warps), shared_of<kTiles, kRows, Norm>(warps),
                      stream, a, first, b, second, static_cast<int>(first_blocks), norm);
  });
}

}  // namespace lrnn::cuda::few_rows
