/// Hopper's product over rows, dweight += dy^T x in TF32: when it applies.
#pragma once

#include "lrnn/ops/linear.hpp"

#include "common/capability.cuh"
#include "common/rows.cuh"

namespace lrnn::cuda::linear_weight {

/// Whether device, operands and precision suit, and there are rows and columns enough: cuBLASLt is
/// as fast where the result is thin.
inline bool applies(const Context& ctx, const LinearBackward& a) {
  constexpr std::int64_t kLeastRows = 4096;
  constexpr std::int64_t kLeastColumns = 256;
  if (a.dy.dtype() != DType::float32 || !ctx.allow_tf32()) return false;
  if (detail::row_count(a.dy) < kLeastRows || std::min(a.dy.dim(-1), a.x.dim(-1)) < kLeastColumns)
    return false;
  const auto walks = [](TensorView t) {
    return allows_vectors(t.data<float>(), t.dim(-1), detail::row_stride(t), 4);
  };
  return walks(a.dy) && walks(a.x) && compute_capability() == 90;
}

void add(Context& ctx, const LinearBackward& a);

}  // namespace lrnn::cuda::linear_weight
