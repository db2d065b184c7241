// Rotation of pairs of head elements, in place. A thread owns one angle, that is one token and one
// pair index, and applies it to all heads: the double-precision angle costs more than a head does.
// Bound by HBM at eight heads and more. Pairs (j, j + dim/2) are coalesced across j.
#include <cmath>

#include "lrnn/ops/rotary.hpp"

#include "common/rows.cuh"

namespace lrnn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr double kTwoPi = 6.283185307179586476925286766559;

template <class T>
struct Rotation {
  DeviceRows<T> x;
  std::int64_t rows, seqlen, width, head_dim, pairs;
  double log2_base_step;  // -log2(base) / pairs
  bool interleaved, inverse;
  const std::int32_t* positions;
  const std::int32_t* position_ids;

  __device__ std::int64_t position(std::int64_t row) const {
    if (position_ids != nullptr) return position_ids[row];
    const std::int64_t b = row / seqlen;
    return row - b * seqlen + (positions != nullptr ? positions[b] : 0);
  }
};

template <class T>
__global__ __launch_bounds__(kThreads) void rotary_kernel(Rotation<T> a) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t row = i / a.pairs;
  if (row >= a.rows) return;
  const std::int64_t j = i - row * a.pairs;
  // 2^(j step), within a few units in the last place of base^(-2 j / dim)
  const double frequency = exp2(static_cast<double>(j) * a.log2_base_step);
  const double angle = static_cast<double>(a.position(row)) * frequency;
  const double reduced = fma(-kTwoPi, rint(angle * (1.0 / kTwoPi)), angle);
  float sine;
  float cosine;
  sincosf(static_cast<float>(reduced), &sine, &cosine);
  if (a.inverse) sine = -sine;
  T* const first = a.x.row(row) + (a.interleaved ? 2 * j : j);
  const std::int64_t other = a.interleaved ? 1 : a.pairs;
#pragma unroll 4
  for (std::int64_t head = 0; head < a.width; head += a.head_dim) {
    const float u = to_float(first[head]);
    const float v = to_float(first[head + other]);
    first[head] = from_float<T>(u * cosine - v * sine);
    first[head + other] = from_float<T>(u * sine + v * cosine);
  }
}

}  // namespace

void rotary(Context& ctx, const Rotary& a) {
  visit_float("rotary", a.x.dtype(), [&]<class T>() {
    const std::int64_t rows = a.x.dim(0) * a.x.dim(1);
    const std::int64_t pairs = a.dim / 2;
    const Rotation<T> rotation{
        .x = device_rows<T>(a.x),
        .rows = rows,
        .seqlen = a.x.dim(1),
        .width = a.x.dim(2),
        .head_dim = a.head_dim,
        .pairs = pairs,
        .log2_base_step = -std::log2(a.base) / static_cast<double>(pairs),
        .interleaved = a.interleaved,
        .inverse = a.inverse,
        .positions = a.positions ? a.positions.data<std::int32_t>() : nullptr,
        .position_ids = a.position_ids ? a.position_ids.data<std::int32_t>() : nullptr};
    const auto blocks = static_cast<unsigned>((rows * pairs + kThreads - 1) / kThreads);
    rotary_kernel<T><<<blocks, kThreads, 0, ctx.stream().handle>>>(rotation);
    LRNN_CUDA_CHECK_LAUNCH();
  });
}

}  // namespace lrnn::cuda
