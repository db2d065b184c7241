/// Hopper's product of little depth that starts from a skip connection: when it applies.
#pragma once

#include "lrnn/core/context.hpp"

#include "common/capability.cuh"
#include "common/rows.cuh"

namespace lrnn::cuda::linear_skip {

/// y = x W^T + scale o skip, and dscale += sum over rows of skip o other.
struct Problem {
  TensorView x;       // [..., depth]
  TensorView weight;  // [columns, depth]
  bool across;        // weight is [depth, columns] instead; then with dscale
  TensorView skip;    // [..., columns]
  TensorView scale;   // [columns], float32
  MutableTensorView y;
  TensorView other = {};  // [..., columns]
  MutableTensorView dscale = {};
};

/// Where one pass was faster than two. In bfloat16, whose passes are short, only over many rows of
/// little depth; below 512 rows there are too few tiles to fill a device.
constexpr std::int64_t least_rows(DType dtype) {
  return dtype == DType::bfloat16 ? std::int64_t{1} << 15 : 512;
}
constexpr std::int64_t most_depth(DType dtype) {
  return dtype == DType::bfloat16 ? 128 : 256;
}

/// Whether device, operands and precision suit.
inline bool applies(const Context& ctx, const Problem& p) {
  const DType dtype = p.x.dtype();
  const std::int64_t size = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t depth = p.x.dim(-1);
  if (dtype == DType::float32 ? !ctx.allow_tf32() : dtype != DType::bfloat16) return false;
  if (detail::row_count(p.x) < least_rows(dtype) || depth > most_depth(dtype)) return false;
  const auto walks = [&](TensorView t, int n) {
    return !t ||
           (reinterpret_cast<std::uintptr_t>(t.raw()) % static_cast<std::uintptr_t>(n * size) ==
                0 &&
            t.dim(-1) % n == 0 && detail::row_stride(t) % n == 0);
  };
  return walks(p.x, static_cast<int>(16 / size)) && walks(p.weight, 4) && walks(p.skip, 4) &&
         walks(p.y, 4) && walks(p.other, 4) && compute_capability() == 90;
}

void run(Context& ctx, const Problem& p);

/// Whether the problem was one for this kernel and has been solved.
inline bool run_if_suits([[maybe_unused]] Context& ctx, [[maybe_unused]] const Problem& p) {
#ifdef LRNN_WITH_SM90A
  if (applies(ctx, p)) {
    run(ctx, p);
    return true;
  }
#endif
  return false;
}

}  // namespace lrnn::cuda::linear_skip
