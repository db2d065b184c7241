#include "lrnn/ops/s7_scan.hpp"

#include <algorithm>
#include <vector>

#include "common/eigen.hpp"
#include "ops/s7_scan.hpp"

namespace lrnn::cpu {
namespace {

// Tokens of one tile, and projection rows (h, n) formed at a time. Constants, so that sums do not
// depend on the number of threads; a tile of both fits the L2 cache.
constexpr Eigen::Index kTileTokens = 64;
constexpr Eigen::Index kTileRows = 256;

template <class T>
using Dense = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using ConstMap = Eigen::Map<const Dense<T>>;
template <class T>
using MutableMap = Eigen::Map<Dense<T>>;

template <class T>
ConstMap<T> matrix(TensorView t) {
  return {t.data<T>(), t.numel() / t.dim(-1), t.dim(-1)};
}
template <class T>
MutableMap<T> matrix(MutableTensorView t) {
  return {t.data<T>(), t.numel() / t.dim(-1), t.dim(-1)};
}

/// Sizes, and which tokens count.
struct Problem {
  Eigen::Index batch, seqlen, dim, dstate;
  Eigen::Index channels_per_block;  // channels whose N rows are formed together
  const std::int32_t* lengths;

  Problem(const Shape& x, std::int64_t n, TensorView lens)
      : batch(x[0]),
        seqlen(x[1]),
        dim(x[2]),
        dstate(n),
        channels_per_block(std::max<Eigen::Index>(1, kTileRows / n)),
        lengths(lens ? lens.data<std::int32_t>() : nullptr) {}
  [[nodiscard]] Eigen::Index tokens() const { return batch * seqlen; }
  [[nodiscard]] Eigen::Index tiles() const { return (tokens() + kTileTokens - 1) / kTileTokens; }
  [[nodiscard]] Eigen::Index length(Eigen::Index b) const {
    return lengths != nullptr ? lengths[b] : seqlen;
  }
  [[nodiscard]] bool valid(Eigen::Index token) const {
    return token % seqlen < length(token / seqlen);
  }
};

// Calls f(first token, count) for every tile of tokens, tiles in parallel.
template <class F>
void for_each_tile(const Problem& p, F&& f) {
#pragma omp parallel for schedule(dynamic)
  for (Eigen::Index i = 0; i < p.tiles(); ++i)
    f(i * kTileTokens, std::min(kTileTokens, p.tokens() - i * kTileTokens));
}

// Calls f(first channel, count) for every block of channels.
template <class F>
void for_each_block(const Problem& p, F&& f) {
  for (Eigen::Index h = 0; h < p.dim; h += p.channels_per_block)
    f(h, std::min(p.channels_per_block, p.dim - h));
}

// sum over h of w[h] projection[h, :] for a tile, where projection = x W^T, W [(h, n), H].
template <class T>
void contract_channels(const Problem& p, const ConstMap<T>& W, const Dense<T>& x, const Dense<T>& w,
                       Dense<T>& out) {
  Dense<T> tile;
  for_each_block(p, [&](Eigen::Index h0, Eigen::Index count) {
    tile.noalias() = x * W.middleRows(h0 * p.dstate, count * p.dstate).transpose();
    for (Eigen::Index t = 0; t < x.rows(); ++t)
      for (Eigen::Index h = 0; h < count; ++h)
        out.row(t) += w(t, h0 + h) * tile.row(t).segment(h * p.dstate, p.dstate);
  });
}

// For each h: sum over n of projection[h, n] w[n].
template <class T>
void contract_states(const Problem& p, const ConstMap<T>& W, const Dense<T>& x, const Dense<T>& w,
                     Dense<T>& out) {
  Dense<T> tile;
  for_each_block(p, [&](Eigen::Index h0, Eigen::Index count) {
    tile.noalias() = x * W.middleRows(h0 * p.dstate, count * p.dstate).transpose();
    for (Eigen::Index t = 0; t < x.rows(); ++t)
      for (Eigen::Index h = 0; h < count; ++h)
        out(t, h0 + h) += tile.row(t).segment(h * p.dstate, p.dstate).dot(w.row(t));
  });
}

// A in, a out.
template <class T>
T multiplier(T A) {
  return T(1) - T(1) / (A * A + T(0.5));
}

// s_t from A_t and the drive, in place of the drive.
template <class T>
void scan(const Problem& p, const Dense<T>& A, const T* state_in, Dense<T>& s, T* state_out) {
#pragma omp parallel for
  for (Eigen::Index b = 0; b < p.batch; ++b) {
    RowVector<T> state = RowVector<T>::Zero(p.dstate);
    if (state_in != nullptr)
      state = Eigen::Map<const RowVector<T>>(state_in + b * p.dstate, p.dstate);
    for (Eigen::Index t = b * p.seqlen; t < (b + 1) * p.seqlen; ++t) {
      if (p.valid(t))
        for (Eigen::Index n = 0; n < p.dstate; ++n)
          state(n) = multiplier(A(t, n)) * state(n) + s(t, n);
      s.row(t) = state;
    }
    if (state_out != nullptr) Eigen::Map<RowVector<T>>(state_out + b * p.dstate, p.dstate) = state;
  }
}

template <class T>
void forward(const S7ScanForward& a) {
  const Problem p(a.x.shape(), a.base.dim(0), a.lengths);
  const detail::S7Rows rows{p.dim, p.dstate};
  const auto x = matrix<T>(a.x);
  const auto W_A = matrix<T>(rows.A(a.weight));
  const auto W_B = matrix<T>(rows.B(a.weight));
  const auto W_C = matrix<T>(rows.C(a.weight));
  const auto W_Db = matrix<T>(rows.D_bias(a.weight));
  const Eigen::Map<const Eigen::Matrix<T, 1, Eigen::Dynamic>> base(a.base.data<T>(), p.dstate);
  Dense<T> A(p.tokens(), p.dstate);
  Dense<T> s(p.tokens(), p.dstate);
  Dense<T> skip(p.tokens(), p.dim);
  for_each_tile(p, [&](Eigen::Index t0, Eigen::Index count) {
    const Dense<T> xt = x.middleRows(t0, count);
    Dense<T> tile = xt * W_A.transpose();
    A.middleRows(t0, count) = tile.rowwise() + base;
    tile = xt * W_Db.transpose();
    skip.middleRows(t0, count) = tile.leftCols(p.dim);
    Dense<T> drive = tile.rightCols(p.dstate);
    contract_channels<T>(p, W_B, xt, xt, drive);
    s.middleRows(t0, count) = drive;
  });
  scan<T>(p, A, a.state_in ? a.state_in.data<T>() : nullptr, s,
          a.state_out ? a.state_out.data<T>() : nullptr);
  auto y = matrix<T>(a.y);
  for_each_tile(p, [&](Eigen::Index t0, Eigen::Index count) {
    const Dense<T> xt = x.middleRows(t0, count);
    Dense<T> out = skip.middleRows(t0, count).cwiseProduct(xt);
    contract_states<T>(p, W_C, xt, s.middleRows(t0, count), out);
    for (Eigen::Index t = 0; t < count; ++t)
      if (!p.valid(t0 + t)) out.row(t).setZero();
    y.middleRows(t0, count) = out;
  });
  if (a.A) matrix<T>(a.A) = A;
  if (a.s) matrix<T>(a.s) = s;
}

/// What the reverse scan leaves: g (gradient of the drive) and dA, both [tokens, N].
template <class T>
struct Reverse {
  Dense<T> g;
  Dense<T> dA;
};

// g holds P_t = sum_h C_t[h, :] dy_t[h] on entry.
template <class T>
void reverse_scan(const Problem& p, const S7ScanBackward& a, const ConstMap<T>& A,
                  const ConstMap<T>& s, Reverse<T>& r) {
#pragma omp parallel for
  for (Eigen::Index b = 0; b < p.batch; ++b) {
    RowVector<T> carry = RowVector<T>::Zero(p.dstate);
    if (a.dstate_out)
      carry = Eigen::Map<const RowVector<T>>(a.dstate_out.data<T>() + b * p.dstate, p.dstate);
    for (Eigen::Index i = p.seqlen - 1; i >= 0; --i) {
      const Eigen::Index t = b * p.seqlen + i;
      if (!p.valid(t)) {
        r.g.row(t).setZero();
        r.dA.row(t).setZero();
        continue;
      }
      for (Eigen::Index n = 0; n < p.dstate; ++n) {
        T before = T(0);
        if (i > 0)
          before = s(t - 1, n);
        else if (a.state_in)
          before = a.state_in.data<T>()[b * p.dstate + n];
        const T g = r.g(t, n) + carry(n);
        const T square = A(t, n) * A(t, n) + T(0.5);
        r.g(t, n) = g;
        r.dA(t, n) = g * before * T(2) * A(t, n) / (square * square);
        carry(n) = multiplier(A(t, n)) * g;
      }
    }
    if (a.dstate_in)
      Eigen::Map<RowVector<T>>(a.dstate_in.data<T>() + b * p.dstate, p.dstate) = carry;
  }
}

// The rank-one rows u_t[h] v_t[n] of a tile for channels [h0, h0 + count).
template <class T, class U, class V>
void outer_rows(const Problem& p, const U& u, const V& v, Eigen::Index h0, Eigen::Index count,
                Dense<T>& out) {
  out.resize(u.rows(), count * p.dstate);
  for (Eigen::Index t = 0; t < u.rows(); ++t)
    for (Eigen::Index h = 0; h < count; ++h)
      out.row(t).segment(h * p.dstate, p.dstate) = u(t, h0 + h) * v.row(t);
}

// dW[(h, n), :] += sum_t u_t[h] v_t[n] x_t, blocks of channels in parallel, tokens in order.
template <class T>
void accumulate_outer(const Problem& p, const Dense<T>& u, const Dense<T>& v, const ConstMap<T>& x,
                      MutableMap<T> dW) {
  const Eigen::Index blocks = (p.dim + p.channels_per_block - 1) / p.channels_per_block;
#pragma omp parallel for schedule(dynamic)
  for (Eigen::Index i = 0; i < blocks; ++i) {
    const Eigen::Index h0 = i * p.channels_per_block;
    const Eigen::Index count = std::min(p.channels_per_block, p.dim - h0);
    Dense<T> tile;
    for (Eigen::Index t0 = 0; t0 < p.tokens(); t0 += kTileTokens) {
      const Eigen::Index n = std::min(kTileTokens, p.tokens() - t0);
      outer_rows(p, u.middleRows(t0, n), v.middleRows(t0, n), h0, count, tile);
      dW.middleRows(h0 * p.dstate, count * p.dstate).noalias() +=
          tile.transpose() * x.middleRows(t0, n);
    }
  }
}

// Contributions of the (h, n) rows to dx of a tile: (u outer v) W.
template <class T>
void add_outer_times(const Problem& p, const Dense<T>& u, const Dense<T>& v, const ConstMap<T>& W,
                     Dense<T>& dx) {
  Dense<T> tile;
  for_each_block(p, [&](Eigen::Index h0, Eigen::Index count) {
    outer_rows(p, u, v, h0, count, tile);
    dx.noalias() += tile * W.middleRows(h0 * p.dstate, count * p.dstate);
  });
}

template <class T>
void backward(const S7ScanBackward& a) {
  const Problem p(a.x.shape(), a.A.dim(2), a.lengths);
  const detail::S7Rows rows{p.dim, p.dstate};
  const auto x = matrix<T>(a.x);
  const auto A = matrix<T>(a.A);
  const auto s = matrix<T>(a.s);
  const auto W_A = matrix<T>(rows.A(a.weight));
  const auto W_B = matrix<T>(rows.B(a.weight));
  const auto W_C = matrix<T>(rows.C(a.weight));
  const auto W_Db = matrix<T>(rows.D_bias(a.weight));
  Dense<T> dy = matrix<T>(a.dy);
  for (Eigen::Index t = 0; t < p.tokens(); ++t)
    if (!p.valid(t)) dy.row(t).setZero();

  Reverse<T> r{Dense<T>::Zero(p.tokens(), p.dstate), Dense<T>(p.tokens(), p.dstate)};
  for_each_tile(p, [&](Eigen::Index t0, Eigen::Index count) {
    Dense<T> P = Dense<T>::Zero(count, p.dstate);
    contract_channels<T>(p, W_C, x.middleRows(t0, count), dy.middleRows(t0, count), P);
    r.g.middleRows(t0, count) = P;
  });
  reverse_scan<T>(p, a, A, s, r);

  auto dx = matrix<T>(a.dx);
  Dense<T> dD_bias(p.tokens(), p.dim + p.dstate);  // gradients of pD and bias
  for_each_tile(p, [&](Eigen::Index t0, Eigen::Index count) {
    const Dense<T> xt = x.middleRows(t0, count);
    const Dense<T> dyt = dy.middleRows(t0, count);
    const Dense<T> gt = r.g.middleRows(t0, count);
    const Dense<T> pD = xt * W_Db.topRows(p.dim).transpose();
    Dense<T> small(count, p.dim + p.dstate);
    small.leftCols(p.dim) = dyt.cwiseProduct(xt);
    small.rightCols(p.dstate) = gt;
    Dense<T> out = dyt.cwiseProduct(pD);
    out.noalias() += r.dA.middleRows(t0, count) * W_A;
    out.noalias() += small * W_Db;
    contract_states<T>(p, W_B, xt, gt, out);
    add_outer_times<T>(p, xt, gt, W_B, out);
    add_outer_times<T>(p, dyt, s.middleRows(t0, count), W_C, out);
    dD_bias.middleRows(t0, count) = small;
    for (Eigen::Index t = 0; t < count; ++t)
      if (!p.valid(t0 + t)) out.row(t).setZero();
    dx.middleRows(t0, count) = out;
  });

  matrix<T>(rows.A(a.dweight)).noalias() += r.dA.transpose() * x;
  matrix<T>(rows.D_bias(a.dweight)).noalias() += dD_bias.transpose() * x;
  accumulate_outer<T>(p, x, r.g, x, matrix<T>(rows.B(a.dweight)));
  accumulate_outer<T>(p, dy, s, x, matrix<T>(rows.C(a.dweight)));
  Eigen::Map<Eigen::Matrix<T, 1, Eigen::Dynamic>>(a.dbase.data<T>(), p.dstate) +=
      r.dA.colwise().sum();
}

}  // namespace

void s7_scan_forward(Context&, const S7ScanForward& a) {
  visit_float("s7_scan_forward", a.x.dtype(), [&]<class T>() { forward<T>(a); });
}
void s7_scan_backward(Context&, const S7ScanBackward& a) {
  visit_float("s7_scan_backward", a.x.dtype(), [&]<class T>() { backward<T>(a); });
}

}  // namespace lrnn::cpu
