// Products of little depth on Hopper that start from a skip connection: y = x W^T + scale o skip.
//
// A block keeps kColumns columns of W, all of their depth, in shared memory. Each of its
// warpgroups by itself walks tiles of 64 rows: skip is read straight into the accumulators, x
// straight into A fragments, warpgroup products add, and the accumulators go to y. Nothing is
// staged: numbers of one row that a thread reads or writes together are neighbours, because the
// order of the depth and of the columns within 16 is that of the packed W. While one warpgroup
// multiplies, the others wait for memory.
// Bound by memory: skip, y and, for the sums, the other operand once each, x once and from L2 by
// every further block of columns. 65536 x 768 x 128 in TF32 on an H200, cold L2: 132 us, 3.3 TB/s
// or 79 % of a copy; with sums 200 us, 3.2 TB/s; the two ops it stands for take 270 and 320.
// That is 29 us per 16384 rows and 16 us until W is packed and the first tiles have come.
#include "lrnn/ops/elementwise.hpp"

#include "common/linear_skip_sm90.cuh"
#include "common/wgmma_wide.cuh"

namespace lrnn::cuda::linear_skip {
namespace {

constexpr int kTileRows = 64;
constexpr int kMaxBlocks = 132;  // one for each SM of an H200; sums are cut into as many parts

/// Compile-time sizes: panels of the depth that are read at once, and how often.
template <class T_, int kPanels_, int kPasses_, bool kAcross_, bool kSums_>
struct Tile {
  using T = T_;
  static constexpr int kTiles = 16;
  static constexpr int kPanels = kPanels_;
  static constexpr int kPasses = kPasses_;
  static constexpr int kGroups = kSums_ || kPasses > 1 ? 2 : 3;  // as registers allow
  static constexpr bool kAcross = kAcross_;                      // whether W is [depth, columns]
  static constexpr bool kSums = kSums_;
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kQuads = kColumns / 16;  // groups of four neighbouring columns of a thread
  static constexpr int kThreads = kWarpgroup * kGroups;
  static constexpr int kPanelBytes = kColumns * kPanelRowBytes;

  /// The packed W, scale, and sums of warps.
  static constexpr int kWeightBytes = kPasses * kPanels * kPanelBytes;
  static constexpr int kShared =
      1024 + kWeightBytes + 4 * kColumns * (1 + (kSums ? 4 * kGroups : 0));
};

template <class T>
struct Args {
  DeviceRows<const T> x, skip, other;
  DeviceRows<T> y;
  DeviceRows<const T> weight;
  const float* scale;
  float* partial;  // [blocks of rows, columns]
  std::int64_t rows;
  int columns, depth;
};

/// Where number k of a column of W lies. A thread reads 16 bytes of a row of x, four words of
/// depth: those are the words that it owns in the halves of two steps.
template <class Z>
__device__ __forceinline__ int weight_at(int column, int k) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(typename Z::T));
  const int word = k / kPerWord % 32;
  const int chunk = word / 16 * 4 + word % 4;
  const int row = column / 16 * 16 + column % 4 / 2 * 8 + column % 16 / 4 * 2 + column % 2;
  return k / kPerWord / 32 * Z::kPanelBytes + row * kPanelRowBytes + ((chunk ^ (row & 7)) << 4) +
         word % 16 / 4 * 4 + k % kPerWord * static_cast<int>(sizeof(typename Z::T));
}

/// What a thread packs at a time: four numbers from (column, k) on, along k or, if kAcross, along
/// columns. A warp reads 8 rows of 64 bytes: few of what it then writes meets in one bank.
template <class Z>
struct Piece {
  static constexpr int kCount =
      Z::kColumns / 4 * Z::kPasses * Z::kPanels * kPanelColumns<typename Z::T>;
  int column, k;

  __device__ __forceinline__ explicit Piece(int i) {
    constexpr int kPerLot = Z::kColumns / 8;  // warps' turns for all columns and 16 of depth
    const int along = i % 4 * 4;
    const int beside = i / 4 % 8;
    const int turn = i / 32 % kPerLot;
    const int lot = i / 32 / kPerLot * 16;
    column = Z::kAcross ? turn / 2 * 16 + along : turn * 8 + beside;
    k = Z::kAcross ? lot + turn % 2 * 8 + beside : lot + along;
  }
};

/// W, zero beyond its columns and depth.
template <class Z, class T>
__device__ __forceinline__ void pack_weight(const Args<T>& a, unsigned char* packed, int first) {
  constexpr int kAtOnce = 8;
  for (int begin = static_cast<int>(threadIdx.x); begin < Piece<Z>::kCount;
       begin += kAtOnce * Z::kThreads) {
    Packed<T, 4> v[kAtOnce];
    // The last piece again rather than none: without branches the loads are in flight together.
    const auto piece = [&](int j) {
      return Piece<Z>(min(begin + j * Z::kThreads, Piece<Z>::kCount - 1));
    };
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int column = min(first + piece(j).column, a.columns - (Z::kAcross ? 4 : 1));
      const int k = min(piece(j).k, a.depth - (Z::kAcross ? 1 : 4));
      v[j].load(Z::kAcross ? a.weight.row(k) + column : a.weight.row(column) + k);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const bool exists = first + piece(j).column < a.columns && piece(j).k < a.depth;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float number = exists ? v[j].get(e) : 0.0F;
        const int at = Z::kAcross ? weight_at<Z>(piece(j).column + e, piece(j).k)
                                  : weight_at<Z>(piece(j).column, piece(j).k + e);
        *reinterpret_cast<T*>(packed + at) =
            from_float<T>(sizeof(T) == 4 ? round_tf32(number) : number);
      }
    }
  }
  fence_shared_async();
}

/// What a thread owns: two rows of the tile, and of every 16 columns, or words of x, four.
struct Seat {
  std::int64_t row[2];  // to read: the last one, if there are no more
  bool exists[2];
  int first;   // of the four
  int column;  // of y

  __device__ __forceinline__ Seat(std::int64_t tile, std::int64_t rows, int first_column)
      : first(static_cast<int>(threadIdx.x) % 4 * 4), column(first_column + first) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = tile * kTileRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
      exists[half] = row[half] < rows;
      row[half] = min(row[half], rows - 1);
    }
  }
};

/// The thread's columns of its rows, zero beyond the last.
template <class Z, class T>
__device__ __forceinline__ void load_columns(Packed<T, 4> (&v)[Z::kQuads][2], const Args<T>& a,
                                             const DeviceRows<const T>& from, const Seat& at) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* const row = from.row(at.row[half]) + at.column;
#pragma unroll
    for (int q = 0; q < Z::kQuads; ++q) {
      v[q][half] = {};
      if (at.column + 16 * q < a.columns) v[q][half].load(row + 16 * q);
    }
  }
}

/// The depth of panels [panel, panel + kPanels) of the thread's rows of x.
template <class Z, class T>
__device__ __forceinline__ void load_fragments(std::uint32_t (&x)[Z::kPanels][kPanelSteps][4],
                                               const Args<T>& a, const Seat& at, int panel) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* const row = a.x.row(at.row[half]);
#pragma unroll
    for (int p = 0; p < Z::kPanels; ++p)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int k = ((panel + p) * 32 + pair * 16 + at.first) * kPerWord;
        Packed<T, 4 * kPerWord> v{};
        if (k < a.depth) v.load(row + k);
#pragma unroll
        for (int w = 0; w < 4; ++w) x[p][2 * pair + w / 2][w % 2 * 2 + half] = v.words[w];
      }
  }
}

/// c += x W^T over those panels; `packed` is the shared address of the first.
template <class Z>
__device__ __forceinline__ void multiply(float (&c)[Z::kTiles][4],
                                         std::uint32_t (&x)[Z::kPanels][kPanelSteps][4],
                                         std::uint32_t packed) {
  if constexpr (sizeof(typename Z::T) == 4)
#pragma unroll
    for (int i = 0; i < Z::kPanels * kPanelSteps * 4; ++i) {
      std::uint32_t& v = x[i / (4 * kPanelSteps)][i / 4 % kPanelSteps][i % 4];
      v = __float_as_uint(round_tf32(__uint_as_float(v)));
    }
  pin(c);
  products_begin();
#pragma unroll
  for (int p = 0; p < Z::kPanels; ++p)
#pragma unroll
    for (int step = 0; step < kPanelSteps; ++step)
      multiply_step<typename Z::T>(
          c, x[p][step],
          advance(panel_descriptor(packed + static_cast<std::uint32_t>(p * Z::kPanelBytes), 16),
                  step * kStepBytes));
  products_commit();
  products_wait<0>();
  pin(c);
}

/// c = scale o skip; `scale` is that of the thread's first column.
template <int kTiles, int kQuads, class T>
__device__ __forceinline__ void start_from(float (&c)[kTiles][4],
                                           const Packed<T, 4> (&skip)[kQuads][2],
                                           const float* scale) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const float4 s = *reinterpret_cast<const float4*>(scale + 16 * q);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      c[2 * q][2 * half] = skip[q][half].get(0) * s.x;
      c[2 * q][2 * half + 1] = skip[q][half].get(1) * s.y;
      c[2 * q + 1][2 * half] = skip[q][half].get(2) * s.z;
      c[2 * q + 1][2 * half + 1] = skip[q][half].get(3) * s.w;
    }
  }
}

template <class Z, class T>
__device__ __forceinline__ void store_tile(const float (&c)[Z::kTiles][4], const Args<T>& a,
                                           const Seat& at) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* const y = a.y.row(at.row[half]) + at.column;
#pragma unroll
    for (int q = 0; q < Z::kQuads; ++q)
      if (at.exists[half] && at.column + 16 * q < a.columns)
        store_packed(y + 16 * q, {c[2 * q][2 * half], c[2 * q][2 * half + 1],
                                  c[2 * q + 1][2 * half], c[2 * q + 1][2 * half + 1]});
  }
}

/// Column sums of a thread's rows, added over the rows of the block into its row of `partial`.
template <class Z>
__device__ __forceinline__ void store_sums(float (&sums)[Z::kQuads][4], float* shared,
                                           float* partial, int first, int columns) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int q = 0; q < Z::kQuads; ++q)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float sum = sums[q][e];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2)
        sum += __shfl_xor_sync(0xFFFFFFFFU, sum, offset);
      if (lane < 4) shared[warp * Z::kColumns + 16 * q + 4 * lane + e] = sum;
    }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= Z::kColumns || first + column >= columns) return;
  float sum = shared[column];
  for (int w = 1; w < 4 * Z::kGroups; ++w) sum += shared[w * Z::kColumns + column];
  partial[static_cast<std::int64_t>(blockIdx.y) * columns + first + column] = sum;
}

template <class Z, class T>
__global__ __launch_bounds__(Z::kThreads, 1) void linear_skip_kernel(Args<T> a) {
  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* const packed = shared + (1024 - shared_address(shared) % 1024) % 1024;
  float* const scale = reinterpret_cast<float*>(packed + Z::kWeightBytes);
  const int first = static_cast<int>(blockIdx.x) * Z::kColumns;
  const int group = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * Z::kGroups + group;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.y) * Z::kGroups;
  pack_weight<Z>(a, packed, first);
  for (int i = static_cast<int>(threadIdx.x); i < Z::kColumns; i += Z::kThreads)
    scale[i] = first + i < a.columns ? a.scale[first + i] : 0.0F;
  __syncthreads();

  const std::int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  float sums[Z::kSums ? Z::kQuads : 1][4] = {};
  for (std::int64_t tile = begin; tile < tiles; tile += step) {
    const Seat at(tile, a.rows, first);
    std::uint32_t x[Z::kPanels][kPanelSteps][4];
    Packed<T, 4> skip[Z::kQuads][2];
    load_columns<Z>(skip, a, a.skip, at);
    if constexpr (Z::kSums) {
      Packed<T, 4> other[Z::kQuads][2];
      load_columns<Z>(other, a, a.other, at);
      load_fragments<Z>(x, a, at, 0);  // all of the tile's loads in flight together
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (at.exists[half])
#pragma unroll
          for (int q = 0; q < Z::kQuads; ++q)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              sums[q][e] = fmaf(skip[q][half].get(e), other[q][half].get(e), sums[q][e]);
    }
    if constexpr (!Z::kSums) load_fragments<Z>(x, a, at, 0);
    float c[Z::kTiles][4];
    start_from(c, skip, scale + at.first);
#pragma unroll
    for (int pass = 0; pass < Z::kPasses; ++pass) {
      const int panel = pass * Z::kPanels;
      if (pass > 0) load_fragments<Z>(x, a, at, panel);
      multiply<Z>(c, x,
                  shared_address(packed) + static_cast<std::uint32_t>(panel * Z::kPanelBytes));
    }
    store_tile<Z>(c, a, at);
  }
  if constexpr (Z::kSums) store_sums<Z>(sums, scale + Z::kColumns, a.partial, first, a.columns);
}

template <class Z, class T>
void launch(Context& ctx, Args<T> a, MutableTensorView dscale) {
  const auto ceil_div = [](std::int64_t n, std::int64_t d) { return (n + d - 1) / d; };
  const std::int64_t across = ceil_div(a.columns, Z::kColumns);
  const std::int64_t down = std::clamp<std::int64_t>(
      ceil_div(a.rows, kTileRows * Z::kGroups), 1, std::max<std::int64_t>(1, kMaxBlocks / across));
  Tensor partial;
  if constexpr (Z::kSums) {
    const Shape sums = {down, static_cast<std::int64_t>(a.columns)};
    partial = ctx.empty(sums, DType::float32);
    a.partial = partial.view().template data<float>();
  }
  const auto kernel = linear_skip_kernel<Z, T>;
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Z::kShared));
  kernel<<<dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), Z::kThreads,
           Z::kShared, ctx.stream().handle>>>(a);
  LRNN_CUDA_CHECK_LAUNCH();
  if constexpr (Z::kSums) lrnn::sum_columns(ctx, {.a = partial, .out = dscale});
}

template <class T>
void run_of(Context& ctx, const Problem& p) {
  const Args<T> args{.x = device_rows<T>(p.x),
                     .skip = device_rows<T>(p.skip),
                     .other = p.other ? device_rows<T>(p.other) : DeviceRows<const T>{},
                     .y = device_rows<T>(p.y),
                     .weight = device_rows<T>(p.weight),
                     .scale = p.scale.data<float>(),
                     .partial = nullptr,
                     .rows = detail::row_count(p.x),
                     .columns = static_cast<int>(p.y.dim(-1)),
                     .depth = static_cast<int>(p.x.dim(-1))};
  const auto with_panels = [&]<int kPanels, int kPasses>() {
    if (p.across)
      launch<Tile<T, kPanels, kPasses, true, true>>(ctx, args, p.dscale);
    else
      launch<Tile<T, kPanels, kPasses, false, false>>(ctx, args, p.dscale);
  };
  constexpr int kPanel = kPanelColumns<T>;
  if (args.depth <= kPanel) return with_panels.template operator()<1, 1>();
  if (args.depth <= 2 * kPanel) return with_panels.template operator()<2, 1>();
  if (args.depth <= 4 * kPanel) return with_panels.template operator()<4, 1>();
  with_panels.template operator()<4, 2>();
}

}  // namespace

void run(Context& ctx, const Problem& p) {
  visit_float("linear_skip", p.x.dtype(), [&]<class T>() { run_of<T>(ctx, p); });
}

}  // namespace lrnn::cuda::linear_skip
