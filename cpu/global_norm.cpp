#include "lrnn/ops/global_norm.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "common/eigen.hpp"
#include "ops/norm_shape.hpp"

namespace lrnn::cpu {
namespace {

using detail::kNormLanes;
using detail::kNormRun;

template <class T>
double sum_of_squares(const T* values, std::int64_t count) {
  std::array<double, kNormLanes> lanes{};
  for (std::int64_t i = 0; i < count; i += kNormLanes) {
    const std::int64_t n = std::min<std::int64_t>(kNormLanes, count - i);
    for (std::int64_t j = 0; j < n; ++j) {
      const auto value = static_cast<double>(values[i + j]);
      lanes[static_cast<std::size_t>(j)] += value * value;
    }
  }
  for (std::size_t half = kNormLanes / 2; half > 0; half /= 2)
    for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

double fold_in_lanes(const std::vector<double>& sums) {
  std::array<double, kNormLanes> lanes{};
  for (std::size_t i = 0; i < sums.size(); ++i) lanes[i % kNormLanes] += sums[i];
  for (std::size_t half = kNormLanes / 2; half > 0; half /= 2)
    for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

}  // namespace

void global_norm(Context&, const GlobalNorm& args) {
  visit_float("global_norm", args.norm.dtype(), [&]<class T>() {
    std::vector<double> sums;
    for (const TensorView& grad : args.grads) {
      const T* const values = grad.data<T>();
      const std::int64_t n = grad.numel();
      const std::int64_t runs = detail::norm_runs(n);
      const std::size_t first = sums.size();
      sums.resize(first + static_cast<std::size_t>(runs));
#pragma omp parallel for
      for (std::int64_t r = 0; r < runs; ++r)
        sums[first + static_cast<std::size_t>(r)] =
            sum_of_squares(values + r * kNormRun, std::min(kNormRun, n - r * kNormRun));
    }
    *args.norm.data<T>() = static_cast<T>(args.scale * std::sqrt(fold_in_lanes(sums)));
  });
}

}  // namespace lrnn::cpu
