#include "lrnn/ops/lane_weight.hpp"

#include <vector>

#include "common/eigen.hpp"
#include "ops/lane_weight_math.hpp"

namespace lrnn::cpu {
namespace {

using detail::Complex;
using detail::LaneWeightGradient;
using detail::LaneWeightSource;

// out[at(i)] += part(gradient i), in the order of i. Sums are in double.
template <class T, class At, class Part>
void add_shared(const MutableTensorView& out, const std::vector<LaneWeightGradient>& gradients,
                At&& at, Part&& part) {
  if (!out) return;
  std::vector<double> sums(static_cast<std::size_t>(out.numel()), 0.0);
  for (std::size_t i = 0; i < gradients.size(); ++i)
    sums[static_cast<std::size_t>(at(static_cast<std::int64_t>(i)))] += part(gradients[i]);
  T* const data = out.data<T>();
  for (std::size_t k = 0; k < sums.size(); ++k) data[k] += static_cast<T>(sums[k]);
}

}  // namespace

void lane_weight_forward(Context&, const LaneWeightForward& args) {
  visit_float("lane_weight_forward", args.W.dtype(), [&]<class T>() {
    const LaneWeightSource<T> f(args.factors);
    T* const W = args.W.data<T>();
#pragma omp parallel for
    for (std::int64_t i = 0; i < f.plane(); ++i) {
      const Complex rest = (f.scale * f.left_of(i) * f.right_of(i)) * (f.gamma_of(i) * f.B_of(i));
      for (std::int64_t c = 0; c < f.channels; ++c) {
        const Complex w = rest * f.C_of(c, i);
        W[f.weight_at(c, i)] = static_cast<T>(w.re);
        if (!f.real) W[f.plane() + f.weight_at(c, i)] = static_cast<T>(w.im);
      }
    }
  });
}

void lane_weight_backward(Context&, const LaneWeightBackward& args) {
  visit_float("lane_weight_backward", args.dW.dtype(), [&]<class T>() {
    const LaneWeightSource<T> f(args.factors);
    const T* const dW = args.dW.data<T>();
    T* const dC = args.dC.data<T>();
    T* const dgamma = args.dgamma ? args.dgamma.data<T>() : nullptr;
    std::vector<LaneWeightGradient> gradients(static_cast<std::size_t>(f.plane()));
#pragma omp parallel for
    for (std::int64_t i = 0; i < f.plane(); ++i) {
      LaneWeightGradient& g = gradients[static_cast<std::size_t>(i)];
      g = detail::lane_weight_gradient(f, i, dW, dC);
      if (dgamma == nullptr) continue;
      dgamma[i] = static_cast<T>(g.gamma.re);
      dgamma[f.plane() + i] = static_cast<T>(f.real ? 0.0 : g.gamma.im);
    }
    const auto lane_of = [&](std::int64_t i) { return i / f.substates; };
    using Gradient = LaneWeightGradient;
    add_shared<T>(
        args.dB, gradients, [&](std::int64_t i) { return 2 * f.shared(i); },
        [](const Gradient& g) { return g.B.re; });
    add_shared<T>(
        args.dB, gradients, [&](std::int64_t i) { return 2 * f.shared(i) + 1; },
        [](const Gradient& g) { return g.B.im; });
    add_shared<T>(args.dleft, gradients, lane_of, [](const Gradient& g) { return g.left; });
    add_shared<T>(args.dright, gradients, lane_of, [](const Gradient& g) { return g.right; });
  });
}

}  // namespace lrnn::cpu
