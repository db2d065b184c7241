#include "mixers/s4_read_out.hpp"

#include <Eigen/LU>

namespace lrnn::detail {
namespace {

using Eigen::MatrixXd;
using Eigen::VectorXd;

VectorXd planes(const S4DenseTransition& t, const std::vector<double>& values, std::int64_t r,
                std::int64_t h) {
  VectorXd v(2 * t.states);
  for (std::int64_t part = 0; part < 2; ++part)
    for (std::int64_t n = 0; n < t.states; ++n)
      v[part * t.states + n] =
          values[static_cast<std::size_t>(((2 * r + part) * t.heads + h) * t.states + n)];
  return v;
}

MatrixXd matrix_of_head(const S4DenseTransition& t, std::int64_t h) {
  const std::int64_t states = t.states;
  const VectorXd e = planes(t, t.e, 0, h);
  MatrixXd M = MatrixXd::Identity(2 * states, 2 * states);
  for (std::int64_t n = 0; n < states; ++n) {
    M(n, n) += e[n];
    M(n, n + states) -= e[n + states];
    M(n + states, n) += e[n + states];
    M(n + states, n + states) += e[n];
  }
  for (std::int64_t r = 0; r < t.rank; ++r)
    M -= 2.0 * planes(t, t.w, r, h) * planes(t, t.k, r, h).transpose();
  return M;
}

MatrixXd power(MatrixXd base, std::int64_t exponent) {
  MatrixXd result = MatrixXd::Identity(base.rows(), base.cols());
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) result = result * base;
    base = base * base;
  }
  return result;
}

}  // namespace

// A row C reads 2 Re(C x), so it acts on (Re x, Im x) as (Re C, -Im C).
void restore_read_out(std::vector<double>& C, std::int64_t channels,
                      const S4DenseTransition& transition, std::int64_t length) {
  const std::int64_t states = transition.states;
#pragma omp parallel for
  for (std::int64_t h = 0; h < transition.heads; ++h) {
    const MatrixXd M = power(matrix_of_head(transition, h), length);
    const Eigen::PartialPivLU<MatrixXd> solver(
        (MatrixXd::Identity(M.rows(), M.cols()) - M).transpose());
    for (std::int64_t c = 0; c < channels; ++c) {
      double* const pairs = C.data() + (c * transition.heads + h) * states * 2;
      VectorXd row(2 * states);
      for (std::int64_t n = 0; n < states; ++n) {
        row[n] = pairs[2 * n];
        row[n + states] = -pairs[2 * n + 1];
      }
      row = solver.solve(row).eval();
      for (std::int64_t n = 0; n < states; ++n) {
        pairs[2 * n] = row[n];
        pairs[2 * n + 1] = -row[n + states];
      }
    }
  }
}

}  // namespace lrnn::detail
