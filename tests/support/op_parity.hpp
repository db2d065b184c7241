/// An op on a device against the CPU reference in double.
#pragma once

#include "support/op_case.hpp"

namespace lrnn::testing {

/// How far one result is from the reference, and how far it may be.
struct Deviation {
  std::string name;
  double nmse;   ///< |got - want|^2 / |want|^2
  double limit;  ///< of the case, or what the conditioning of this result allows, if that is more
};

/// Runs forward and backward of `c` in `dtype` on `ctx` and in float64 on the CPU, on the same
/// values, and compares every output and every gradient. Limits are those of TF32 where `ctx`
/// allows it.
[[nodiscard]] std::vector<Deviation> compare_with_double(const OpCase& c, Context& ctx,
                                                         DType dtype);
[[nodiscard]] double nmse(const std::vector<double>& got, const std::vector<double>& want);

}  // namespace lrnn::testing
