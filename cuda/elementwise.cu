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

template <class T>
void sum_columns_of(Context& ctx, const SumColumns& a) {
  const cudaStream_t stream = ctx.stream().handle;
  const auto width = static_cast<int>(a.a.dim(-1));
  const auto blocks_x = static_cast<unsigned>((width + kSumColumns - 1) / kSumColumns);
  constexpr std::int64_t kMaxGridY = 32768;
  const auto A = device_rows<T>(a.a);
  const auto B = a.b ? device_rows<T>(a.b) : DeviceRows<const T>{nullptr, 0};
  // Rows beyond the limit of the grid are summed in further launches, in order.
  for (std::int64_t done = 0, rows = detail::row_count(a.a); done < rows;) {
    const std::int64_t now = std::min(rows - done, kMaxGridY * kSumRows);
    std::int64_t count = (now + kSumRows - 1) / kSumRows;
    Tensor partial = ctx.empty({count, width}, DType::float32);
    sum_columns_kernel<T><<<dim3(blocks_x, static_cast<unsigned>(count)), kSumThreads, 0, stream>>>(
        {A.data + done * A.stride, A.stride},
        {B.data != nullptr ? B.data + done * B.stride : nullptr, B.stride}, now, width,
        partial.view().data<float>());
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
                                                            width, a.out.data<float>());
    LRNN_CUDA_CHECK_LAUNCH();
    done += now;
  }
}

}  // namespace

void cast(Context& ctx, const Cast& a) {
  visit_float("cast", a.src.dtype(), [&]<class From>() {
    visit_float("cast", a.dst.dtype(),
                [&]<class To>() { launch_pair<CastVector, From, To>(ctx, a.src, a.dst); });
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

void sum_columns(Context& ctx, const SumColumns& a) {
  visit_float("sum_columns", a.a.dtype(), [&]<class T>() { sum_columns_of<T>(ctx, a); });
}

}  // namespace lrnn::cuda
