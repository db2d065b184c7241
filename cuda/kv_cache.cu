// Copies between a chunk of rows and a cache at positions kept on the device. One thread per 16
// bytes (or per element if rows are not aligned); bound by HBM. Rows outside the cache are skipped.
#include "lrnn/ops/kv_cache.hpp"

#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

/// Which row of the cache belongs to a row of the chunk.
struct Slots {
  const std::int32_t* positions;
  const std::int32_t* lengths;
  std::int64_t seqlen, slots;

  /// -1 for padding and for rows outside the cache.
  __device__ std::int64_t of(std::int64_t row) const {
    const std::int64_t b = row / seqlen;
    const std::int64_t t = row - b * seqlen;
    const std::int64_t slot = positions[b] + t;
    const bool valid = (lengths == nullptr || t < lengths[b]) && slot >= 0 && slot < slots;
    return valid ? b * slots + slot : -1;
  }
};

template <class T, int N>
struct AppendVector {
  Slots slots;
  DeviceRows<const T> src;
  DeviceRows<T> cache;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    const std::int64_t slot = slots.of(r);
    if (slot >= 0)
      *reinterpret_cast<Vec<T, N>*>(cache.row(slot) + c) =
          *reinterpret_cast<const Vec<T, N>*>(src.row(r) + c);
  }
};

template <class T, int N>
struct ReadVector {
  Slots slots;
  DeviceRows<const T> cache;
  DeviceRows<T> dst;
  bool accumulate;
  __device__ void operator()(std::int64_t r, std::int64_t c) const {
    const std::int64_t slot = slots.of(r);
    if (slot < 0 && accumulate) return;
    float value[N] = {};
    if (slot >= 0) load_vec<T, N>(cache.row(slot) + c, value);
    if (accumulate) {
      float old[N];
      load_vec<T, N>(dst.row(r) + c, old);
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] += old[i];
    }
    store_vec<T, N>(dst.row(r) + c, value);
  }
};

template <class Args>
Slots slots_of(const Args& a, TensorView chunk) {
  return {a.positions.template data<std::int32_t>(),
          a.lengths ? a.lengths.template data<std::int32_t>() : nullptr, chunk.dim(1),
          a.cache.dim(1)};
}

__global__ void advance_kernel(std::int32_t* positions, const std::int32_t* lengths,
                               std::int32_t seqlen, std::int64_t batch) {
  const std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b < batch) positions[b] += lengths != nullptr ? lengths[b] : seqlen;
}

template <class T, class U>
bool takes_vectors(const DeviceRows<T>& a, const DeviceRows<U>& b, std::int64_t width, int n) {
  return allows_vectors(a.data, width, a.stride, n) && allows_vectors(b.data, width, b.stride, n);
}

}  // namespace

void kv_cache_append(Context& ctx, const KvCacheAppend& a) {
  visit_float("kv_cache_append", a.src.dtype(), [&]<class T>() {
    const Slots slots = slots_of(a, a.src);
    const auto src = device_rows<T>(a.src);
    const auto cache = device_rows<T>(a.cache);
    const std::int64_t width = a.src.dim(2);
    const std::int64_t rows = a.src.dim(0) * a.src.dim(1);
    const cudaStream_t stream = ctx.stream().handle;
    constexpr int n = kWide<T>;
    if (takes_vectors(src, cache, width, n))
      for_each_vector<n, true>(stream, rows, width, AppendVector<T, n>{slots, src, cache});
    else
      for_each_vector<1, true>(stream, rows, width, AppendVector<T, 1>{slots, src, cache});
  });
}

void kv_cache_read(Context& ctx, const KvCacheRead& a) {
  visit_float("kv_cache_read", a.dst.dtype(), [&]<class T>() {
    const Slots slots = slots_of(a, a.dst);
    const auto cache = device_rows<T>(a.cache);
    const auto dst = device_rows<T>(a.dst);
    const std::int64_t width = a.dst.dim(2);
    const std::int64_t rows = a.dst.dim(0) * a.dst.dim(1);
    const cudaStream_t stream = ctx.stream().handle;
    constexpr int n = kWide<T>;
    if (takes_vectors(cache, dst, width, n))
      for_each_vector<n, true>(stream, rows, width,
                               ReadVector<T, n>{slots, cache, dst, a.accumulate});
    else
      for_each_vector<1, true>(stream, rows, width,
                               ReadVector<T, 1>{slots, cache, dst, a.accumulate});
  });
}

void advance_positions(Context& ctx, const AdvancePositions& a) {
  const std::int64_t batch = a.positions.numel();
  constexpr int threads = 128;
  advance_kernel<<<static_cast<unsigned>((batch + threads - 1) / threads), threads, 0,
                   ctx.stream().handle>>>(a.positions.data<std::int32_t>(),
                                          a.lengths ? a.lengths.data<std::int32_t>() : nullptr,
                                          static_cast<std::int32_t>(a.seqlen), batch);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
