/// Several tokens of dplr_scan at once, where the states between them are not needed.
///
/// Of kAhead tokens v, the products s_j = <k, x_{t+j}> follow from x_t alone,
///   s_j = <conj(d)^j k, x_t> - sum_{i<j} (alpha_{j-1-i} s_i - beta_{j-1-i} v_i),   d = 1 + e,
///   alpha_m = <k, d^m w>,  beta_m = <k, d^m b>,
/// so that one reduction is waited for and d is applied once:
///   x_{t+A} = d^A x_t - sum_i d^{A-1-i} (w s_i - b v_i),   A = kAhead.
/// The read-outs follow in the same way:
///   y_j = 2 Re(C d^{j+1} x_t) - sum_{i<=j} (gamma_{j-i} s_i - kappa_{j-i} v_i),
///   gamma_m = 2 Re(C d^m w),  kappa_m = 2 Re(C d^m b) (+ D if m = 0).
#pragma once

#include "common/dplr_scan.cuh"

namespace lrnn::cuda::dplr {

struct Wide {
  double x;
  double y;
};
__device__ __forceinline__ Wide wide(float2 v) {
  return {static_cast<double>(v.x), static_cast<double>(v.y)};
}
__device__ __forceinline__ Wide operator*(Wide a, Wide b) {
  return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x};
}
__device__ __forceinline__ float2 narrow(Wide v) {
  return {static_cast<float>(v.x), static_cast<float>(v.y)};
}
template <int kLanes>
__device__ __forceinline__ float wide_group_sum(double v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return static_cast<float>(v);
}

/// Transition and drive of a walk, state by state. Backward is the same walk in the other
/// direction: with c = 2 conj(C), the adjoint z before the direct gradient moves as M^* (z + c g),
/// and M^* has the factors conj(e), k, w for e, w, k.
template <bool kReverse, int kLanes>
class WalkOperands {
 public:
  struct State {
    float2 e;
    float2 w;
    float2 k;
    float2 b;
  };

  __device__ WalkOperands(const Parameters& parameters, const Sizes& sizes,
                          const Place<kLanes>& place)
      : a_(parameters), s_(sizes), p_(place) {
    if constexpr (!kReverse) return;
    float sum = 0.0F;
    for (int n = p_.lane; n < s_.states; n += kLanes) {
      const float2 w = pair(a_.w, n);
      const float2 c = direct(n);
      sum = fmaf(w.x, c.x, fmaf(w.y, c.y, sum));
    }
    product_ = 2.0F * group_sum<kLanes>(sum);
  }

  /// State n of the head.
  __device__ __forceinline__ State at(int n) const {
    if (n >= s_.states) return {};
    const float2 e = pair(a_.e, n);
    const float2 w = pair(a_.w, n);
    const float2 k = pair(a_.k, n);
    if constexpr (!kReverse) return {e, w, k, pair(a_.b, n)};
    const float2 c = direct(n);
    const float re = fmaf(e.x, c.x, fmaf(e.y, c.y, -k.x * product_));
    const float im = fmaf(e.x, c.y, fmaf(-e.y, c.x, -k.y * product_));
    return {{e.x, -e.y}, k, w, {c.x + re, c.y + im}};
  }

  /// c of state n.
  [[nodiscard]] __device__ __forceinline__ float2 direct(int n) const {
    const float* const at = a_.C + 2 * (p_.head * s_.states + n);
    return {2.0F * at[0], -2.0F * at[1]};
  }

 private:
  [[nodiscard]] __device__ __forceinline__ float2 pair(const float* planes, int n) const {
    const float* const at = planes + p_.head * s_.states + n;
    return {at[0], at[s_.plane]};
  }

  const Parameters& a_;
  const Sizes& s_;
  const Place<kLanes>& p_;
  float product_ = 0.0F;  // <w, c>
};

/// Tables of kAhead tokens at once, of every head.
struct AheadTable {
  float2* rows;    // [H, 4 A + 1, N]: k, w, b, e, C
  float* scalars;  // [H, 4 A]: alpha, beta, gamma, kappa
};
template <int kAhead>
constexpr int kAheadRows = 4 * kAhead + 1;

/// One group per head: `s` has one sequence and one segment. In double, because errors of d would
/// be raised to its power. A kernel of its own: beside a walk it would take too many registers.
template <int kAhead, bool kReverse, int kLanes, int kThreads>
__global__ __launch_bounds__(kThreads) void dplr_scan_ahead_kernel(Sizes s, Parameters parameters,
                                                                   AheadTable table) {
  const Place<kLanes> p(s, nullptr, {0, 1});
  const WalkOperands<kReverse, kLanes> operands(parameters, s, p);
  double sums[4][kAhead] = {};
  for (int n = p.lane; n < s.states; n += kLanes) {
    const auto m = operands.at(n);
    Wide e = wide(m.e);
    if (parameters.e_low != nullptr) {
      const float* const low = parameters.e_low + p.head * s.states + n;
      e.x += static_cast<double>(low[0]);
      e.y += (kReverse ? -1.0 : 1.0) * static_cast<double>(low[s.plane]);
    }
    const Wide conj_d{1.0 + e.x, -e.y};
    const Wide d{conj_d.x, e.y};
    const Wide k = wide(m.k);
    const Wide c = wide(operands.direct(n));
    Wide kj{2.0 * k.x, 2.0 * k.y};
    Wide wj = wide(m.w);
    Wide bj = wide(m.b);
    Wide cj = c;
    float2* const row =
        table.rows + static_cast<std::int64_t>(p.head) * kAheadRows<kAhead> * s.states + n;
    const auto write = [&](int r, Wide v) {
      if (p.exists) row[r * s.states] = narrow(v);
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      sums[0][j] += 2.0 * (k.x * wj.x + k.y * wj.y);
      sums[1][j] += 2.0 * (k.x * bj.x + k.y * bj.y);
      sums[2][j] += c.x * wj.x + c.y * wj.y;
      sums[3][j] += c.x * bj.x + c.y * bj.y;
      cj = cj * conj_d;
      write(j, kj);
      write(2 * kAhead - 1 - j, wj);
      write(3 * kAhead - 1 - j, bj);
      write(3 * kAhead + 1 + j, cj);
      kj = kj * conj_d;
      wj = wj * d;
      bj = bj * d;
    }
    Wide power = e;  // d^i - 1
#pragma unroll
    for (int i = 1; i < kAhead; i *= 2) {
      const Wide square = power * power;
      power = {2.0 * power.x + square.x, 2.0 * power.y + square.y};
    }
    write(3 * kAhead, power);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      float sum = wide_group_sum<kLanes>(sums[i][j]);
      if (i == 3 && j == 0 && parameters.D != nullptr) sum += parameters.D[p.head];
      if (p.exists && p.lane == 0) table.scalars[(p.head * 4 + i) * kAhead + j] = sum;
    }
}

template <int kAhead, int kPer>
struct Ahead {
  Pairs<kPer> k[kAhead];  // 2 conj(d)^j k
  Pairs<kPer> w[kAhead];  // d^{A-1-i} w
  Pairs<kPer> b[kAhead];  // d^{A-1-i} b
  Pairs<kPer> e;          // d^A - 1
  float alpha[kAhead - 1];
  float beta[kAhead - 1];
};
/// The read-out of the token `token` of kAhead, and of all what needs no exchange.
template <int kAhead, int kPer>
struct AheadReadOut {
  Pairs<kPer> C[kAhead];  // 2 conj(C d^{j+1})
  float gamma[kAhead];    // gamma_{token - i}
  float kappa[kAhead];
  int token;  // negative: none
};

template <int kAhead, int kLanes, int kPer>
__device__ __forceinline__ Pairs<kPer> load_row(const AheadTable& table, int r, const Sizes& s,
                                                const Place<kLanes>& p) {
  const float2* const row =
      table.rows + (static_cast<std::int64_t>(p.head) * kAheadRows<kAhead> + r) * s.states;
  Pairs<kPer> out;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int n = i * kLanes + p.lane;
    out.v[i] = n < s.states ? row[n] : float2{0.0F, 0.0F};
  }
  return out;
}
template <int kAhead, int kPer, int kLanes>
__device__ __forceinline__ Ahead<kAhead, kPer> load_ahead(const AheadTable& table, const Sizes& s,
                                                          const Place<kLanes>& p) {
  Ahead<kAhead, kPer> out;
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    out.k[j] = load_row<kAhead, kLanes, kPer>(table, j, s, p);
    out.w[j] = load_row<kAhead, kLanes, kPer>(table, kAhead + j, s, p);
    out.b[j] = load_row<kAhead, kLanes, kPer>(table, 2 * kAhead + j, s, p);
  }
  out.e = load_row<kAhead, kLanes, kPer>(table, 3 * kAhead, s, p);
  const float* const scalars = table.scalars + static_cast<std::int64_t>(p.head) * 4 * kAhead;
#pragma unroll
  for (int j = 0; j < kAhead - 1; ++j) {
    out.alpha[j] = scalars[j];
    out.beta[j] = scalars[kAhead + j];
  }
  return out;
}
template <int kAhead, int kPer, int kLanes>
__device__ __forceinline__ AheadReadOut<kAhead, kPer> load_read_out(const AheadTable& table,
                                                                    const Sizes& s,
                                                                    const Place<kLanes>& p,
                                                                    int token) {
  AheadReadOut<kAhead, kPer> out;
  out.token = token;
  const float* const scalars = table.scalars + (p.head * 4 + 2) * kAhead;
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    out.C[j] = load_row<kAhead, kLanes, kPer>(table, 3 * kAhead + 1 + j, s, p);
    out.gamma[j] = j <= token ? scalars[token - j] : 0.0F;
    out.kappa[j] = j <= token ? scalars[kAhead + token - j] : 0.0F;
  }
  return out;
}

/// All products s_j, given their parts in x_t, <conj(d)^j k, x_t> in lane j of the group.
template <int kLanes, int kAhead, int kPer>
__device__ __forceinline__ void solve_products(const Ahead<kAhead, kPer>& m,
                                               const float (&v)[kAhead], float own,
                                               float (&s)[kAhead]) {
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    s[j] = token_value<kLanes>(own, j);
#pragma unroll
    for (int i = 0; i < j; ++i)
      s[j] = fmaf(-m.alpha[j - 1 - i], s[i], fmaf(m.beta[j - 1 - i], v[i], s[j]));
  }
}
template <int kAhead, int kPer>
__device__ __forceinline__ void advance_ahead(const Ahead<kAhead, kPer>& m,
                                              const float (&v)[kAhead], const float (&s)[kAhead],
                                              Pairs<kPer>& x) {
#pragma unroll
  for (int n = 0; n < kPer; ++n) {
    const float2 x0 = x.v[n];
    float re = m.b[0].v[n].x * v[0];
    float im = m.b[0].v[n].y * v[0];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i > 0) {
        re = fmaf(m.b[i].v[n].x, v[i], re);
        im = fmaf(m.b[i].v[n].y, v[i], im);
      }
      re = fmaf(-m.w[i].v[n].x, s[i], re);
      im = fmaf(-m.w[i].v[n].y, s[i], im);
    }
    re = fmaf(m.e.v[n].x, x0.x, fmaf(-m.e.v[n].y, x0.y, re));
    im = fmaf(m.e.v[n].x, x0.y, fmaf(m.e.v[n].y, x0.x, im));
    x.v[n] = {x0.x + re, x0.y + im};
  }
}
/// y of the own token, given 2 Re(C d^{j+1} x_t). Later tokens must not even be multiplied by 0.
template <int kAhead, int kPer>
__device__ __forceinline__ float read_ahead(const AheadReadOut<kAhead, kPer>& m,
                                            const float (&v)[kAhead], const float (&s)[kAhead],
                                            float y) {
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (i <= m.token) y = fmaf(-m.gamma[i], s[i], fmaf(m.kappa[i], v[i], y));
  return y;
}

/// The tokens of a group in blocks, each loaded while the one before is worked on.
template <class T, bool kReverse, int kLanes>
class TokenBlocks {
 public:
  __device__ TokenBlocks(const T* tokens, const Sizes& sizes, const Place<kLanes>& place)
      : tokens_(tokens + place.column(sizes)), heads_(sizes.heads), p_(place) {}

  /// Calls f(block, own token) for blocks [first, last), against time if kReverse.
  template <class F>
  __device__ __forceinline__ void walk(int first, int last, F&& f) const {
    float next = load(kReverse ? last - 1 : first, first, last);
    for (int i = 0; i < last - first; ++i) {
      const int block = kReverse ? last - 1 - i : first + i;
      const float own = next;
      next = load(kReverse ? block - 1 : block + 1, first, last);
      f(block, own);
    }
  }
  /// Of a block, the token that comes j-th.
  static __device__ __forceinline__ int place(int j) { return kReverse ? kBlock - 1 - j : j; }

 private:
  __device__ __forceinline__ float load(int block, int first, int last) const {
    const int t = p_.begin + block * kBlock + p_.sub;
    const bool valid = p_.exists && block >= first && block < last && t < p_.end;
    return valid ? to_float(tokens_[t * heads_]) : 0.0F;
  }

  const T* tokens_;
  std::int64_t heads_;
  const Place<kLanes>& p_;
};

/// Blocks that are full in every group of the warp; they come before all others in time.
template <int kLanes>
__device__ __forceinline__ int full_blocks(const Place<kLanes>& p) {
  return -warp_max(-p.left(p.begin, p.longest)) / kBlock;
}

}  // namespace lrnn::cuda::dplr
