/// Formulas of `dplr_discretize`, in double, the same on the host and on a device.
///
/// A team works on one head: its members own the states team.index(), team.index() + team.size(),
/// ...; team.sum() adds up over the members and team.barrier() makes their writes visible.
#pragma once

#include "lrnn/ops/dplr_discretize.hpp"

#include "ops/lane_math.hpp"

namespace lrnn::detail {

/// The parameters as a kernel sees them.
template <class T>
struct DplrSources {
  LaneSources<T> lanes;
  const T* P;
  const T* B;
  std::int64_t heads;
  std::int64_t states;
  std::int64_t rank;

  explicit DplrSources(const DplrParameters& p)
      : lanes({.method = Discretization::Bilinear,
               .lanes = p.heads * p.P.dim(2),
               .A_re = p.A_re,
               .A_im = p.A_im,
               .dt = p.dt}),
        P(p.P.data<T>()),
        B(p.B.data<T>()),
        heads(p.heads),
        states(p.P.dim(2)),
        rank(p.P.dim(0)) {}

  LRNN_HOST_DEVICE Complex P_at(std::int64_t r, std::int64_t lane) const {
    const T* const pair = P + 2 * (r * lanes.A_re.count + lanes.rate_of(lane));
    return {static_cast<double>(pair[0]), static_cast<double>(pair[1])};
  }
  LRNN_HOST_DEVICE Complex B_at(std::int64_t lane) const {
    const T* const pair = B + 2 * lanes.rate_of(lane);
    return {static_cast<double>(pair[0]), static_cast<double>(pair[1])};
  }
  LRNN_HOST_DEVICE Complex Lambda_at(std::int64_t lane) const {
    const std::int64_t j = lanes.rate_of(lane);
    return {lanes.A_re.at(j).value, lanes.A_im.at(j).value};
  }
  LRNN_HOST_DEVICE double tau_at(std::int64_t lane) const { return 2.0 / lanes.dt_of(lane).value; }
};

/// Scratch of one head.
struct DplrScratch {
  double* pairs;  // [N, 2] E
  double* G;      // [R, R]
  double* S;      // [R, R]; in backward dS
  double* m;      // [R] <P_s, E B>
  double* dm;     // [R]

  /// Doubles that one head needs.
  static std::int64_t size(std::int64_t states, std::int64_t rank) {
    return 2 * states + 2 * rank * rank + 2 * rank;
  }
  LRNN_HOST_DEVICE DplrScratch(double* memory, std::int64_t states, std::int64_t rank)
      : pairs(memory),
        G(memory + 2 * states),
        S(G + rank * rank),
        m(S + rank * rank),
        dm(m + rank) {}
  LRNN_HOST_DEVICE Complex E(std::int64_t n) const { return {pairs[2 * n], pairs[2 * n + 1]}; }
  LRNN_HOST_DEVICE void set_E(std::int64_t n, Complex v) const {
    pairs[2 * n] = v.re;
    pairs[2 * n + 1] = v.im;
  }
};

/// Re conj(p) q
LRNN_HOST_DEVICE inline double dot(Complex p, Complex q) {
  return p.re * q.re + p.im * q.im;
}

/// G = S^-1 by elimination, which destroys S. No pivots: the symmetric part of S is at least 1.
LRNN_HOST_DEVICE inline void invert(double* S, double* G, std::int64_t n) {
  for (std::int64_t i = 0; i < n * n; ++i) G[i] = i % (n + 1) == 0 ? 1.0 : 0.0;
  for (std::int64_t p = 0; p < n; ++p) {
    const double scale = 1.0 / S[p * n + p];
    for (std::int64_t j = 0; j < n; ++j) {
      S[p * n + j] *= scale;
      G[p * n + j] *= scale;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const double factor = S[i * n + p];
      if (i == p) continue;
      for (std::int64_t j = 0; j < n; ++j) {
        S[i * n + j] -= factor * S[p * n + j];
        G[i * n + j] -= factor * G[p * n + j];
      }
    }
  }
}

/// Fills E, G and m of a head.
template <class T, class Team>
LRNN_HOST_DEVICE void dplr_solve(const Team& team, const DplrSources<T>& p, std::int64_t head,
                                 const DplrScratch& x) {
  const std::int64_t first = head * p.states;
  for (std::int64_t n = team.index(); n < p.states; n += team.size()) {
    const Complex Lambda = p.Lambda_at(first + n);
    x.set_E(n, inverse({p.tau_at(first + n) - Lambda.re, -Lambda.im}));
  }
  for (std::int64_t r = 0; r < p.rank; ++r) {
    for (std::int64_t s = 0; s < p.rank; ++s) {
      double sum = 0.0;
      for (std::int64_t n = team.index(); n < p.states; n += team.size())
        sum += 2.0 * dot(p.P_at(r, first + n), x.E(n) * p.P_at(s, first + n));
      sum = team.sum(sum);
      if (team.index() == 0) x.S[r * p.rank + s] = sum + (r == s ? 1.0 : 0.0);
    }
    double sum = 0.0;
    for (std::int64_t n = team.index(); n < p.states; n += team.size())
      sum += 2.0 * dot(p.P_at(r, first + n), x.E(n) * p.B_at(first + n));
    sum = team.sum(sum);
    if (team.index() == 0) x.m[r] = sum;
  }
  team.barrier();
  if (team.index() == 0) invert(x.S, x.G, p.rank);
  team.barrier();
}

/// w_s of a state.
template <class T>
LRNN_HOST_DEVICE Complex dplr_w(const DplrSources<T>& p, const DplrScratch& x, std::int64_t lane,
                                Complex E, std::int64_t s) {
  Complex sum{0.0, 0.0};
  for (std::int64_t r = 0; r < p.rank; ++r) sum = sum + x.G[r * p.rank + s] * p.P_at(r, lane);
  return E * sum;
}

/// Planes of complex numbers [fields, 2, lanes].
template <class T>
struct DplrPlanes {
  T* data;
  std::int64_t lanes;

  LRNN_HOST_DEVICE Complex read(std::int64_t field, std::int64_t lane) const {
    const T* const p = data + 2 * field * lanes + lane;
    return {static_cast<double>(p[0]), static_cast<double>(p[lanes])};
  }
  LRNN_HOST_DEVICE void write(std::int64_t field, std::int64_t lane, Complex v) const {
    T* const p = data + 2 * field * lanes + lane;
    p[0] = static_cast<T>(v.re);
    p[lanes] = static_cast<T>(v.im);
  }
};

template <class T>
struct DplrOperands {
  DplrPlanes<T> e;
  DplrPlanes<T> w;
  DplrPlanes<T> k;
  DplrPlanes<T> b;
};

template <class T, class Team>
LRNN_HOST_DEVICE void dplr_forward(const Team& team, const DplrSources<T>& p, std::int64_t head,
                                   const DplrScratch& x, const DplrOperands<T>& out,
                                   const DplrPlanes<T>& e_low) {
  dplr_solve(team, p, head, x);
  for (std::int64_t n = team.index(); n < p.states; n += team.size()) {
    const std::int64_t lane = head * p.states + n;
    const Complex E = x.E(n);
    const Complex e = 2.0 * (p.Lambda_at(lane) * E);
    out.e.write(0, lane, e);
    if (e_low.data != nullptr)
      e_low.write(0, lane,
                  {e.re - static_cast<double>(static_cast<T>(e.re)),
                   e.im - static_cast<double>(static_cast<T>(e.im))});
    Complex b = E * p.B_at(lane);
    for (std::int64_t s = 0; s < p.rank; ++s) {
      const Complex w = dplr_w(p, x, lane, E, s);
      out.w.write(s, lane, w);
      out.k.write(s, lane, 2.0 * p.tau_at(lane) * (conj(E) * p.P_at(s, lane)));
      b = b + -x.m[s] * w;
    }
    out.b.write(0, lane, 2.0 * b);
  }
}

/// Gradients of the parameters of every lane, before sums over lanes that share a parameter.
/// Rows: those of A_re, A_im and dt, then real and imaginary part of B and of P_r.
struct DplrGradients {
  double* data;  // [rows, lanes]
  std::int64_t lanes;

  static std::int64_t rows(std::int64_t rank) { return 5 + 2 * rank; }
  LRNN_HOST_DEVICE void write(std::int64_t row, std::int64_t lane, double v) const {
    data[row * lanes + lane] = v;
  }
  LRNN_HOST_DEVICE void write(std::int64_t row, std::int64_t lane, Complex v) const {
    write(row, lane, v.re);
    write(row + 1, lane, v.im);
  }
};

/// dw_s with what w_s does to b.
template <class T>
LRNN_HOST_DEVICE Complex dplr_dw(const DplrOperands<const T>& d, const DplrScratch& x,
                                 std::int64_t lane, std::int64_t s) {
  return d.w.read(s, lane) + -2.0 * x.m[s] * d.b.read(0, lane);
}

/// Fills dm and, in S, dS of a head after dplr_solve.
template <class T, class Team>
LRNN_HOST_DEVICE void dplr_solve_backward(const Team& team, const DplrSources<T>& p,
                                          std::int64_t head, const DplrScratch& x,
                                          const DplrOperands<const T>& d) {
  const std::int64_t first = head * p.states;
  const std::int64_t R = p.rank;
  // dS = -G^T dG G^T with dG_{rs} = sum_n Re(conj(dw_s) E P_r).
  for (std::int64_t s = 0; s < R; ++s) {
    double sum = 0.0;
    for (std::int64_t n = team.index(); n < p.states; n += team.size())
      sum += 2.0 * dot(d.b.read(0, first + n), dplr_w(p, x, first + n, x.E(n), s));
    sum = team.sum(sum);
    if (team.index() == 0) x.dm[s] = -sum;
    for (std::int64_t r = 0; r < R; ++r) {
      sum = 0.0;
      for (std::int64_t n = team.index(); n < p.states; n += team.size()) {
        Complex v{0.0, 0.0};
        for (std::int64_t j = 0; j < R; ++j) v = v + x.G[j * R + r] * p.P_at(j, first + n);
        sum += dot(dplr_dw(d, x, first + n, s), x.E(n) * v);
      }
      sum = team.sum(sum);
      if (team.index() == 0) x.S[r * R + s] = sum;
    }
  }
  team.barrier();
  // S holds G^T dG.
  for (std::int64_t r = team.index(); r < R; r += team.size()) {
    double row[kMaxDplrRank];
    for (std::int64_t s = 0; s < R; ++s) {
      row[s] = 0.0;
      for (std::int64_t j = 0; j < R; ++j) row[s] -= x.S[r * R + j] * x.G[s * R + j];
    }
    for (std::int64_t s = 0; s < R; ++s) x.S[r * R + s] = row[s];
  }
  team.barrier();
}

template <class T>
LRNN_HOST_DEVICE void dplr_backward_state(const DplrSources<T>& p, const DplrScratch& x,
                                          std::int64_t lane, Complex E,
                                          const DplrOperands<const T>& d,
                                          const DplrGradients& out) {
  const std::int64_t R = p.rank;
  const double tau = p.tau_at(lane);
  const Complex Lambda = p.Lambda_at(lane);
  const Complex B = p.B_at(lane);
  const Complex de = d.e.read(0, lane);
  Complex dh = 2.0 * d.b.read(0, lane);  // of h = E B
  Complex dE = 2.0 * (de * conj(Lambda));
  double dtau = 0.0;
  for (std::int64_t r = 0; r < R; ++r) {
    const Complex P = p.P_at(r, lane);
    const Complex dk = d.k.read(r, lane);
    dh = dh + 2.0 * x.dm[r] * P;
    Complex dW{0.0, 0.0};  // of E P_r
    Complex dP = 2.0 * x.dm[r] * (E * B) + 2.0 * tau * (E * dk);
    for (std::int64_t s = 0; s < R; ++s) {
      dW = dW + x.G[r * R + s] * dplr_dw(d, x, lane, s) + 2.0 * x.S[s * R + r] * p.P_at(s, lane);
      dP = dP + 2.0 * x.S[r * R + s] * (E * p.P_at(s, lane));
    }
    dP = dP + dW * conj(E);
    dE = dE + dW * conj(P) + 2.0 * tau * (P * conj(dk));
    dtau += 2.0 * dot(dk, conj(E) * P);
    out.write(5 + 2 * r, lane, dP);
  }
  dE = dE + dh * conj(B);
  const Complex E2 = E * E;
  const Complex dLambda = 2.0 * (de * conj(E)) + dE * conj(E2);
  dtau -= dot(dE, E2);
  const std::int64_t j = p.lanes.rate_of(lane);
  const LaneValue dt = p.lanes.dt_of(lane);
  out.write(0, lane, dLambda.re * p.lanes.A_re.at(j).slope);
  out.write(1, lane, dLambda.im * p.lanes.A_im.at(j).slope);
  out.write(2, lane, -0.5 * tau * tau * dtau * dt.slope);
  out.write(3, lane, dh * conj(E));
}

template <class T, class Team>
LRNN_HOST_DEVICE void dplr_backward(const Team& team, const DplrSources<T>& p, std::int64_t head,
                                    const DplrScratch& x, const DplrOperands<const T>& d,
                                    const DplrGradients& out) {
  dplr_solve(team, p, head, x);
  dplr_solve_backward(team, p, head, x, d);
  for (std::int64_t n = team.index(); n < p.states; n += team.size())
    dplr_backward_state(p, x, head * p.states + n, x.E(n), d, out);
}

/// Which elements of a row of DplrGradients make element j of a parameter: lanes j * first + i *
/// next, i < uses.
struct DplrShare {
  std::int64_t first;
  std::int64_t next;
  std::int64_t uses;

  static DplrShare of_rates(std::int64_t lanes, std::int64_t count) {
    return {1, count, lanes / count};
  }
  static DplrShare of_steps(std::int64_t lanes, std::int64_t count) {
    return {lanes / count, 1, lanes / count};
  }
};

}  // namespace lrnn::detail
