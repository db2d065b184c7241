#include "lrnn/ops/discretize.hpp"

#include <vector>

#include "common/eigen.hpp"
#include "ops/lane_math.hpp"

namespace lrnn::cpu {
namespace {

using detail::Complex;
using detail::LaneGradient;
using detail::LaneSources;

template <class T>
void write_pair(const MutableTensorView& planes, std::int64_t lanes, std::int64_t lane,
                Complex value) {
  if (!planes) return;
  planes.data<T>()[lane] = static_cast<T>(value.re);
  planes.data<T>()[lanes + lane] = static_cast<T>(value.im);
}

template <class T>
Complex read_pair(const TensorView& planes, std::int64_t lanes, std::int64_t lane) {
  if (!planes) return {0.0, 0.0};
  const T* const p = planes.data<T>();
  return {static_cast<double>(p[lane]), static_cast<double>(p[lanes + lane])};
}

// value = high + low to twice the precision of T.
template <class T>
Complex low_part(Complex value) {
  return {value.re - static_cast<double>(static_cast<T>(value.re)),
          value.im - static_cast<double>(static_cast<T>(value.im))};
}

template <class T>
void write_powers(const MutableTensorView& powers, std::int64_t lanes, std::int64_t lane,
                  Complex a) {
  T* const out = powers.data<T>();
  Complex power{1.0, 0.0};
  for (std::int64_t j = 0; j < powers.dim(0); ++j) {
    out[2 * j * lanes + lane] = static_cast<T>(power.re);
    out[(2 * j + 1) * lanes + lane] = static_cast<T>(power.im);
    power = power * a;
  }
}

template <class T>
void write_event_rate(const MutableTensorView& planes, std::int64_t lanes, std::int64_t lane,
                      Complex z) {
  constexpr double kTurnsPerRadian = 0.15915494309189535;
  const Complex turns{z.re, z.im * kTurnsPerRadian};
  const Complex low = low_part<T>(turns);
  T* const out = planes.data<T>();
  out[lane] = static_cast<T>(turns.re);
  out[lanes + lane] = static_cast<T>(low.re);
  out[2 * lanes + lane] = static_cast<T>(turns.im);
  out[3 * lanes + lane] = static_cast<T>(low.im);
}

// grad[k] += sum over the lanes that use element k, in the order of the lanes.
template <class T, class ElementOf>
void add_shared(const MutableTensorView& grad, const std::vector<LaneGradient>& lanes,
                double LaneGradient::*part, ElementOf&& element_of) {
  if (!grad) return;
  std::vector<double> sums(static_cast<std::size_t>(grad.numel()), 0.0);
  for (std::size_t lane = 0; lane < lanes.size(); ++lane)
    sums[static_cast<std::size_t>(element_of(static_cast<std::int64_t>(lane)))] +=
        lanes[lane].*part;
  T* const out = grad.data<T>();
  const std::int64_t stride = detail::lane_stride(grad);
  for (std::size_t k = 0; k < sums.size(); ++k)
    out[static_cast<std::int64_t>(k) * stride] += static_cast<T>(sums[k]);
}

}  // namespace

void discretize_forward(Context&, const DiscretizeForward& args) {
  visit_float("discretize_forward", args.parameters.A_re.value.dtype(), [&]<class T>() {
    const LaneSources<T> sources(args.parameters);
    const std::int64_t lanes = sources.lanes;
#pragma omp parallel for
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const detail::LaneStep s = sources.step(lane);
      write_pair<T>(args.a, lanes, lane, s.a);
      write_pair<T>(args.a_low, lanes, lane, low_part<T>(s.a));
      write_pair<T>(args.gamma, lanes, lane, s.gamma);
      if (args.powers) write_powers<T>(args.powers, lanes, lane, s.a);
      if (args.z) write_event_rate<T>(args.z, lanes, lane, s.z);
    }
  });
}

void discretize_backward(Context&, const DiscretizeBackward& args) {
  visit_float("discretize_backward", args.parameters.A_re.value.dtype(), [&]<class T>() {
    const LaneSources<T> sources(args.parameters);
    const std::int64_t lanes = sources.lanes;
    std::vector<LaneGradient> gradients(static_cast<std::size_t>(lanes));
#pragma omp parallel for
    for (std::int64_t lane = 0; lane < lanes; ++lane)
      gradients[static_cast<std::size_t>(lane)] =
          lane_gradient(sources, lane, read_pair<T>(args.da, lanes, lane),
                        read_pair<T>(args.dz, lanes, lane), read_pair<T>(args.dgamma, lanes, lane));
    const auto rate_of = [&](std::int64_t lane) { return sources.rate_of(lane); };
    add_shared<T>(args.dA_re, gradients, &LaneGradient::A_re, rate_of);
    add_shared<T>(args.dA_im, gradients, &LaneGradient::A_im, rate_of);
    add_shared<T>(args.ddt, gradients, &LaneGradient::dt,
                  [&](std::int64_t lane) { return sources.step_of(lane); });
    add_shared<T>(args.dgamma_log, gradients, &LaneGradient::gamma_log,
                  [](std::int64_t lane) { return lane; });
  });
}

}  // namespace lrnn::cpu
