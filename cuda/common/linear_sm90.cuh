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

constexpr int kMaxParts = 8;     // blocks of a cluster that any Hopper device takes
constexpr int kMaxBlocks = 132;  // up to which K is cut further: one for each SM of an H200
constexpr int kMinPanels = 6;    // of a part

/// Parts of K: a power of two, while the blocks stay few and parts long.
inline int parts_of(int columns, int panels) {
  const int tiles = (columns + 63) / 64;
  int parts = 1;
  while (parts < kMaxParts && 2 * parts * tiles <= kMaxBlocks && 2 * parts * kMinPanels <= panels)
    parts *= 2;
  return parts;
}
inline int parts_of(TensorView weight) {
  return parts_of(static_cast<int>(weight.dim(0)), static_cast<int>((weight.dim(1) + 63) / 64));
}

/// Elements of a weight that may be read once for every 64 rows.
constexpr std::int64_t kSmallWeight = std::int64_t{1} << 21;

/// Whether rows beyond the few are faster here than in cuBLASLt, whose kernels overlap none. With
/// rows grows the time of reading x, once for every 64 columns, which cuBLASLt shares better; but
/// it is slow if rows of y are not aligned.
inline bool pays(std::int64_t rows, TensorView weight, MutableTensorView y) {
  if (rows > 128) return false;
  if (!allows_vectors(y.data<__nv_bfloat16>(), 8, detail::row_stride(y), 8)) return true;
  const bool most = rows <= 64 || parts_of(weight) == 4;
  return rows <= 32 || weight.numel() < (most ? 8 : 2) * kSmallWeight;
}
/// behind_wait: the next kernel starts only when the kernels before this one have ended.
void forward(Context& ctx, const LinearForward& args, bool behind_wait = false);

}  // namespace lrnn::cuda::linear_sm90
