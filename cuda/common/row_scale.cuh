/// A factor of every row that a product applies to its sums: 1 / sqrt(mean square + eps), by parts
/// of the row's sum of squares.
#pragma once

namespace lrnn::cuda {

struct RowScale {
  static constexpr int kRows = 128;
  static constexpr int kMostParts = 32;

  const float* squares;  // [parts, kRows]; null: no factor
  int parts;
  float inverse_width, eps;
};

}  // namespace lrnn::cuda
