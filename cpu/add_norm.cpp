#include "lrnn/ops/add_norm.hpp"

#include <algorithm>

#include "common/eigen.hpp"

namespace lrnn::cpu {
namespace {

// A constant, so that sums over rows do not depend on the number of threads.
constexpr Eigen::Index kRowsPerBlock = 32;

template <class T>
void forward(const AddNormForward& a) {
  const auto x = as_rows<T>(a.x);
  auto y = as_rows<T>(a.y);
  const auto weight = as_row_vector<T>(a.weight);
  const bool layer = a.kind == NormKind::Layer;
#pragma omp parallel for
  for (Eigen::Index i = 0; i < x.rows(); ++i) {
    RowVector<T> r = x.row(i);
    if (a.residual) r += as_rows<T>(a.residual).row(i);
    if (a.residual_out) as_rows<T>(a.residual_out).row(i) = r;
    const T mean = layer ? r.mean() : T(0);
    if (layer) r -= mean;
    const T rstd = T(1) / std::sqrt(r.square().mean() + static_cast<T>(a.eps));
    y.row(i) = r * rstd * weight;
    if (a.bias) y.row(i) += as_row_vector<T>(a.bias);
    if (a.rstd) a.rstd.data<T>()[i] = rstd;
    if (a.mean) a.mean.data<T>()[i] = mean;
  }
}

template <class T>
void backward(const AddNormBackward& a) {
  const auto dy = as_rows<T>(a.dy);
  const auto r = as_rows<T>(a.r);
  const auto weight = as_row_vector<T>(a.weight);
  auto dx = as_rows<T>(a.dx);
  const bool layer = a.kind == NormKind::Layer;
  const Eigen::Index blocks = (r.rows() + kRowsPerBlock - 1) / kRowsPerBlock;
  Matrix<T> dweight = Matrix<T>::Zero(blocks, r.cols());
  Matrix<T> dbias = Matrix<T>::Zero(blocks, r.cols());
#pragma omp parallel for
  for (Eigen::Index b = 0; b < blocks; ++b)
    for (Eigen::Index i = b * kRowsPerBlock; i < std::min(r.rows(), (b + 1) * kRowsPerBlock); ++i) {
      const T rstd = a.rstd.data<T>()[i];
      const T mean = layer ? a.mean.data<T>()[i] : T(0);
      const RowVector<T> n = (r.row(i) - mean) * rstd;
      const RowVector<T> g = dy.row(i) * weight;
      RowVector<T> dr = rstd * (g - n * (g * n).mean() - (layer ? g.mean() : T(0)));
      if (a.dresidual_out) dr += as_rows<T>(a.dresidual_out).row(i);
      dx.row(i) = dr;
      if (a.dresidual) as_rows<T>(a.dresidual).row(i) = dr;
      dweight.row(b) += dy.row(i) * n;
      dbias.row(b) += dy.row(i);
    }
  auto dweight_out = as_row_vector<T>(a.dweight);
  for (Eigen::Index b = 0; b < blocks; ++b) {
    dweight_out += dweight.row(b);
    if (a.dbias) as_row_vector<T>(a.dbias) += dbias.row(b);
  }
}

}  // namespace

void add_norm_forward(Context&, const AddNormForward& a) {
  visit_float("add_norm_forward", a.x.dtype(), [&]<class T>() { forward<T>(a); });
}
void add_norm_backward(Context&, const AddNormBackward& a) {
  visit_float("add_norm_backward", a.dy.dtype(), [&]<class T>() { backward<T>(a); });
}

}  // namespace lrnn::cpu
