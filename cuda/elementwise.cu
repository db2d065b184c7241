// Copies, conversions, sums and masks. All are bound by HBM: 16-byte accesses where rows allow it.
#include "lrnn/ops/elementwise.hpp"

#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

template <class From, class To, int N>
struct CastVector {
  DeviceRows<const From> src;
  DeviceRows<To> dst;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    float v[N];
    load_vec<From, N>(src.row(r) + c, v);
    store_vec<To, N>(dst.row(r) + c, v);
  }
};

template <class From, class To, int N>
struct AddVector {
  DeviceRows<const From> src;
  DeviceRows<To> dst;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    float v[N];
    float sum[N];
    load_vec<From, N>(src.row(r) + c, v);
    load_vec<To, N>(dst.row(r) + c, sum);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += v[i];
    store_vec<To, N>(dst.row(r) + c, sum);
  }
};

template <class T, int N>
struct ScaleVector {
  DeviceRows<const T> src;
  const float* scale;
  DeviceRows<T> dst;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    float v[N];
    load_vec<T, N>(src.row(r) + c, v);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= scale[c + i];
    store_vec<T, N>(dst.row(r) + c, v);
  }
};

template <class T>
struct MaskElement {
  T* x;
  const std::int32_t* lengths;
  std::int64_t seqlen;
  std::int64_t width;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    if (r % seqlen >= lengths[r / seqlen]) x[r * width + c] = from_float<T>(0.0F);
  }
};

template <class T>
struct FillElement {
  T* x;
  T value;
  __device__ void operator()(std::int64_t r, std::int64_t) const { x[r] = value; }
};

// Launches Functor<From, To, N> with the widest N that both operands allow.
template <template <class, class, int> class Functor, class From, class To>
void launch_pair(Context& ctx, TensorView src, MutableTensorView dst) {
  constexpr int wide = kWide<From> < kWide<To> ? kWide<From> : kWide<To>;
  const auto s = device_rows<From>(src);
  const auto d = device_rows<To>(dst);
  const std::int64_t rows = detail::row_count(src);
  const std::int64_t width = src.dim(-1);
  const cudaStream_t stream = ctx.stream().handle;
  if (allows_vectors(s.data, width, s.stride, wide) &&
      allows_vectors(d.data, width, d.stride, wide))
    for_each_vector<wide>(stream, rows, width, Functor<From, To, wide>{s, d});
  else
    for_each_vector<1>(stream, rows, width, Functor<From, To, 1>{s, d});
}

/// Rows summed by one block of the first stage; a constant, so that the order of sums is fixed.
constexpr int kSumRows = 128;
constexpr int kSumColumns = 64;
constexpr int kSumThreads = 256;

// Block (i, j) sums rows [j kSumRows, ...) of columns [i kSumColumns, ...): four threads a column.
template <class T>
__global__ __launch_bounds__(kSumThreads) void sum_columns_kernel(DeviceRows<const T> a,
                                                                  DeviceRows<const T> b,
                                                                  std::int64_t rows, int width,
                                                                  float* __restrict__ partial) {
  __shared__ float sums[kSumThreads];
  const int lane = static_cast<int>(threadIdx.x) % kSumColumns;
  const int part = static_cast<int>(threadIdx.x) / kSumColumns;
  constexpr int kParts = kSumThreads / kSumColumns;
  const int c = static_cast<int>(blockIdx.x) * kSumColumns + lane;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kSumRows;
  const std::int64_t last = min(rows, first + kSumRows);
  float sum = 0.0F;
  if (c < width)
    for (std::int64_t r = first + part; r < last; r += kParts) {
      const float v = to_float(a.row(r)[c]);
      sum = b.data != nullptr ? fmaf(v, to_float(b.row(r)[c]), sum) : sum + v;
    }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (part == 0 && c < width) {
    for (int p = 1; p < kParts; ++p) sum += sums[p * kSumColumns + lane];
    partial[static_cast<std::int64_t>(blockIdx.y) * width + c] = sum;
  }
}

// One warp per column adds the partial sums: lanes in strides, then a butterfly.
__global__ __launch_bounds__(kSumThreads) void add_partials_kernel(
    const float* __restrict__ partial, std::int64_t count, int width, float* __restrict__ out) {
  const int column =
      static_cast<int>((static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (column >= width) return;
  float sum = 0.0F;
  for (std::int64_t i = lane; i < count; i += 32) sum += partial[i * width + column];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFU, sum, offset);
  if (lane == 0) out[column] += sum;
}

// Folds groups of kSumRows partial rows into one, until few remain.
__global__ __launch_bounds__(kSumThreads) void fold_partials_kernel(const float* __restrict__ in,
                                                                    std::int64_t count, int width,
                                                                    float* __restrict__ out) {
  const int c = static_cast<int>(blockIdx.x) * kSumThreads + static_cast<int>(threadIdx.x);
  if (c >= width) return;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kSumRows;
  const std::int64_t last = min(count, first + kSumRows);
  float sum = 0.0F;
  for (std::int64_t r = first; r < last; ++r) sum += in[r * width + c];
  out[static_cast<std::int64_t>(blockIdx.y) * width + c] = sum;
}

constexpr int kTransposeTile = 32;

// A block owns a tile of every gridDim.y-th row of tiles of dst, read and written along rows.
template <class From, class To>
__global__ __launch_bounds__(kElementThreads) void transpose_kernel(DeviceRows<const From> src,
                                                                    DeviceRows<To> dst,
                                                                    std::int64_t rows,
                                                                    std::int64_t columns) {
  constexpr int kStep = kElementThreads / kTransposeTile;
  __shared__ float tile[kTransposeTile][kTransposeTile + 1];
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % kTransposeTile;
  const int first = static_cast<int>(threadIdx.x) / kTransposeTile;
  const std::int64_t c0 = static_cast<std::int64_t>(blockIdx.x) * kTransposeTile;
  for (std::int64_t r0 = static_cast<std::int64_t>(blockIdx.y) * kTransposeTile; r0 < rows;
       r0 += static_cast<std::int64_t>(gridDim.y) * kTransposeTile) {
#pragma unroll
    for (int i = first; i < kTransposeTile; i += kStep)
      if (c0 + i < columns && r0 + lane < rows)
        tile[i][lane] = to_float(src.row(c0 + i)[r0 + lane]);
    __syncthreads();
#pragma unroll
    for (int i = first; i < kTransposeTile; i += kStep)
      if (r0 + i < rows && c0 + lane < columns)
        dst.row(r0 + i)[c0 + lane] = from_float<To>(tile[lane][i]);
    __syncthreads();
  }
}

constexpr int kBackLanes = 32;
constexpr int kBackParts = kSumThreads / kBackLanes;

// Block (i, j) owns rows [j kSumRows, ...) and kBackLanes vectors of columns: a warp walks every
// kBackParts-th row. dx may be dy.
template <class T, int N>
__global__ __launch_bounds__(kSumThreads) void scale_columns_backward_kernel(
    DeviceRows<const T> dy, DeviceRows<const T> x, const float* __restrict__ scale,
    DeviceRows<T> dx, std::int64_t rows, int width, float* __restrict__ partial) {
  static_assert(kBackLanes * N <= kSumThreads, "one thread per column adds up the parts");
  __shared__ float sums[kBackParts][kBackLanes * N];
  const int lane = static_cast<int>(threadIdx.x) % kBackLanes;
  const int part = static_cast<int>(threadIdx.x) / kBackLanes;
  const int begin = static_cast<int>(blockIdx.x) * kBackLanes * N;
  const int c = begin + lane * N;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kSumRows;
  const std::int64_t last = min(rows, first + kSumRows);
  float sum[N] = {};
  if (c < width) {
    float factor[N];
#pragma unroll
    for (int i = 0; i < N; ++i) factor[i] = scale[c + i];
    for (std::int64_t r = first + part; r < last; r += kBackParts) {
      float d[N];
      float v[N];
      load_vec<T, N>(dy.row(r) + c, d);
      load_vec<T, N>(x.row(r) + c, v);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[i] = fmaf(d[i], v[i], sum[i]);
        d[i] *= factor[i];
      }
      store_vec<T, N>(dx.row(r) + c, d);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sums[part][lane * N + i] = sum[i];
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kBackLanes * N || begin + i >= width) return;
  float total = sums[0][i];
  for (int p = 1; p < kBackParts; ++p) total += sums[p][i];
  partial[static_cast<std::int64_t>(blockIdx.y) * width + begin + i] = total;
}

// out += column sums over `rows` rows. make_partials(first, rows, partial) launches the first stage
// for some of them, which writes a row of sums per kSumRows rows. Rows beyond the limit of the grid
// are summed in further launches, in order.
template <class MakePartials>
void add_column_sums(Context& ctx, std::int64_t rows, int width, float* out,
                     MakePartials&& make_partials) {
  const cudaStream_t stream = ctx.stream().handle;
  constexpr std::int64_t kMaxGridY = 32768;
  for (std::int64_t done = 0; done < rows;) {
    const std::int64_t now = std::min(rows - done, kMaxGridY * kSumRows);
    std::int64_t count = (now + kSumRows - 1) / kSumRows;
    Tensor partial = ctx.empty({count, width}, DType::float32);
    make_partials(done, now, partial.view().data<float>());
    LRNN_CUDA_CHECK_LAUNCH();
    if (count > 4 * kSumRows) {
      const std::int64_t folded = (count + kSumRows - 1) / kSumRows;
      Tensor next = ctx.empty({folded, width}, DType::float32);
      fold_partials_kernel<<<dim3(static_cast<unsigned>((width + kSumThreads - 1) / kSumThreads),
                                  static_cast<unsigned>(folded)),
                             kSumThreads, 0, stream>>>(partial.view().data<float>(), count, width,
                                                       next.view().data<float>());
      LRNN_CUDA_CHECK_LAUNCH();
      partial = std::move(next);
      count = folded;
    }
    const auto blocks = static_cast<unsigned>(
        (static_cast<std::int64_t>(width) * 32 + kSumThreads - 1) / kSumThreads);
    add_partials_kernel<<<blocks, kSumThreads, 0, stream>>>(partial.view().data<float>(), count,
                                                            width, out);
    LRNN_CUDA_CHECK_LAUNCH();
    done += now;
  }
}

// The blocks of a first stage with `columns` columns each.
dim3 partial_blocks(std::int64_t rows, int width, int columns) {
  return {static_cast<unsigned>((width + columns - 1) / columns),
          static_cast<unsigned>((rows + kSumRows - 1) / kSumRows)};
}
template <class T>
DeviceRows<T> rows_from(DeviceRows<T> rows, std::int64_t first) {
  return {rows.data == nullptr ? nullptr : rows.data + first * rows.stride, rows.stride};
}

template <class T>
void sum_columns_of(Context& ctx, const SumColumns& a) {
  const auto width = static_cast<int>(a.a.dim(-1));
  const auto A = device_rows<T>(a.a);
  const auto B = a.b ? device_rows<T>(a.b) : DeviceRows<const T>{nullptr, 0};
  add_column_sums(
      ctx, detail::row_count(a.a), width, a.out.data<float>(),
      [&](std::int64_t first, std::int64_t rows, float* partial) {
        sum_columns_kernel<T>
            <<<partial_blocks(rows, width, kSumColumns), kSumThreads, 0, ctx.stream().handle>>>(
                rows_from(A, first), rows_from(B, first), rows, width, partial);
      });
}

template <class T, int N>
void scale_columns_backward_of(Context& ctx, const ScaleColumnsBackward& a) {
  const auto width = static_cast<int>(a.dy.dim(-1));
  const auto dy = device_rows<T>(a.dy);
  const auto x = device_rows<T>(a.x);
  const auto dx = device_rows<T>(a.dx);
  add_column_sums(
      ctx, detail::row_count(a.dy), width, a.dscale.data<float>(),
      [&](std::int64_t first, std::int64_t rows, float* partial) {
        scale_columns_backward_kernel<T, N>
            <<<partial_blocks(rows, width, kBackLanes * N), kSumThreads, 0, ctx.stream().handle>>>(
                rows_from(dy, first), rows_from(x, first), a.scale.data<float>(),
                rows_from(dx, first), rows, width, partial);
      });
}

}  // namespace

void cast(Context& ctx, const Cast& a) {
  visit_float("cast", a.src.dtype(), [&]<class From>() {
    visit_float("cast", a.dst.dtype(),
                [&]<class To>() { launch_pair<CastVector, From, To>(ctx, a.src, a.dst); });
  });
}

void transpose(Context& ctx, const Transpose& a) {
  visit_float("transpose", a.src.dtype(), [&]<class From>() {
    visit_float("transpose", a.dst.dtype(), [&]<class To>() {
      const std::int64_t rows = a.dst.dim(0);
      const std::int64_t columns = a.dst.dim(1);
      const auto tiles = [](std::int64_t n) { return (n + kTransposeTile - 1) / kTransposeTile; };
      launch_overlapped(transpose_kernel<From, To>,
                        dim3(static_cast<unsigned>(tiles(columns)),
                             static_cast<unsigned>(std::min<std::int64_t>(tiles(rows), 1 << 14))),
                        kElementThreads, 0, ctx.stream().handle, device_rows<From>(a.src),
                        device_rows<To>(a.dst), rows, columns);
    });
  });
}

void add_to(Context& ctx, const AddTo& a) {
  visit_float("add_to", a.src.dtype(), [&]<class From>() {
    visit_float("add_to", a.dst.dtype(),
                [&]<class To>() { launch_pair<AddVector, From, To>(ctx, a.src, a.dst); });
  });
}

void fill(Context& ctx, const Fill& a) {
  const auto set = [&]<class T>(T value) {
    for_each_vector<1>(ctx.stream().handle, a.dst.numel(), 1,
                       FillElement<T>{a.dst.data<T>(), value});
  };
  switch (a.dst.dtype()) {
    case DType::int32:
      return set(static_cast<std::int32_t>(a.value));
    case DType::int64:
      return set(static_cast<std::int64_t>(a.value));
    default:
      visit_float("fill", a.dst.dtype(), [&]<class T>() {
        if constexpr (std::is_same_v<T, float>)
          set(static_cast<float>(a.value));
        else
          set(__float2bfloat16_rn(static_cast<float>(a.value)));
      });
  }
}

void mask_padding(Context& ctx, const MaskPadding& a) {
  visit_float("mask_padding", a.x.dtype(), [&]<class T>() {
    const std::int64_t rows = a.x.dim(0) * a.x.dim(1);
    const std::int64_t width = a.x.numel() / rows;
    for_each_vector<1>(
        ctx.stream().handle, rows, width,
        MaskElement<T>{a.x.data<T>(), a.lengths.data<std::int32_t>(), a.x.dim(1), width});
  });
}

void scale_columns(Context& ctx, const ScaleColumns& a) {
  visit_float("scale_columns", a.src.dtype(), [&]<class T>() {
    constexpr int wide = kWide<T>;
    const auto s = device_rows<T>(a.src);
    const auto d = device_rows<T>(a.dst);
    const float* const scale = a.scale.data<float>();
    const std::int64_t rows = detail::row_count(a.src);
    const std::int64_t width = a.src.dim(-1);
    const cudaStream_t stream = ctx.stream().handle;
    if (allows_vectors(s.data, width, s.stride, wide) &&
        allows_vectors(d.data, width, d.stride, wide))
      for_each_vector<wide>(stream, rows, width, ScaleVector<T, wide>{s, scale, d});
    else
      for_each_vector<1>(stream, rows, width, ScaleVector<T, 1>{s, scale, d});
  });
}

void scale_columns_backward(Context& ctx, const ScaleColumnsBackward& a) {
  visit_float("scale_columns_backward", a.dy.dtype(), [&]<class T>() {
    constexpr int wide = kWide<T>;
    const std::int64_t width = a.dy.dim(-1);
    const auto vectors = [&](const auto& rows) {
      return allows_vectors(rows.data, width, rows.stride, wide);
    };
    if (vectors(device_rows<T>(a.dy)) && vectors(device_rows<T>(a.x)) &&
        vectors(device_rows<T>(a.dx)))
      scale_columns_backward_of<T, wide>(ctx, a);
    else
      scale_columns_backward_of<T, 1>(ctx, a);
  });
}

void sum_columns(Context& ctx, const SumColumns& a) {
  visit_float("sum_columns", a.a.dtype(), [&]<class T>() { sum_columns_of<T>(ctx, a); });
}

}  // namespace lrnn::cuda
