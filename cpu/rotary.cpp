#include "lrnn/ops/rotary.hpp"

#include <cmath>

#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

std::int64_t position_of(const Rotary& a, std::int64_t b, std::int64_t t) {
  if (a.position_ids) return a.position_ids.data<std::int32_t>()[b * a.x.dim(1) + t];
  return t + (a.positions ? a.positions.data<std::int32_t>()[b] : 0);
}

// The two elements of pair j within a head.
struct Pair {
  std::int64_t first, second;
  Pair(const Rotary& a, std::int64_t j)
      : first(a.interleaved ? 2 * j : j), second(a.interleaved ? 2 * j + 1 : j + a.dim / 2) {}
};

}  // namespace

void rotary(Context&, const Rotary& a) {
  visit_float("rotary", a.x.dtype(), [&]<class T>() {
    const auto x = rows_of<T>(a.x);
    const std::int64_t seqlen = a.x.dim(1);
#pragma omp parallel for
    for (std::int64_t r = 0; r < x.count; ++r) {
      const auto position = static_cast<double>(position_of(a, r / seqlen, r % seqlen));
      for (std::int64_t j = 0; j < a.dim / 2; ++j) {
        const double frequency =
            std::pow(a.base, -2.0 * static_cast<double>(j) / static_cast<double>(a.dim));
        const double angle = (a.inverse ? -position : position) * frequency;
        const T c = static_cast<T>(std::cos(angle));
        const T s = static_cast<T>(std::sin(angle));
        const Pair pair(a, j);
        for (std::int64_t head = 0; head < x.width; head += a.head_dim) {
          T& first = x[r][head + pair.first];
          T& second = x[r][head + pair.second];
          const T u = first;
          const T v = second;
          first = u * c - v * s;
          second = u * s + v * c;
        }
      }
    }
  });
}

}  // namespace lrnn::cpu
