/// Hopper's product of float32 matrices on tensor cores, in float32 accuracy: every number is split
/// into several of 16 bits, whose products are exact, and tensor cores add them up over a few
/// terms. These sums are added up in float32 registers, because tensor cores round toward zero.
///
/// bfloat16x3: x = x1 + x2 + x3, exactly, each at most 2^-8 of the one before. Of nine products of
/// two such sums the six up to 2^-16 are taken; what is dropped is at most 2^-24 of the product.
/// Numbers are split while they are read. A number below 2^-110 loses the bits that bfloat16 cannot
/// hold.
///
/// float16x2: x = u (x1 + 2^-11 x2) to 2^-23 of x, where u, a power of two, is the unit of 64
/// numbers of the left operand that belong to one row of y, or of a tile of 64 x 64 of the right
/// one; three products, without x2 x2, which is at most 2^-22. They take half the time, but numbers
/// are split beforehand: it pays unless a matrix is narrow. Numbers below 2^-28 of the largest with
/// the same unit are less exact. Where there are any, sums that are so small that this could be more
/// than 2^-20 of them are taken again by float32 multiply-adds.
///
/// So are sums that are not finite, because an operand is not or the sum overflows: infinities and
/// NaN are those of float32.
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
/// By the faster way.
void run(Context& ctx, const Product& product);

namespace bfloat16x3 {
bool applies(const Product& product);
/// What it takes on an H200, about, in microseconds.
double time(const Product& product);
void run(Context& ctx, const Product& product);
}  // namespace bfloat16x3

namespace float16x2 {
bool applies(const Product& product);
double time(const Product& product);
void run(Context& ctx, const Product& product);
}  // namespace float16x2

}  // namespace lrnn::cuda::linear_float32_sm90
