/// HiPPO initial values against facts that do not come from an eigensolver: matrices written out by
/// hand, transfer functions of the full matrices, spectra known in closed form.
#include "mixers/hippo.hpp"

#include <algorithm>
#include <cmath>
#include <complex>
#include <numbers>

#include <gtest/gtest.h>

#include "lrnn/core/error.hpp"

namespace lrnn {
namespace {

using detail::HippoInit;
using detail::HippoOptions;
using detail::make_hippo;
using Complex = std::complex<double>;
using Vector = std::vector<Complex>;
using Matrix = std::vector<Vector>;
using std::numbers::pi;
using std::numbers::sqrt2;
using enum StateSpaceInit;

constexpr Complex kPoints[] = {{0.3, 0.0}, {1.0, 2.0}, {0.05, -7.0}, {20.0, 0.5}, {0.5, 40.0}};

HippoInit make(StateSpaceInit init, std::int64_t d_state, std::int64_t rank = 1,
               std::optional<double> B_clip = std::nullopt, std::int64_t copies = 1) {
  return make_hippo(
      "mixer_kwargs.S4.",
      {.init = init, .d_state = d_state, .copies = copies, .rank = rank, .B_clip = B_clip});
}

// x of M x = r, by elimination with row exchanges.
Vector solve(Matrix M, Vector r) {
  const std::size_t n = r.size();
  for (std::size_t k = 0; k < n; ++k) {
    std::size_t best = k;
    for (std::size_t i = k; i < n; ++i)
      if (std::abs(M[i][k]) > std::abs(M[best][k])) best = i;
    std::swap(M[k], M[best]);
    std::swap(r[k], r[best]);
    for (std::size_t i = k + 1; i < n; ++i) {
      const Complex factor = M[i][k] / M[k][k];
      for (std::size_t j = k; j < n; ++j) M[i][j] -= factor * M[k][j];
      r[i] -= factor * r[k];
    }
  }
  for (std::size_t k = n; k-- > 0;) {
    for (std::size_t j = k + 1; j < n; ++j) r[k] -= M[k][j] * r[j];
    r[k] /= M[k][k];
  }
  return r;
}
Complex dot(const Vector& c, const Vector& x) {
  Complex sum = 0;
  for (std::size_t i = 0; i < c.size(); ++i) sum += c[i] * x[i];
  return sum;
}
// c^T (s - M)^-1 b.
Complex transfer(const Matrix& M, const Vector& c, const Vector& b, Complex s) {
  Matrix shifted = M;
  for (std::size_t i = 0; i < M.size(); ++i) {
    for (Complex& m : shifted[i]) m = -m;
    shifted[i][i] += s;
  }
  return dot(c, solve(shifted, b));
}

// A real matrix and real vectors, all written out in the basis of the polynomials.
struct System {
  Matrix A;
  Vector b;
  std::vector<Vector> P;
};

System legs(std::size_t n) {
  System out{Matrix(n, Vector(n)), Vector(n), {Vector(n)}};
  for (std::size_t i = 0; i < n; ++i) {
    const auto row = static_cast<double>(i);
    for (std::size_t j = 0; j < i; ++j)
      out.A[i][j] = -std::sqrt((2 * row + 1) * (2 * static_cast<double>(j) + 1));
    out.A[i][i] = -(row + 1);
    out.b[i] = std::sqrt(2 * row + 1);
    out.P[0][i] = std::sqrt(row + 0.5);
  }
  return out;
}
const System kLegs4{{{-1, 0, 0, 0},
                     {-std::sqrt(3.0), -2, 0, 0},
                     {-std::sqrt(5.0), -std::sqrt(15.0), -3, 0},
                     {-std::sqrt(7.0), -std::sqrt(21.0), -std::sqrt(35.0), -4}},
                    {1, std::sqrt(3.0), std::sqrt(5.0), std::sqrt(7.0)},
                    {{std::sqrt(0.5), std::sqrt(1.5), std::sqrt(2.5), std::sqrt(3.5)}}};
const double r3 = std::sqrt(3.0), r5 = std::sqrt(5.0), r7 = std::sqrt(7.0);
const System kLegt4{
    {{-0.5, 0.5 * r3, -0.5 * r5, 0.5 * r7},
     {-0.5 * r3, -1.5, 0.5 * r3* r5, -0.5 * r3* r7},
     {-0.5 * r5, -0.5 * r5* r3, -2.5, 0.5 * r5* r7},
     {-0.5 * r7, -0.5 * r7* r3, -0.5 * r7* r5, -3.5}},
    {0.5, 0.5 * r3, 0.5 * r5, 0.5 * r7},
    {{0, std::sqrt(1.5), 0, std::sqrt(3.5)}, {std::sqrt(0.5), 0, std::sqrt(2.5), 0}}};
// The normal part of the Fourier basis (constant, unused, cos, sin, cos, sin) less its P P^T.
System fourier6() {
  System out{Matrix(6, Vector(6)), {1, 0, sqrt2, 0, sqrt2, 0}, {{1, 0, sqrt2, 0, sqrt2, 0}}};
  out.A[2][3] = -pi;
  out.A[3][2] = pi;
  out.A[4][5] = -2 * pi;
  out.A[5][4] = 2 * pi;
  for (std::size_t i = 0; i < 6; ++i)
    for (std::size_t j = 0; j < 6; ++j) out.A[i][j] -= out.P[0][i] * out.P[0][j];
  return out;
}

// c^T (s - Lambda)^-1 b over both halves, c and b given by their first halves.
Complex diagonal_transfer(const HippoInit& h, const Vector& c, const Vector& b, Complex s) {
  Complex sum = 0;
  for (std::size_t n = 0; n < h.decay.size(); ++n) {
    const Complex lambda{-h.decay[n], -h.frequency[n]};
    sum += std::conj(c[n]) * b[n] / (s - lambda) + c[n] * std::conj(b[n]) / (s - std::conj(lambda));
  }
  return sum;
}
Vector P_of(const HippoInit& h, std::size_t r) {
  const auto n = static_cast<std::ptrdiff_t>(h.decay.size());
  const auto first = h.P.begin() + static_cast<std::ptrdiff_t>(r) * n;
  return {first, first + n};
}
// c^T (s - A)^-1 b with A = Lambda - P P^*, by the formula for corrections of low rank.
Complex corrected_transfer(const HippoInit& h, std::size_t rank, const Vector& c, const Vector& b,
                           Complex s) {
  Matrix inner(rank, Vector(rank));
  Vector left(rank), right(rank);
  for (std::size_t r = 0; r < rank; ++r) {
    left[r] = diagonal_transfer(h, c, P_of(h, r), s);
    right[r] = diagonal_transfer(h, P_of(h, r), b, s);
    for (std::size_t q = 0; q < rank; ++q)
      inner[r][q] = (r == q ? 1.0 : 0.0) + diagonal_transfer(h, P_of(h, r), P_of(h, q), s);
  }
  return diagonal_transfer(h, c, b, s) - dot(left, solve(inner, right));
}

// All transfer functions between the first unit vector, B and P of the matrix itself and of its
// normal plus low-rank form. They determine Lambda, B and P up to the phases of the eigenvectors.
void expect_same_system(const HippoInit& h, const System& system) {
  const std::size_t n = system.b.size();
  const std::size_t rank = system.P.size();
  ASSERT_EQ(2 * h.decay.size(), n);
  Vector first(n);
  first[0] = 1;
  std::vector<Vector> full = {first, system.b};
  std::vector<Vector> half = {h.unit, h.B};
  Matrix normal = system.A;
  for (std::size_t r = 0; r < rank; ++r) {
    full.push_back(system.P[r]);
    half.push_back(P_of(h, r));
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < n; ++j) normal[i][j] += system.P[r][i] * system.P[r][j];
  }
  for (const Complex s : kPoints)
    for (std::size_t c = 0; c < full.size(); ++c)
      for (std::size_t b = 0; b < full.size(); ++b) {
        const Complex diagonal = transfer(normal, full[c], full[b], s);
        const Complex corrected = transfer(system.A, full[c], full[b], s);
        const double size = static_cast<double>(n * n) / std::abs(s);
        EXPECT_LT(std::abs(diagonal_transfer(h, half[c], half[b], s) - diagonal), 1e-12 * size)
            << "vectors " << c << ", " << b << " at " << s;
        EXPECT_LT(std::abs(corrected_transfer(h, rank, half[c], half[b], s) - corrected),
                  1e-12 * size)
            << "vectors " << c << ", " << b << " at " << s;
      }
}

TEST(Hippo, LegsIsTheMatrixWrittenOut) {
  const System four = legs(4);
  for (std::size_t i = 0; i < 4; ++i)
    for (std::size_t j = 0; j < 4; ++j) EXPECT_EQ(four.A[i][j], kLegs4.A[i][j]);
  expect_same_system(make(Legs, 4), kLegs4);
}
TEST(Hippo, LegsIsItsFormulaAtOtherSizes) {
  for (const std::int64_t n : {6, 8, 16, 34})
    expect_same_system(make(Legs, n), legs(static_cast<std::size_t>(n)));
}
TEST(Hippo, LegtIsTheMatrixWrittenOut) {
  expect_same_system(make(Legt, 4, 2), kLegt4);
}
TEST(Hippo, FourierIsTheMatrixWrittenOut) {
  expect_same_system(make(Fourier, 6), fourier6());
}

// The first coefficient of LegS is the exponentially weighted mean, whose impulse response is
// exp(-t): 1 / (s + 1), whatever the size.
TEST(Hippo, LegsBeginsWithAnExponentialAverage) {
  for (const std::int64_t n : {4, 10, 64}) {
    const HippoInit h = make(Legs, n);
    for (const Complex s : kPoints)
      EXPECT_LT(std::abs(corrected_transfer(h, 1, h.unit, h.B, s) - 1.0 / (s + 1.0)), 1e-11)
          << n << " at " << s;
  }
}

// The recorded spectrum and clips of lrnnx; -1/2 is the real part of every eigenvalue.
TEST(Hippo, LegsSpectrumOfSixtyFour) {
  const HippoInit h = make(Legs, 64);
  for (const double decay : h.decay) ASSERT_NEAR(decay, 0.5, 1e-13);
  for (std::size_t n = 1; n < 32; ++n) ASSERT_LT(h.frequency[n], h.frequency[n - 1]);
  EXPECT_NEAR(h.frequency[0], 1303.3, 0.05);
  EXPECT_NEAR(h.frequency[1], 433.0, 0.05);
  EXPECT_NEAR(h.frequency[30], 0.906, 0.0005);
  EXPECT_NEAR(h.frequency[31], 0.264, 0.0005);
}
TEST(Hippo, ClipsTheImaginaryPartOfB) {
  struct Recorded {
    std::int64_t d_state;
    std::size_t clipped;
    double largest;
  };
  for (const Recorded r :
       {Recorded{16, 3, 10}, Recorded{64, 11, 41}, Recorded{128, 22, 81}, Recorded{256, 44, 163}}) {
    const HippoInit raw = make(Legs, r.d_state);
    const HippoInit clipped = make(Legs, r.d_state, 1, 2.0);
    std::size_t count = 0;
    double largest = 0;
    for (std::size_t n = 0; n < raw.B.size(); ++n) {
      const double im = raw.B[n].imag();
      largest = std::max(largest, std::abs(im));
      if (std::abs(im) > 2) ++count;
      EXPECT_EQ(clipped.B[n].real(), raw.B[n].real());
      EXPECT_EQ(clipped.B[n].imag(), im > 2 ? 2.0 : im < -2 ? -2.0 : im);
    }
    EXPECT_EQ(count, r.clipped) << r.d_state;
    EXPECT_NEAR(largest, r.largest, 0.6) << r.d_state;
  }
}

// b = sqrt(2) P in the basis of the polynomials, and so in any other; the first component of every
// eigenvector is real and positive.
TEST(Hippo, PhasesOfLegsAreFixed) {
  const HippoInit h = make(Legs, 64);
  double sum = 0;
  for (std::size_t n = 0; n < h.B.size(); ++n) {
    EXPECT_LT(std::abs(h.B[n] - sqrt2 * h.P[n]), 1e-10);
    EXPECT_NEAR(h.unit[n].imag(), 0.0, 1e-13);
    EXPECT_GT(h.unit[n].real(), 0.0);
    sum += 2 * std::norm(h.unit[n]);
  }
  EXPECT_NEAR(sum, 1.0, 1e-12);
}

// Eigenvalues pi k with vectors (e_2k + -i e_2k+1) / sqrt(2), and (e_0 + i e_1) / sqrt(2) for 0.
TEST(Hippo, FourierInClosedForm) {
  const HippoInit h = make(Fourier, 12);
  for (std::size_t n = 0; n < 6; ++n) {
    EXPECT_NEAR(h.decay[n], 0.0, 1e-13);
    EXPECT_NEAR(h.frequency[n], pi * static_cast<double>(5 - n), 1e-12);
    EXPECT_LT(std::abs(h.B[n] - (n < 5 ? 1.0 : sqrt2 / 2)), 1e-12) << n;
    EXPECT_LT(std::abs(h.P[n] - h.B[n]), 1e-15);
    EXPECT_LT(std::abs(h.unit[n] - (n < 5 ? 0.0 : sqrt2 / 2)), 1e-12) << n;
  }
}

TEST(Hippo, DiagonalSpectra) {
  const auto expect = [](StateSpaceInit init, const std::vector<double>& frequencies) {
    const HippoInit h = make(init, 8, 2);
    for (std::size_t n = 0; n < 4; ++n) {
      EXPECT_EQ(h.decay[n], 0.5);
      EXPECT_NEAR(h.frequency[n], frequencies[n], 1e-12) << enum_name(init);
      EXPECT_EQ(h.B[n], Complex(1.0));
    }
    for (const Complex p : h.P) EXPECT_EQ(p, Complex(0.0));
    EXPECT_EQ(h.unit, (Vector{1, 0, 0, 0}));
  };
  for (const bool random_P : {false, true}) {
    expect(random_P ? DplrLin : DiagLin, {0, pi, 2 * pi, 3 * pi});
    expect(random_P ? DplrInv : DiagInv, {56 / pi, 40 / (3 * pi), 24 / (5 * pi), 8 / (7 * pi)});
    expect(random_P ? DplrInv2 : DiagInv2, {56 / pi, 24 / pi, 40 / (3 * pi), 8 / pi});
    expect(random_P ? DplrQuad : DiagQuad, {1 / pi, 9 / pi, 25 / pi, 49 / pi});
    EXPECT_EQ(make(random_P ? DplrQuad : DiagQuad, 8).random_P[0], random_P);
  }
}

TEST(Hippo, DiagonalLegsIsLegsWithoutCorrection) {
  const HippoInit legs = make(Legs, 32, 1, 2.0);
  for (const StateSpaceInit init : {DiagLegs, DplrLegs}) {
    const HippoInit h = make(init, 32);
    EXPECT_EQ(h.frequency, legs.frequency);
    EXPECT_EQ(h.B, legs.B);
    for (const double decay : h.decay) EXPECT_EQ(decay, 0.5);
    for (const Complex p : h.P) EXPECT_EQ(p, Complex(0.0));
    EXPECT_EQ(h.random_P[0], init == DplrLegs);
  }
}

// Copies of a union come in equal blocks, rows of P beyond the matrix's rank are zero.
TEST(Hippo, UnionsShareTheCopies) {
  const auto expect = [](StateSpaceInit whole, const std::vector<StateSpaceInit>& parts) {
    const auto copies = static_cast<std::int64_t>(2 * parts.size());
    const HippoInit h = make(whole, 8, 2, 2.0, copies);
    ASSERT_EQ(h.copies, copies);
    ASSERT_EQ(h.states, 4);
    for (std::size_t copy = 0; copy < 2 * parts.size(); ++copy) {
      const HippoInit part = make(parts[copy / 2], 8, 2, 2.0);
      for (std::size_t n = 0; n < 4; ++n) {
        EXPECT_EQ(h.decay[4 * copy + n], part.decay[n]);
        EXPECT_EQ(h.frequency[4 * copy + n], part.frequency[n]);
        EXPECT_EQ(h.B[4 * copy + n], part.B[n]);
        EXPECT_EQ(h.unit[4 * copy + n], part.unit[n]);
        EXPECT_EQ(h.P[4 * copy + n], part.P[n]);
        EXPECT_EQ(h.P[8 * parts.size() + 4 * copy + n], Complex(0.0));
      }
    }
  };
  expect(Hippo, {Legs, Fourier});
  expect(Diag, {DiagInv, DiagLin});
  expect(All, {Legs, Fourier, DiagInv, DiagLin});
}

TEST(Hippo, RefusesWhatHasNoMeaning) {
  const auto error_of = [](const HippoOptions& options) -> std::string {
    try {
      static_cast<void>(make_hippo("mixer_kwargs.S4.", options));
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "no error";
  };
  const HippoOptions good{.init = Legs, .d_state = 4, .copies = 1};
  EXPECT_EQ(error_of(good), "no error");
  EXPECT_EQ(error_of({.init = Legs, .d_state = 5, .copies = 1}),
            "mixer_kwargs.S4.d_state: expected a positive even number, got 5");
  EXPECT_EQ(error_of({.init = DiagLin, .d_state = 0, .copies = 1}),
            "mixer_kwargs.S4.d_state: expected a positive even number, got 0");
  for (const StateSpaceInit init : {Legs, Fourier, DiagLegs, DplrLegs})
    EXPECT_EQ(error_of({.init = init, .d_state = 2, .copies = 1}),
              "mixer_kwargs.S4.d_state: expected at least 4 with init \"" +
                  std::string(enum_name(init)) + "\", got 2");
  EXPECT_EQ(error_of({.init = DiagLin, .d_state = 2, .copies = 1}), "no error");
  EXPECT_EQ(error_of({.init = Legt, .d_state = 4, .copies = 1, .rank = 1}),
            "mixer_kwargs.S4.rank: expected at least 2 with init \"legt\", got 1");
  EXPECT_EQ(error_of({.init = Legs, .d_state = 4, .copies = 1, .rank = 0}),
            "mixer_kwargs.S4.rank: expected at least 1, got 0");
  EXPECT_EQ(error_of({.init = Legs, .d_state = 4, .copies = 1, .B_clip = -1.0}),
            "mixer_kwargs.S4.B_clip: expected a number of at least 0 or null, got -1");
  EXPECT_EQ(error_of({.init = All, .d_state = 4, .copies = 6}),
            "mixer_kwargs.S4.n_ssm: expected a multiple of 4 with init \"all\", got 6");
}

}  // namespace
}  // namespace lrnn
