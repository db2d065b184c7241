// Rotation of query and key heads in place. Bound by HBM: one read and one write per element.
#include <algorithm>
#include <cmath>

#include "lrnn/ops/rotary.hpp"

#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 8;  // of one block: they share the frequencies

template <class T>
struct RotaryArgs {
  DeviceRows<T> x;
  std::int64_t rows;
  std::int64_t seqlen;
  const std::int32_t* positions;
  const std::int32_t* position_ids;
  int heads, head_dim, dim;
  double log2_base;
  float direction;  // 1 or -1

  __device__ std::int64_t position(std::int64_t r) const {
    if (position_ids != nullptr) return position_ids[r];
    return r % seqlen + (positions != nullptr ? positions[r / seqlen] : 0);
  }
};

// One block owns kTokens rows. First its threads tabulate cosine and sine of every angle in turns,
// reduced in double, for all heads at once; then each thread rotates kPairs neighbouring pairs of a
// head at a time.
template <class T, int kPairs, bool kInterleaved>
__global__ __launch_bounds__(kThreads) void rotary_kernel(RotaryArgs<T> a) {
  extern __shared__ float2 table[];      // [kTokens, dim / 2]: cosine, sine
  constexpr bool kScalar = kPairs == 1;  // heads may start at any element
  const int half = a.dim / 2;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTokens;
  const int tokens = static_cast<int>(min(static_cast<std::int64_t>(kTokens), a.rows - first));
  for (int j = static_cast<int>(threadIdx.x); j < half; j += kThreads) {
    constexpr double kTurnsPerRadian = 0.15915494309189533577;
    const double turns =
        exp2(-2.0 * static_cast<double>(j) / static_cast<double>(a.dim) * a.log2_base) *
        kTurnsPerRadian;
    for (int t = 0; t < tokens; ++t) {
      const double angle = static_cast<double>(a.position(first + t)) * turns;
      float sine, cosine;
      sincospif(2.0F * static_cast<float>(angle - rint(angle)), &sine, &cosine);
      table[t * half + j] = {cosine, a.direction * sine};
    }
  }
  __syncthreads();
  const int groups = half / kPairs;  // per head
  const int items = a.heads * groups;
  for (int t = 0; t < tokens; ++t) {
    T* const row = a.x.row(first + t);
    for (int i = static_cast<int>(threadIdx.x); i < items; i += kThreads) {
      const int j = i % groups * kPairs;
      T* const head = row + static_cast<std::int64_t>(i / groups) * a.head_dim;
      const float2* const angles = table + t * half + j;
      // Pair p is (v[p], v[kPairs + p]), or (v[2 p], v[2 p + 1]) if interleaved.
      float v[2 * kPairs];
      float out[2 * kPairs];
      if constexpr (kScalar) {
        v[0] = to_float(head[kInterleaved ? 2 * j : j]);
        v[1] = to_float(head[kInterleaved ? 2 * j + 1 : half + j]);
      } else if constexpr (kInterleaved) {
        load_vec<T, 2 * kPairs>(head + 2 * j, v);
      } else {
        float(&low)[kPairs] = *reinterpret_cast<float(*)[kPairs]>(v);
        float(&high)[kPairs] = *reinterpret_cast<float(*)[kPairs]>(v + kPairs);
        load_vec<T, kPairs>(head + j, low);
        load_vec<T, kPairs>(head + half + j, high);
      }
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int u = kInterleaved ? 2 * p : p;
        const int w = kInterleaved ? 2 * p + 1 : kPairs + p;
        const float2 angle = angles[p];
        out[u] = fmaf(v[u], angle.x, -v[w] * angle.y);
        out[w] = fmaf(v[u], angle.y, v[w] * angle.x);
      }
      if constexpr (kScalar) {
        head[kInterleaved ? 2 * j : j] = from_float<T>(out[0]);
        head[kInterleaved ? 2 * j + 1 : half + j] = from_float<T>(out[1]);
      } else if constexpr (kInterleaved) {
        store_vec<T, 2 * kPairs>(head + 2 * j, out);
      } else {
        float(&low)[kPairs] = *reinterpret_cast<float(*)[kPairs]>(out);
        float(&high)[kPairs] = *reinterpret_cast<float(*)[kPairs]>(out + kPairs);
        store_vec<T, kPairs>(head + j, low);
        store_vec<T, kPairs>(head + half + j, high);
      }
    }
  }
}

template <class T, int kPairs, bool kInterleaved>
void launch(Context& ctx, const RotaryArgs<T>& a) {
  const std::size_t shared = sizeof(float2) * kTokens * static_cast<std::size_t>(a.dim / 2);
  const auto kernel = rotary_kernel<T, kPairs, kInterleaved>;
  allow_shared(kernel, shared);
  const auto blocks = static_cast<unsigned>((a.rows + kTokens - 1) / kTokens);
  kernel<<<blocks, kThreads, shared, ctx.stream().handle>>>(a);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, bool kInterleaved>
void launch_widest(Context& ctx, const RotaryArgs<T>& a) {
  constexpr int kPairs = kInterleaved ? kWide<T> / 2 : kWide<T>;
  const int width = kWide<T>;
  if (allows_vectors(a.x.data, a.head_dim, a.x.stride, width) && a.dim / 2 % kPairs == 0)
    launch<T, kPairs, kInterleaved>(ctx, a);
  else
    launch<T, 1, kInterleaved>(ctx, a);
}

}  // namespace

void rotary(Context& ctx, const Rotary& a) {
  visit_float("rotary", a.x.dtype(), [&]<class T>() {
    const RotaryArgs<T> args{
        .x = device_rows<T>(a.x),
        .rows = detail::row_count(a.x),
        .seqlen = a.x.dim(1),
        .positions = a.positions ? a.positions.data<std::int32_t>() : nullptr,
        .position_ids = a.position_ids ? a.position_ids.data<std::int32_t>() : nullptr,
        .heads = static_cast<int>(a.x.dim(2) / a.head_dim),
        .head_dim = static_cast<int>(a.head_dim),
        .dim = static_cast<int>(a.dim),
        .log2_base = std::log2(a.base),
        .direction = a.inverse ? -1.0F : 1.0F};
    if (a.interleaved)
      launch_widest<T, true>(ctx, args);
    else
      launch_widest<T, false>(ctx, args);
  });
}

}  // namespace lrnn::cuda
