/// Hopper's product of up to a few hundred rows, y = x W^T: when it applies.
#pragma once

#include <algorithm>

#include "lrnn/ops/linear.hpp"

#include "common/capability.cuh"
#include "common/rows.cuh"

namespace lrnn::cuda::linear_sm90 {

/// Whether device and operands suit: rows of x and W that tensor copies can address.
inline bool applies(TensorView x, TensorView weight) {
  if (x.dtype() != DType::bfloat16) return false;
  constexpr std::int64_t kMostSize = std::int64_t{1} << 30;  // sizes are 32-bit there
  const auto addressable = [](TensorView t) {
    return allows_vectors(t.data<__nv_bfloat16>(), t.dim(-1), detail::row_stride(t), 8) &&
           std::max({t.dim(-1), detail::row_count(t), detail::row_stride(t)}) < kMostSize;
  };
  return addressable(x) && addressable(weight) && compute_capability() == 90;
}

/// Whether even few rows are faster here: where the weight is large, its rows so long that a warp
/// would read them in turns, or so short that there are few warps to hand out the sums. The sizes
/// of the weight alone decide, so that few rows and one have the same arithmetic.
inline bool streams(TensorView weight) {
  const std::int64_t depth = weight.dim(1);
  return weight.numel() >= std::int64_t{1} << 22 || depth >= 2048 || depth <= 128;
}

/// Elements of a weight that may be read once for every 64 rows.
constexpr std::int64_t kSmallWeight = std::int64_t{1} << 21;

/// Whether rows beyond the few are faster here than in cuBLASLt, whose kernels overlap none. With
/// rows grows the time of reading x, once for every 64 columns, which cuBLASLt shares better; but
/// it is slow if rows of y are not aligned.
inline bool pays(std::int64_t rows, TensorView weight, MutableTensorView y) {
  if (rows > 128) return false;
  if (!allows_vectors(y.data<__nv_bfloat16>(), 8, detail::row_stride(y), 8)) return true;
  return rows <= 32 || weight.numel() < (rows <= 64 ? 8 : 2) * kSmallWeight;
}
/// behind_wait: the next kernel starts only when the kernels before this one have ended.
void forward(Context& ctx, const LinearForward& args, bool behind_wait = false);

}  // namespace lrnn::cuda::linear_sm90
