/// Scalar formulas of `discretize`, in double, the same on the host and on a device.
#pragma once

#include <cmath>

#include "lrnn/core/random.hpp"
#include "lrnn/ops/discretize.hpp"

#include "ops/dispatch.hpp"

namespace lrnn::detail {

struct Complex {
  double re;
  double im;
};
LRNN_HOST_DEVICE inline Complex operator+(Complex a, Complex b) {
  return {a.re + b.re, a.im + b.im};
}
LRNN_HOST_DEVICE inline Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
LRNN_HOST_DEVICE inline Complex operator*(double s, Complex a) {
  return {s * a.re, s * a.im};
}
LRNN_HOST_DEVICE inline Complex conj(Complex a) {
  return {a.re, -a.im};
}
LRNN_HOST_DEVICE inline Complex inverse(Complex a) {
  const double norm = a.re * a.re + a.im * a.im;
  return {a.re / norm, -a.im / norm};
}

/// f(p) of a LaneTransform with its sign and sinh, and the derivative by p.
struct LaneValue {
  double value;
  double slope;
};
LRNN_HOST_DEVICE inline LaneValue lane_value(LaneTransform transform, bool negate, bool of_sinh,
                                             double p) {
  double inner_slope = negate ? -1.0 : 1.0;
  if (of_sinh) {
    inner_slope *= std::cosh(p);
    p = std::sinh(p);
  }
  LaneValue f{p, 1.0};
  const double sigmoid = 1.0 / (1.0 + std::exp(-p));
  switch (transform) {
    case LaneTransform::Identity:
      break;
    case LaneTransform::Exp:
      f = p < 88.0 ? LaneValue{std::exp(p), std::exp(p)} : LaneValue{std::exp(88.0), 0.0};
      break;
    case LaneTransform::Softplus:
      f = {(p > 0.0 ? p : 0.0) + std::log1p(std::exp(-std::fabs(p))), sigmoid};
      break;
    case LaneTransform::Relu:
      f = p > 0.0 ? LaneValue{p + 1e-4, 1.0} : LaneValue{1e-4, 0.0};
      break;
    case LaneTransform::Sigmoid:
      f = {sigmoid, sigmoid * (1.0 - sigmoid)};
      break;
  }
  return {negate ? -f.value : f.value, f.slope * inner_slope};
}

/// exp(z); the sine and cosine of double reduce any angle exactly.
LRNN_HOST_DEVICE inline Complex complex_exp(Complex z) {
  const double r = std::exp(z.re);
  return {r * std::cos(z.im), r * std::sin(z.im)};
}

/// phi1(z) = (e^z - 1) / z and phi1'(z) = (e^z (z - 1) + 1) / z^2, each without cancellation.
struct Phi1 {
  Complex value;
  Complex slope;
};
LRNN_HOST_DEVICE inline Phi1 phi1(Complex z) {
  if (z.re * z.re + z.im * z.im < 0.25) {
    // sum z^k / (k+1)! and sum (k+1) z^k / (k+2)!; at |z| = 1/2 the 16th terms are below 1e-19
    Complex value{0.0, 0.0};
    Complex slope{0.0, 0.0};
    double factorial = 355687428096000.0;  // 17!
    for (int k = 15; k >= 0; --k) {
      slope = z * slope + Complex{(k + 1) / factorial, 0.0};
      factorial /= k + 2;
      value = z * value + Complex{1.0 / factorial, 0.0};
    }
    return {value, slope};
  }
  const double half_sine = std::sin(0.5 * z.im);
  const Complex e = complex_exp(z);
  const Complex expm1{std::expm1(z.re) * std::cos(z.im) - 2.0 * half_sine * half_sine, e.im};
  const Complex r = inverse(z);
  const Complex value = expm1 * r;
  return {value, (e + Complex{-value.re, -value.im}) * r};
}

/// One lane and its derivatives.
struct LaneStep {
  Complex z;
  Complex a;
  Complex gamma;
  Complex da_dz;
  Complex dgamma_dA;   ///< at fixed dt
  Complex dgamma_ddt;  ///< at fixed A
};
LRNN_HOST_DEVICE inline LaneStep lane_step(Discretization method, Complex A, double dt,
                                           double gamma_log) {
  const Complex zero{0.0, 0.0};
  const Complex one{1.0, 0.0};
  const Complex z = dt * A;
  if (method == Discretization::None) return {zero, A, one, zero, zero, zero};
  if (method == Discretization::Bilinear) {
    const Complex r = inverse({1.0 - 0.5 * z.re, -0.5 * z.im});
    const Complex r2 = r * r;
    return {z, Complex{1.0 + 0.5 * z.re, 0.5 * z.im} * r, dt * r, r2, 0.5 * dt * dt * r2, r2};
  }
  const Complex a = complex_exp(z);
  LaneStep s{z, a, one, a, zero, zero};
  if (method == Discretization::Zoh) {
    const Phi1 phi = phi1(z);
    s.gamma = dt * phi.value;
    s.dgamma_dA = dt * dt * phi.slope;
    s.dgamma_ddt = a;
  } else if (method == Discretization::Euler) {
    s.gamma = {dt, 0.0};
    s.dgamma_ddt = one;
  } else if (method == Discretization::Exponential) {
    s.gamma = {lane_value(LaneTransform::Exp, false, false, gamma_log).value, 0.0};
  }
  return s;
}

/// A LaneParameter as a kernel sees it. Element k lies at `data[k * stride]`.
template <class T>
struct LaneSource {
  const T* data = nullptr;
  std::int64_t stride = 1;
  std::int64_t count = 0;
  LaneTransform transform = LaneTransform::Identity;
  bool negate = false;
  bool of_sinh = false;

  LRNN_HOST_DEVICE LaneValue at(std::int64_t k) const {
    return lane_value(transform, negate, of_sinh, static_cast<double>(data[k * stride]));
  }
};

/// Distance between the elements of a parameter view.
inline std::int64_t lane_stride(const TensorView& t) {
  return t.rank() > 1 && t.dim(-1) == 1 ? row_stride(t) : 1;
}

template <class T>
LaneSource<T> lane_source(const LaneParameter& p) {
  if (!p.value) return {};
  return {p.value.data<T>(), lane_stride(p.value), p.value.numel(), p.transform, p.negate,
          p.of_sinh};
}

/// All lanes as a kernel sees them.
template <class T>
struct LaneSources {
  Discretization method;
  std::int64_t lanes;
  LaneSource<T> A_re;
  LaneSource<T> A_im;
  LaneSource<T> dt;
  const T* gamma_log;

  explicit LaneSources(const LaneParameters& p)
      : method(p.method),
        lanes(p.lanes),
        A_re(lane_source<T>(p.A_re)),
        A_im(lane_source<T>(p.A_im)),
        dt(lane_source<T>(p.dt)),
        gamma_log(p.gamma_log ? p.gamma_log.template data<T>() : nullptr) {}

  LRNN_HOST_DEVICE std::int64_t rate_of(std::int64_t lane) const { return lane % A_re.count; }
  LRNN_HOST_DEVICE std::int64_t step_of(std::int64_t lane) const {
    return lane / (lanes / dt.count);
  }
  LRNN_HOST_DEVICE LaneValue dt_of(std::int64_t lane) const {
    return dt.data == nullptr ? LaneValue{1.0, 0.0} : dt.at(step_of(lane));
  }
  LRNN_HOST_DEVICE LaneStep step(std::int64_t lane) const {
    const std::int64_t k = rate_of(lane);
    return lane_step(method, {A_re.at(k).value, A_im.at(k).value}, dt_of(lane).value,
                     gamma_log == nullptr ? 0.0 : static_cast<double>(gamma_log[lane]));
  }
};

/// Gradients of the parameters of one lane, before sums over lanes that share a parameter.
struct LaneGradient {
  double A_re;
  double A_im;
  double dt;
  double gamma_log;
};
template <class T>
LRNN_HOST_DEVICE LaneGradient lane_gradient(const LaneSources<T>& sources, std::int64_t lane,
                                            Complex da, Complex dz, Complex dgamma) {
  const std::int64_t k = sources.rate_of(lane);
  const LaneValue re = sources.A_re.at(k);
  const LaneValue im = sources.A_im.at(k);
  const LaneValue dt = sources.dt_of(lane);
  const LaneStep s = sources.step(lane);
  if (sources.method == Discretization::None) return {da.re * re.slope, da.im * im.slope, 0.0, 0.0};
  const Complex grad_z = dz + da * conj(s.da_dz);
  const Complex grad_A = dt.value * grad_z + dgamma * conj(s.dgamma_dA);
  const double grad_dt =
      (grad_z * conj({re.value, im.value})).re + (dgamma * conj(s.dgamma_ddt)).re;
  double grad_gamma_log = 0.0;
  if (sources.gamma_log != nullptr)
    grad_gamma_log = dgamma.re * lane_value(LaneTransform::Exp, false, false,
                                            static_cast<double>(sources.gamma_log[lane]))
                                     .slope;
  return {grad_A.re * re.slope, grad_A.im * im.slope, grad_dt * dt.slope, grad_gamma_log};
}

}  // namespace lrnn::detail
