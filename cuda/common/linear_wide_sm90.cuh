/// Hopper's product of 17 to 128 rows and very many columns: the logits of a decoding step.
#pragma once

#include "lrnn/ops/linear.hpp"

#include "common/linear_sm90.cuh"

namespace lrnn::cuda::linear_wide {

/// Fewer columns leave multiprocessors without a tile; fewer rows are as fast in smaller ones.
constexpr std::int64_t kFewestColumns = 16384;
constexpr std::int64_t kFewestRows = 17;
constexpr std::int64_t kMostRows = 128;

inline bool applies(const LinearForward& a) {
  const std::int64_t rows = detail::row_count(a.x);
  return rows >= kFewestRows && rows <= kMostRows && a.weight.dim(0) >= kFewestColumns && !a.bias &&
         !a.accumulate && linear_sm90::applies(a.x, a.weight);
}

/// y = x W^T.
void forward(Context& ctx, const LinearForward& a);

}  // namespace lrnn::cuda::linear_wide
