/// Hopper's product of float32 matrices on tensor cores, in float32 accuracy.
///
/// Every number is the exact sum of three bfloat16, x = x1 + x2 + x3, each at most 2^-8 of the one
/// before. Of the nine products of two such sums the six up to 2^-16 are taken; what is dropped is
/// at most 2^-24 of the product. Tensor cores sum over 32 terms, small products first; these sums
/// are added up in float32 registers, because tensor cores round toward zero.
///
/// A number below 2^-110 loses the bits that bfloat16 cannot hold. Where the sums of a strip of 16
/// rows are not all finite, because an operand is not or the sum overflows, the strip is computed
/// again by float32 multiply-adds: infinities and NaN are those of float32.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn::cuda::linear_float32_sm90 {

/// A matrix whose rows are `stride` elements apart. Along rows runs the depth of the product, or,
/// `across`, its rows or columns.
struct Operand {
  const float* data;
  std::int64_t stride;
  bool across;
};

/// y = left right^T (+ bias, or + y).
struct Product {
  Operand left;   // [rows, depth], or across, if right is as well: [depth, rows]
  Operand right;  // [columns, depth], or across: [depth, columns]
  const float* bias = nullptr;
  float* y;
  std::int64_t y_stride;
  bool accumulate;
  std::int64_t rows, columns, depth;
};

/// Whether device and operands suit: run() takes the product.
bool applies(const Product& product);
/// Whether moreover the product is large enough to be faster here than in cuBLASLt.
bool pays(const Product& product);
void run(Context& ctx, const Product& product);

}  // namespace lrnn::cuda::linear_float32_sm90
