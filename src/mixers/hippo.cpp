#include "mixers/hippo.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <Eigen/Eigenvalues>

#include "lrnn/core/error.hpp"

namespace lrnn::detail {
namespace {

using Complex = HippoInit::Complex;
using Eigen::Index;
using Eigen::MatrixXcd;
using Eigen::MatrixXd;
using Eigen::VectorXd;

std::vector<StateSpaceInit> parts_of(StateSpaceInit init) {
  using enum StateSpaceInit;
  if (init == Hippo) return {Legs, Fourier};
  if (init == Diag) return {DiagInv, DiagLin};
  if (init == All) return {Legs, Fourier, DiagInv, DiagLin};
  return {init};
}

// Whether the initial A, B and P are those of a HiPPO matrix.
bool is_normal_plus_low_rank(StateSpaceInit init) {
  using enum StateSpaceInit;
  return init == Legs || init == Legt || init == Fourier;
}
bool needs_legs(StateSpaceInit init) {
  using enum StateSpaceInit;
  return init == Legs || init == DiagLegs || init == DplrLegs;
}
bool has_random_P(StateSpaceInit init) {
  using enum StateSpaceInit;
  return init == DplrLin || init == DplrInv || init == DplrInv2 || init == DplrQuad ||
         init == DplrLegs;
}

// A matrix A + sum_r P_r P_r^T that is skew-symmetric up to a multiple of the identity.
struct Normal {
  MatrixXd matrix;
  VectorXd B;
  std::vector<VectorXd> P;
};

Normal legs(Index n) {
  Normal out{MatrixXd::Zero(n, n), VectorXd(n), {VectorXd(n)}};
  for (Index i = 0; i < n; ++i) {
    const auto row = static_cast<double>(i);
    out.B[i] = std::sqrt(2 * row + 1);
    out.P[0][i] = std::sqrt(row + 0.5);
    for (Index j = 0; j < i; ++j)
      out.matrix(i, j) = -std::sqrt((2 * row + 1) * (2 * static_cast<double>(j) + 1));
    out.matrix(i, i) = -(row + 1);
  }
  out.matrix += out.P[0] * out.P[0].transpose();
  return out;
}

Normal legt(Index n) {
  Normal out{MatrixXd(n, n), VectorXd(n), {VectorXd::Zero(n), VectorXd::Zero(n)}};
  const auto r = [](Index i) { return std::sqrt(2 * static_cast<double>(i) + 1); };
  for (Index i = 0; i < n; ++i) {
    out.B[i] = 0.5 * r(i);
    out.P[i % 2 == 1 ? 0 : 1][i] = r(i) * std::numbers::sqrt2 / 2;
    for (Index j = 0; j < n; ++j)
      out.matrix(i, j) = -0.5 * r(i) * r(j) * (i < j && (j - i) % 2 == 1 ? -1.0 : 1.0);
  }
  for (const VectorXd& p : out.P) out.matrix += p * p.transpose();
  return out;
}

Normal fourier(Index n) {
  Normal out{MatrixXd::Zero(n, n), VectorXd::Zero(n), {}};
  for (Index i = 0; i < n; i += 2) out.B[i] = i == 0 ? 1.0 : std::numbers::sqrt2;
  out.P = {out.B};
  for (Index i = 2; i + 1 < n; i += 2) {
    const double d = std::numbers::pi * static_cast<double>(i / 2);
    out.matrix(i, i + 1) = -d;
    out.matrix(i + 1, i) = d;
  }
  return out;
}

// One state-space model.
struct Model {
  std::vector<double> decay;
  std::vector<double> frequency;
  std::vector<Complex> B;
  std::vector<std::vector<Complex>> P;
  std::vector<Complex> unit;
  bool random_P = false;
};

// Columns of V with the first component that is not 0 real and positive.
void normalize_phases(MatrixXcd& V) {
  for (Index k = 0; k < V.cols(); ++k)
    for (Index i = 0; i < V.rows(); ++i) {
      const double size = std::abs(V(i, k));
      if (size < 1e-9) continue;
      V.col(k) *= std::conj(V(i, k)) / size;
      break;
    }
}

std::vector<Complex> as_vector(const Eigen::VectorXcd& v) {
  return {v.data(), v.data() + v.size()};
}

Model diagonalize(const Normal& normal, std::optional<double> B_clip) {
  constexpr double kZero = 1e-4;
  const Index n = normal.matrix.rows();
  const Index half = n / 2;
  const MatrixXcd hermitian = Complex(0, -1) * normal.matrix.cast<Complex>();
  const Eigen::SelfAdjointEigenSolver<MatrixXcd> solver(hermitian);
  LRNN_CHECK(solver.info() == Eigen::Success, InternalError, "HiPPO: no eigen-decomposition");
  MatrixXcd V = solver.eigenvectors().leftCols(half);
  normalize_phases(V);
  // The eigenvectors of a double eigenvalue 0 are not determined; half of them is this one.
  if (std::abs(solver.eigenvalues()[half - 1]) < kZero) {
    V.col(half - 1).setZero();
    V(0, half - 1) = std::numbers::sqrt2 / 2;
    V(1, half - 1) = Complex(0, std::numbers::sqrt2 / 2);
  }
  Model model;
  model.decay.assign(static_cast<std::size_t>(half), -normal.matrix.diagonal().mean());
  for (Index k = 0; k < half; ++k) model.frequency.push_back(-solver.eigenvalues()[k]);
  const MatrixXcd inverse = V.adjoint();
  model.B = as_vector(inverse * normal.B);
  if (B_clip)
    for (Complex& b : model.B) b = {b.real(), std::clamp(b.imag(), -*B_clip, *B_clip)};
  for (const VectorXd& p : normal.P) model.P.push_back(as_vector(inverse * p));
  model.unit = as_vector(inverse.col(0));
  return model;
}

Model normal_model(StateSpaceInit init, const HippoOptions& o) {
  const auto n = static_cast<Index>(o.d_state);
  return diagonalize(init == StateSpaceInit::Legs   ? legs(n)
                     : init == StateSpaceInit::Legt ? legt(n)
                                                    : fourier(n),
                     o.B_clip);
}

double diagonal_frequency(StateSpaceInit init, double size, double n) {
  using std::numbers::pi;
  using enum StateSpaceInit;
  switch (init) {
    case DiagLin:
    case DplrLin:
      return pi * n;
    case DiagInv:
    case DplrInv:
      return size / pi * (size / (1 + 2 * n) - 1);
    case DiagInv2:
    case DplrInv2:
      return size / pi * (size / (1 + n) - 1);
    case DiagQuad:
    case DplrQuad:
      return (1 + 2 * n) * (1 + 2 * n) / pi;
    default:
      throw InternalError("HiPPO: not a diagonal spectrum");
  }
}

Model diagonal_model(StateSpaceInit init, const HippoOptions& o) {
  const auto states = static_cast<std::size_t>(o.d_state / 2);
  Model model;
  model.decay.assign(states, 0.5);
  if (needs_legs(init)) {
    HippoOptions options = o;
    options.B_clip = 2.0;
    const Model hippo = normal_model(StateSpaceInit::Legs, options);
    model.frequency = hippo.frequency;
    model.B = hippo.B;
  } else {
    for (std::size_t n = 0; n < states; ++n)
      model.frequency.push_back(
          diagonal_frequency(init, static_cast<double>(o.d_state), static_cast<double>(n)));
    model.B.assign(states, 1.0);
  }
  model.unit.assign(states, 0.0);
  model.unit[0] = 1.0;
  model.random_P = has_random_P(init);
  return model;
}

template <class V>
void append(std::vector<V>& all, const std::vector<V>& part) {
  all.insert(all.end(), part.begin(), part.end());
}

}  // namespace

void check_hippo(const std::string& field, const HippoOptions& o) {
  LRNN_CHECK(o.d_state >= 2 && o.d_state % 2 == 0, ConfigError, field,
             "d_state: expected a positive even number, got ", o.d_state);
  LRNN_CHECK(o.rank >= 1, ConfigError, field, "rank: expected at least 1, got ", o.rank);
  LRNN_CHECK(!o.B_clip || *o.B_clip >= 0, ConfigError, field,
             "B_clip: expected a number of at least 0 or null, got ", o.B_clip.value_or(0));
  const auto parts = parts_of(o.init);
  for (const StateSpaceInit part : parts) {
    LRNN_CHECK(o.d_state > 2 || !(is_normal_plus_low_rank(part) || needs_legs(part)), ConfigError,
               field, "d_state: expected at least 4 with init \"", enum_name(o.init), "\", got ",
               o.d_state);
    LRNN_CHECK(part != StateSpaceInit::Legt || o.rank >= 2, ConfigError, field,
               "rank: expected at least 2 with init \"legt\", got ", o.rank);
  }
  LRNN_CHECK(o.copies >= 1 && o.copies % static_cast<std::int64_t>(parts.size()) == 0, ConfigError,
             field, "n_ssm: expected a multiple of ", parts.size(), " with init \"",
             enum_name(o.init), "\", got ", o.copies);
}

HippoInit make_hippo(const std::string& field, const HippoOptions& o) {
  check_hippo(field, o);
  HippoInit out;
  out.copies = o.copies;
  out.states = o.d_state / 2;
  const auto parts = parts_of(o.init);
  std::vector<Model> models;
  for (const StateSpaceInit part : parts)
    models.push_back(is_normal_plus_low_rank(part) ? normal_model(part, o)
                                                   : diagonal_model(part, o));
  const std::int64_t share = o.copies / static_cast<std::int64_t>(parts.size());
  const auto model_of = [&](std::int64_t copy) -> const Model& {
    return models[static_cast<std::size_t>(copy / share)];
  };
  for (std::int64_t copy = 0; copy < o.copies; ++copy) {
    const Model& model = model_of(copy);
    append(out.decay, model.decay);
    append(out.frequency, model.frequency);
    append(out.B, model.B);
    append(out.unit, model.unit);
    out.random_P.push_back(model.random_P);
  }
  const std::vector<Complex> none(static_cast<std::size_t>(out.states), 0.0);
  for (std::size_t r = 0; r < static_cast<std::size_t>(o.rank); ++r)
    for (std::int64_t copy = 0; copy < o.copies; ++copy) {
      const Model& model = model_of(copy);
      append(out.P, r < model.P.size() ? model.P[r] : none);
    }
  return out;
}

}  // namespace lrnn::detail
