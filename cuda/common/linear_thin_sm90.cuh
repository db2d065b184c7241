/// Hopper's products of many rows and little depth, bound by the writing of y.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn::cuda::linear_thin {

/// y = x W^T (+ bias), or y += x W^T; with `transposed`, W instead of W^T.
struct Product {
  TensorView x, weight, bias;
  MutableTensorView y;
  bool accumulate;
  bool transposed;
};

/// Computes a product that suits and pays; else returns false and leaves y alone.
bool multiply(Context& ctx, const Product& product);

}  // namespace lrnn::cuda::linear_thin
