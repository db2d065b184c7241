/// discretize, diagonal_scan and complex_weight against the formulas written out with std::complex,
/// at values that random cases do not reach.
#include "lrnn/ops/diagonal_scan.hpp"

#include <cmath>
#include <complex>
#include <limits>
#include <numbers>

#include <gtest/gtest.h>

#include "lrnn/ops/complex_weight.hpp"
#include "lrnn/ops/discretize.hpp"

namespace lrnn {
namespace {

using Complex = std::complex<long double>;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Lane {
  double re;
  double im;
  double dt;
};

// Discretizes lanes given as numbers, in double or float, and returns all outputs.
struct Discretized {
  std::vector<double> a, a_low, gamma, powers, z;
};
Discretized discretize(Discretization method, const std::vector<Lane>& lanes, std::int64_t powers,
                       DType dtype = DType::float64) {
  Context ctx = Context::cpu();
  std::vector<double> re, im, dt;
  for (const Lane& lane : lanes) {
    re.push_back(lane.re);
    im.push_back(lane.im);
    dt.push_back(lane.dt);
  }
  const auto n = static_cast<std::int64_t>(lanes.size());
  const Tensor A_re = ctx.from_host_as({n}, dtype, re);
  const Tensor A_im = ctx.from_host_as({n}, dtype, im);
  const Tensor steps = ctx.from_host_as({n}, dtype, dt);
  Tensor a = ctx.empty({2, n}, dtype);
  Tensor a_low = ctx.empty({2, n}, dtype);
  Tensor gamma = ctx.empty({2, n}, dtype);
  Tensor table = ctx.empty({powers + 1, 2, n}, dtype);
  Tensor z = ctx.empty({4, n}, dtype);
  discretize_forward(
      ctx, {.parameters = {.method = method,
                           .lanes = n,
                           .A_re = {.value = A_re},
                           .A_im = {.value = A_im},
                           .dt = {.value = steps}},
            .a = a,
            .a_low = a_low,
            .gamma = gamma,
            .powers = table,
            .z = method == Discretization::None ? MutableTensorView() : MutableTensorView(z)});
  return {ctx.to_host_as_double(a), ctx.to_host_as_double(a_low), ctx.to_host_as_double(gamma),
          ctx.to_host_as_double(table), ctx.to_host_as_double(z)};
}

void expect_complex(double re, double im, Complex want, double tolerance, const char* what) {
  const auto scale = static_cast<double>(std::abs(want)) + 1e-300;
  EXPECT_NEAR(re, static_cast<double>(want.real()), tolerance * scale) << what;
  EXPECT_NEAR(im, static_cast<double>(want.imag()), tolerance * scale) << what;
}

TEST(Discretize, MatchesTheFormulas) {
  const std::vector<Lane> lanes = {
      {-0.5, 3.0, 0.1}, {-0.5, 0.0, 1e-3}, {-2.0, 200.0, 0.4}, {-1e-6, 1e-6, 0.5}};
  const auto n = lanes.size();
  for (const Discretization method :
       {Discretization::Zoh, Discretization::Bilinear, Discretization::Dirac, Discretization::Euler,
        Discretization::None}) {
    const Discretized d = discretize(method, lanes, 64);
    for (std::size_t i = 0; i < n; ++i) {
      const Complex A(lanes[i].re, lanes[i].im);
      const long double dt = lanes[i].dt;
      const Complex z = dt * A;
      Complex a = std::exp(z);
      Complex gamma = 1;
      if (method == Discretization::Zoh)
        gamma = std::abs(z) < 1e-4L ? dt * (1.0L + z / 2.0L + z * z / 6.0L + z * z * z / 24.0L)
                                    : (a - 1.0L) / A;
      if (method == Discretization::Euler) gamma = dt;
      if (method == Discretization::Bilinear) {
        a = (1.0L + z / 2.0L) / (1.0L - z / 2.0L);
        gamma = dt / (1.0L - z / 2.0L);
      }
      if (method == Discretization::None) a = A;
      expect_complex(d.a[i], d.a[n + i], a, 1e-14, "a");
      expect_complex(d.gamma[i], d.gamma[n + i], gamma, 1e-13, "gamma");
      for (std::size_t j = 0; j <= 64; ++j)
        expect_complex(d.powers[2 * j * n + i], d.powers[(2 * j + 1) * n + i],
                       j == 0 ? Complex(1) : std::pow(a, static_cast<long double>(j)), 1e-12,
                       "powers");
    }
  }
}

TEST(Discretize, ZohOfAZeroRateIsTheStep) {
  const Discretized d = discretize(Discretization::Zoh, {{0.0, 0.0, 0.25}}, 1);
  EXPECT_EQ(d.a, (std::vector<double>{1.0, 0.0}));
  EXPECT_EQ(d.gamma, (std::vector<double>{0.25, 0.0}));
}

TEST(Discretize, BilinearAtMinusTwoIsZero) {
  const Discretized d = discretize(Discretization::Bilinear, {{-2.0, 0.0, 1.0}}, 2);
  EXPECT_EQ(d.a, (std::vector<double>{0.0, 0.0}));
}

// The angle has 13 turns; float32 arithmetic would keep no more than five digits of a^64.
TEST(Discretize, FloatTablesAreRoundedOnce) {
  const Lane lane{-1.0F / 1024, 653.0F, 0.125F};
  const Discretized d = discretize(Discretization::Dirac, {lane}, 64, DType::float32);
  const Complex z(lane.re * lane.dt, lane.im * lane.dt);
  expect_complex(d.a[0] + d.a_low[0], d.a[1] + d.a_low[1], std::exp(z), 1e-14, "a + a_low");
  expect_complex(d.powers[128], d.powers[129], std::exp(64.0L * z), 1e-7, "a^64");
  EXPECT_NEAR(d.z[0] + d.z[1], static_cast<double>(z.real()), 1e-17);
  EXPECT_NEAR(d.z[2] + d.z[3], static_cast<double>(z.imag()) / (2 * std::numbers::pi), 1e-12);
}

// lrnnx takes 0^0 in complex numbers where exp(-exp(nu_log)) underflows.
TEST(Discretize, FastDecayUnderflowsToZero) {
  Context ctx = Context::cpu();
  const Tensor nu = ctx.from_host_as({2}, DType::float32, std::vector<double>{4.7, 200.0});
  const Tensor theta = ctx.from_host_as({2}, DType::float32, std::vector<double>{0.0, 200.0});
  const Tensor gamma_log = ctx.zeros({2}, DType::float32);
  Tensor a = ctx.empty({2, 2}, DType::float32);
  discretize_forward(
      ctx, {.parameters = {.method = Discretization::Exponential,
                           .lanes = 2,
                           .A_re = {.value = nu, .transform = LaneTransform::Exp, .negate = true},
                           .A_im = {.value = theta, .transform = LaneTransform::Exp},
                           .gamma_log = gamma_log},
            .a = a});
  for (const double v : ctx.to_host_as_double(a)) EXPECT_EQ(std::abs(v), 0.0);
}

TEST(Discretize, NamesWhatIsWrong) {
  Context ctx = Context::cpu();
  const Tensor A = ctx.zeros({3}, DType::float32);
  Tensor a = ctx.empty({2, 4}, DType::float32);
  try {
    discretize_forward(ctx, {.parameters = {.method = Discretization::Dirac,
                                            .lanes = 4,
                                            .A_re = {.value = A},
                                            .A_im = {.value = A}},
                             .a = a});
    FAIL() << "three rates cannot be shared by four lanes";
  } catch (const ShapeError& e) {
    EXPECT_STREQ(e.what(), "discretize_forward: A_re: expected a divisor of 4 lanes, got [3]");
  }
}

// x_t = a x_{t-1} + gamma v_t of one lane and sequence, written out.
std::vector<Complex> recurrence(Complex a, Complex gamma, const std::vector<Complex>& v,
                                Complex x) {
  std::vector<Complex> out;
  for (const Complex& e : v) out.push_back(x = a * x + gamma * e);
  return out;
}

TEST(DiagonalScan, MatchesTheRecurrenceAtExtremeMultipliers) {
  Context ctx = Context::cpu();
  const std::vector<Complex> as = {0.0L, 1e-30L, Complex(0.3L, -0.4L), Complex(0, 1 - 1e-6L),
                                   -1.0L + 1e-6L};
  const auto n = static_cast<std::int64_t>(as.size());
  constexpr std::int64_t kLength = 1000;
  std::vector<double> a(static_cast<std::size_t>(2 * n)), gamma(a.size()), start(a.size());
  for (std::size_t i = 0; i < as.size(); ++i) {
    a[i] = static_cast<double>(as[i].real());
    a[as.size() + i] = static_cast<double>(as[i].imag());
    gamma[i] = 0.5;
    gamma[as.size() + i] = -2.0;
    start[i] = 3.0;
  }
  std::vector<double> v;
  for (std::int64_t t = 0; t < kLength * n; ++t) v.push_back(std::sin(static_cast<double>(t)));
  Tensor x = ctx.empty({1, kLength, 2, n}, DType::float64);
  Tensor state = ctx.from_host_as({1, 2, n}, DType::float64, start);
  const Tensor multiplier = ctx.from_host_as({2, n}, DType::float64, a);
  diagonal_scan_forward(ctx, {.multiplier = {.a = multiplier},
                              .gamma = ctx.from_host_as({2, n}, DType::float64, gamma),
                              .v = ctx.from_host_as({1, kLength, n}, DType::float64, v),
                              .state_in = state,
                              .x = x,
                              .state_out = state});
  const auto got = ctx.to_host_as_double(x);
  const auto last = ctx.to_host_as_double(state);
  for (std::size_t i = 0; i < as.size(); ++i) {
    std::vector<Complex> drive;
    for (std::size_t t = 0; t < kLength; ++t) drive.emplace_back(v[t * as.size() + i]);
    const Complex exact(a[i], a[as.size() + i]);
    const auto want = recurrence(exact, Complex(0.5L, -2.0L), drive, 3.0L);
    for (std::size_t t = 0; t < kLength; ++t)
      expect_complex(got[(2 * t) * as.size() + i], got[(2 * t + 1) * as.size() + i], want[t], 1e-12,
                     "x");
    expect_complex(last[i], last[as.size() + i], want.back(), 1e-12, "state");
  }
}

TEST(DiagonalScan, NothingAtPaddingIsRead) {
  Context ctx = Context::cpu();
  const Tensor a = ctx.from_host_as({2, 1}, DType::float64, std::vector<double>{0.5, 0.25});
  Tensor v = ctx.from_host_as({1, 3, 1}, DType::float64, std::vector<double>{1.0, 2.0, kNaN});
  const Tensor dx = ctx.from_host_as({1, 3, 2, 1}, DType::float64,
                                     std::vector<double>{1.0, 0.0, 0.0, 1.0, kNaN, kNaN});
  const std::vector<std::int32_t> two = {2};
  const Tensor lengths = ctx.from_host<std::int32_t>({1}, two);
  Tensor x = ctx.empty({1, 3, 2, 1}, DType::float64);
  Tensor chunk_states = ctx.empty({1, 1, 2, 1}, DType::float64);
  Tensor state = ctx.empty({1, 2, 1}, DType::float64);
  diagonal_scan_forward(ctx, {.multiplier = {.a = a},
                              .v = v,
                              .lengths = lengths,
                              .x = x,
                              .state_out = state,
                              .chunk_states = chunk_states});
  EXPECT_EQ(ctx.to_host_as_double(x), (std::vector<double>{1.0, 0.0, 2.5, 0.25, 0.0, 0.0}));
  EXPECT_EQ(ctx.to_host_as_double(state), (std::vector<double>{2.5, 0.25}));
  Tensor da = ctx.zeros({2, 1}, DType::float64);
  diagonal_scan_backward(ctx, {.multiplier = {.a = a},
                               .dx = dx,
                               .v = v,
                               .chunk_states = chunk_states,
                               .lengths = lengths,
                               .dv = v,
                               .da = da});
  // p_1 = i, p_0 = 1 + conj(a) i = 1.25 + 0.5 i; da = p_1 conj(x_0) = i
  EXPECT_EQ(ctx.to_host_as_double(v), (std::vector<double>{1.25, 0.0, 0.0}));
  EXPECT_EQ(ctx.to_host_as_double(da), (std::vector<double>{0.0, 1.0}));
}

TEST(DiagonalScan, NamesWhatIsWrong) {
  Context ctx = Context::cpu();
  const Tensor a = ctx.zeros({2, 3}, DType::float32);
  const Tensor v = ctx.zeros({1, 4, 3}, DType::float32);
  Tensor x = ctx.empty({1, 4, 3}, DType::float32);
  try {
    diagonal_scan_forward(ctx, {.multiplier = {.a = a}, .v = v, .x = x});
    FAIL() << "x must have planes";
  } catch (const ShapeError& e) {
    EXPECT_STREQ(e.what(), "diagonal_scan_forward: x: expected [1, 4, 2, 3], got [1, 4, 3]");
  }
}

TEST(ComplexWeight, IsTheRealFormOfAComplexProduct) {
  Context ctx = Context::cpu();
  const Tensor re = ctx.from_host_as({1, 2}, DType::float64, std::vector<double>{1, 2});
  const Tensor im = ctx.from_host_as({1, 2}, DType::float64, std::vector<double>{3, 4});
  Tensor drive = ctx.empty({2, 1, 2}, DType::float64);
  Tensor read_out = ctx.empty({1, 2, 2}, DType::float64);
  complex_weight_forward(ctx,
                         {.product = ComplexProduct::Drive, .re = re, .im = im, .weight = drive});
  complex_weight_forward(
      ctx, {.product = ComplexProduct::ReadOut, .re = re, .im = im, .weight = read_out});
  // (1 + 3i, 2 + 4i) u for real u; Re((1 + 3i) x_0 + (2 + 4i) x_1)
  EXPECT_EQ(ctx.to_host_as_double(drive), (std::vector<double>{1, 2, 3, 4}));
  EXPECT_EQ(ctx.to_host_as_double(read_out), (std::vector<double>{1, 2, -3, -4}));
}

}  // namespace
}  // namespace lrnn
