#include "models/s4_coordinates.hpp"

#include <algorithm>
#include <cmath>
#include <complex>
#include <utility>

#include "lrnn/core/error.hpp"

namespace lrnn::detail {
namespace {

using Complex = std::complex<double>;
using Vector = std::vector<Complex>;

// A square matrix, row-major. Plain loops: this runs in comparisons only, on small matrices.
struct Matrix {
  explicit Matrix(std::size_t size) : n(size), values(size * size) {}
  Complex& operator()(std::size_t i, std::size_t j) { return values[i * n + j]; }
  const Complex& operator()(std::size_t i, std::size_t j) const { return values[i * n + j]; }

  std::size_t n;
  Vector values;
};

Matrix identity(std::size_t n) {
  Matrix m(n);
  for (std::size_t i = 0; i < n; ++i) m(i, i) = 1;
  return m;
}
Matrix sum(const Matrix& a, const Matrix& b, double scale_b) {
  Matrix c(a.n);
  for (std::size_t i = 0; i < c.values.size(); ++i)
    c.values[i] = a.values[i] + scale_b * b.values[i];
  return c;
}
Matrix product(const Matrix& a, const Matrix& b) {
  Matrix c(a.n);
  for (std::size_t i = 0; i < a.n; ++i)
    for (std::size_t k = 0; k < a.n; ++k)
      for (std::size_t j = 0; j < a.n; ++j) c(i, j) += a(i, k) * b(k, j);
  return c;
}
Matrix power(Matrix base, std::int64_t exponent) {
  Matrix result = identity(base.n);
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) result = product(result, base);
    base = product(base, base);
  }
  return result;
}
// Gauss-Jordan elimination with row pivots.
Matrix inverse(Matrix a) {
  const std::size_t n = a.n;
  Matrix b = identity(n);
  for (std::size_t k = 0; k < n; ++k) {
    std::size_t pivot = k;
    for (std::size_t i = k + 1; i < n; ++i)
      if (std::abs(a(i, k)) > std::abs(a(pivot, k))) pivot = i;
    for (std::size_t j = 0; j < n; ++j) {
      std::swap(a(k, j), a(pivot, j));
      std::swap(b(k, j), b(pivot, j));
    }
    const Complex scale = 1.0 / a(k, k);
    for (std::size_t j = 0; j < n; ++j) {
      a(k, j) *= scale;
      b(k, j) *= scale;
    }
    for (std::size_t i = 0; i < n; ++i) {
      if (i == k) continue;
      const Complex factor = a(i, k);
      for (std::size_t j = 0; j < n; ++j) {
        a(i, j) -= factor * a(k, j);
        b(i, j) -= factor * b(k, j);
      }
    }
  }
  return b;
}
// Row vector times matrix, and matrix times column vector.
Vector row_times(const Vector& v, const Matrix& m) {
  Vector out(m.n);
  for (std::size_t i = 0; i < m.n; ++i)
    for (std::size_t j = 0; j < m.n; ++j) out[j] += v[i] * m(i, j);
  return out;
}
Vector times_column(const Matrix& m, const Vector& v) {
  Vector out(m.n);
  for (std::size_t i = 0; i < m.n; ++i)
    for (std::size_t j = 0; j < m.n; ++j) out[i] += m(i, j) * v[j];
  return out;
}
Matrix adjoint(const Matrix& m) {
  Matrix out(m.n);
  for (std::size_t i = 0; i < m.n; ++i)
    for (std::size_t j = 0; j < m.n; ++j) out(i, j) = std::conj(m(j, i));
  return out;
}
// A vector of half the states, followed by its conjugate.
Vector doubled(const double* pairs, std::size_t half) {
  Vector v(2 * half);
  for (std::size_t n = 0; n < half; ++n) {
    v[n] = {pairs[2 * n], pairs[2 * n + 1]};
    v[n + half] = std::conj(v[n]);
  }
  return v;
}

// A transform of lrnnx and its derivative.
std::pair<double, double> transformed(const std::string& name, double p) {
  const double sigmoid = 1 / (1 + std::exp(-p));
  if (name == "none") return {p, 1};
  if (name == "exp") return {std::exp(p), std::exp(p)};
  if (name == "relu") return {std::max(p, 0.0) + 1e-4, p > 0 ? 1 : 0};
  if (name == "sigmoid") return {sigmoid, sigmoid * (1 - sigmoid)};
  if (name == "softplus") return {std::max(p, 0.0) + std::log1p(std::exp(-std::abs(p))), sigmoid};
  throw ConfigError("unknown transform '" + name + "'");
}

// One channel h: x_t = M x_{t-1} + ..., M = (tau - A)^-1 (tau + A), A = diag(Lambda) - sum P P^H.
class Channel {
 public:
  Channel(S4Layer& layer, std::size_t h)
      : layer_(layer),
        h_(h),
        half_(static_cast<std::size_t>(layer.states)),
        copy_(h % static_cast<std::size_t>(layer.ssm_copies)),
        K_(2 * half_),
        M_(2 * half_) {
    const std::size_t n = 2 * half_;
    Matrix A(n);
    Matrix tau(n);
    for (std::size_t i = 0; i < half_; ++i) {
      const double re = transformed(layer.real_transform, layer.A_real[state(i)]).first;
      const double im = transformed(layer.imag_transform, layer.A_imag[state(i)]).first;
      A(i, i) = {-re, -im};
      A(i + half_, i + half_) = {-re, im};
      tau(i, i) = tau(i + half_, i + half_) = 2 / dt(i).first;
    }
    for (std::size_t r = 0; r < static_cast<std::size_t>(layer.rank); ++r) {
      P_.push_back(doubled(layer.P.data() + p_offset(r), half_));
      for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j) A(i, j) -= P_[r][i] * std::conj(P_[r][j]);
    }
    K_ = inverse(sum(tau, A, -1));
    M_ = product(K_, sum(tau, A, 1));
  }

  void change(std::int64_t kernel_length) {
    const Matrix one = identity(M_.n);
    const Matrix R_adjoint = adjoint(inverse(sum(one, power(M_, kernel_length), -1)));
    // S = sum_j M^(K-1-j) g^H C M^j, so that the change of Re <g, C M^K> with M is Re tr(S dM).
    Matrix S(M_.n);
    for (std::size_t c = 0; c < static_cast<std::size_t>(layer_.channels); ++c) {
      const std::size_t offset = (c * static_cast<std::size_t>(layer_.heads) + h_) * half_ * 2;
      const Vector g = row_times(doubled(layer_.dC.data() + offset, half_), R_adjoint);
      for (std::size_t i = 0; i < half_; ++i) {
        layer_.dC[offset + 2 * i] = g[i].real();
        layer_.dC[offset + 2 * i + 1] = g[i].imag();
      }
      add_products(g, doubled(layer_.C.data() + offset, half_), kernel_length, S);
    }
    const Matrix SK = product(S, K_);
    add_to_A(product(sum(M_, one, 1), SK));
    add_to_dt(product(sum(one, M_, -1), SK));
  }

 private:
  [[nodiscard]] std::size_t state(std::size_t i) const { return copy_ * half_ + i; }
  [[nodiscard]] std::size_t p_offset(std::size_t r) const {
    return (r * static_cast<std::size_t>(layer_.ssm_copies) + copy_) * half_ * 2;
  }
  [[nodiscard]] std::size_t dt_index(std::size_t i) const {
    return layer_.dt_tied ? h_ : h_ * half_ + i;
  }
  // dt and its derivative by inv_dt.
  [[nodiscard]] std::pair<double, double> dt(std::size_t i) const {
    const double p = layer_.inv_dt[dt_index(i)];
    auto [value, slope] = transformed(layer_.dt_transform, layer_.dt_fast ? std::sinh(p) : p);
    return {value, layer_.dt_fast ? slope * std::cosh(p) : slope};
  }

  void add_products(const Vector& g, Vector row, std::int64_t kernel_length, Matrix& S) const {
    std::vector<Vector> columns;
    Vector column(g.size());
    for (std::size_t i = 0; i < g.size(); ++i) column[i] = std::conj(g[i]);
    for (std::int64_t k = 0; k < kernel_length; ++k) {
      columns.push_back(column);
      column = times_column(M_, column);
    }
    for (auto it = columns.rbegin(); it != columns.rend(); ++it) {
      for (std::size_t i = 0; i < S.n; ++i)
        for (std::size_t j = 0; j < S.n; ++j) S(i, j) += (*it)[i] * row[j];
      row = row_times(row, M_);
    }
  }

  // The inner product over half the states is half of that over all, hence the factors 1/2.
  void add_to_A(const Matrix& T) {
    for (std::size_t i = 0; i < half_; ++i) {
      const Complex g = 0.5 * (std::conj(T(i, i)) + T(i + half_, i + half_));
      const double re = transformed(layer_.real_transform, layer_.A_real[state(i)]).second;
      const double im = transformed(layer_.imag_transform, layer_.A_imag[state(i)]).second;
      layer_.dA_real[state(i)] -= re * g.real();
      layer_.dA_imag[state(i)] -= im * g.imag();
    }
    const Matrix both = sum(T, adjoint(T), 1);
    for (std::size_t r = 0; r < P_.size(); ++r) {
      const Vector g = times_column(both, P_[r]);
      for (std::size_t i = 0; i < half_; ++i) {
        const Complex v = -0.5 * (g[i] + std::conj(g[i + half_]));
        layer_.dP[p_offset(r) + 2 * i] += v.real();
        layer_.dP[p_offset(r) + 2 * i + 1] += v.imag();
      }
    }
  }
  void add_to_dt(const Matrix& T) {
    for (std::size_t i = 0; i < half_; ++i) {
      const auto [value, slope] = dt(i);
      const double dtau = 0.5 * (T(i, i) + T(i + half_, i + half_)).real();
      layer_.dinv_dt[dt_index(i)] -= 2 / (value * value) * slope * dtau;
    }
  }

  S4Layer& layer_;
  std::size_t h_;
  std::size_t half_;
  std::size_t copy_;
  Matrix K_;  // (tau - A)^-1
  Matrix M_;
  std::vector<Vector> P_;
};

}  // namespace

void to_lrnnx_coordinates(S4Layer& layer, std::int64_t kernel_length) {
  for (std::size_t h = 0; h < static_cast<std::size_t>(layer.heads); ++h)
    Channel(layer, h).change(kernel_length);
}

}  // namespace lrnn::detail
