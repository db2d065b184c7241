// Channels are the vector lanes: a pack of channels keeps its N states in registers while time
// runs. Work items are (sequence, pack or group of packs): constants, so that sums do not depend on
// the number of threads.
#include "lrnn/ops/selective_scan.hpp"

#include <algorithm>
#include <vector>

#include "common/pack.hpp"
#include "common/rows.hpp"
#include "selective_scan_float.hpp"

namespace lrnn::cpu {
namespace {

using Disc = SelectiveDiscretization;

constexpr int kPacksPerGroup = 8;  // channels whose parts of dB and dC are added in one item

// expm1(delta A) / A, stable at A = 0.
template <class T>
Pack<T> zoh_factor(const Pack<T>& delta, const Pack<T>& A) {
  Pack<T> k;
  for (int i = 0; i < kLanes<T>; ++i) {
    const T x = delta(i) * A(i);
    k(i) = std::abs(x) < T(1e-3)
               ? delta(i) * (T(1) + x / T(2) * (T(1) + x / T(3) * (T(1) + x / T(4))))
               : std::expm1(x) / A(i);
  }
  return k;
}

// d/dA of expm1(delta A) / A = delta^2 psi(delta A), psi(x) = ((x - 1) e^x + 1) / x^2.
template <class T>
Pack<T> zoh_factor_dA(const Pack<T>& delta, const Pack<T>& A) {
  Pack<T> d;
  for (int i = 0; i < kLanes<T>; ++i) {
    const T x = delta(i) * A(i);
    T psi = T(0);
    if (std::abs(x) < T(0.3)) {  // sum over k of x^k / (k! (k + 2))
      T term = T(1);
      for (int k = 0; k < 14; ++k) {
        psi += term / T(k + 2);
        term *= x / T(k + 1);
      }
    } else {
      psi = ((x - T(1)) * std::exp(x) + T(1)) / (x * x);
    }
    d(i) = delta(i) * delta(i) * psi;
  }
  return d;
}

template <class T, Disc disc>
Pack<T> multiplier(const Pack<T>& alpha, const Pack<T>& A) {
  if constexpr (disc == Disc::Bilinear) {
    const Pack<T> v = alpha * A * T(0.5);
    return (T(1) + v) / (T(1) - v);
  } else {
    return (alpha * A).exp();
  }
}
template <class T, Disc disc>
Pack<T> input_factor(const Pack<T>& delta, const Pack<T>& A) {
  if constexpr (disc == Disc::Mamba) return delta;
  if constexpr (disc == Disc::Zoh) return zoh_factor<T>(delta, A);
  if constexpr (disc == Disc::Bilinear) return delta / (T(1) - delta * A * T(0.5));
  return Pack<T>::Ones();
}

/// Gradients of a = a(alpha, A) and k = k(delta, A), given those of a and k.
template <class T>
struct ChainRule {
  Pack<T> dalpha = Pack<T>::Zero();
  Pack<T> ddelta = Pack<T>::Zero();  // through k

  template <Disc disc>
  Pack<T> add(const Pack<T>& da, const Pack<T>& dk, const Pack<T>& a, const Pack<T>& alpha,
              const Pack<T>& delta, const Pack<T>& A) {
    if constexpr (disc == Disc::Bilinear) {
      const Pack<T> qa = T(1) / (T(1) - alpha * A * T(0.5)).square();
      const Pack<T> qk = T(1) / (T(1) - delta * A * T(0.5)).square();
      dalpha += da * A * qa;
      ddelta += dk * qk;
      return da * alpha * qa + dk * delta.square() * qk * T(0.5);
    }
    dalpha += da * a * A;
    Pack<T> dA = da * a * alpha;
    if constexpr (disc == Disc::Mamba) ddelta += dk;
    if constexpr (disc == Disc::Zoh) {
      ddelta += dk * (delta * A).exp();
      dA += dk * zoh_factor_dA<T>(delta, A);
    }
    return dA;
  }
};

/// Operands as pointers, and sizes.
template <class T>
struct Problem {
  Rows<const T> u, dt, B, C, z;
  const T* dt_bias;
  const T* A_log;
  const T* D;
  const T* tau;
  const T* dtA_bias;
  const T* state_in;
  const std::int32_t* lengths;
  std::int64_t batch, seqlen, channels, dstate, packs;

  explicit Problem(const SelectiveScanInputs& in)
      : u(rows_of<T>(in.u)),
        dt(rows_of<T>(in.dt)),
        B(rows_of<T>(in.B)),
        C(rows_of<T>(in.C)),
        z(in.z ? rows_of<T>(in.z) : Rows<const T>{}),
        dt_bias(in.dt_bias.data<T>()),
        A_log(in.A_log.data<T>()),
        D(in.D ? in.D.data<T>() : nullptr),
        tau(in.integration_timesteps ? in.integration_timesteps.data<T>() : nullptr),
        dtA_bias(in.dtA_bias ? in.dtA_bias.data<T>() : nullptr),
        state_in(in.state_in ? in.state_in.data<T>() : nullptr),
        lengths(in.lengths ? in.lengths.data<std::int32_t>() : nullptr),
        batch(in.u.dim(0)),
        seqlen(in.u.dim(1)),
        channels(in.u.dim(2)),
        dstate(in.A_log.dim(1)),
        packs((channels + kLanes<T> - 1) / kLanes<T>) {}
  [[nodiscard]] std::int64_t length(std::int64_t b) const {
    return lengths != nullptr ? lengths[b] : seqlen;
  }
};

/// One pack of channels of one sequence: its constants and the inputs of a token.
template <class T>
struct Lanes {
  const Problem<T>& p;
  std::int64_t b, first, count;
  std::vector<Pack<T>> A;  // [N]
  Pack<T> dt_bias, D, rate;

  Lanes(const Problem<T>& problem, std::int64_t sequence, std::int64_t pack)
      : p(problem),
        b(sequence),
        first(pack * kLanes<T>),
        count(std::min<std::int64_t>(kLanes<T>, problem.channels - first)),
        A(static_cast<std::size_t>(problem.dstate)),
        dt_bias(load(problem.dt_bias + first, count)),
        D(problem.D != nullptr ? load(problem.D + first, count) : Pack<T>(Pack<T>::Zero())),
        rate(Pack<T>::Zero()) {
    for (std::int64_t n = 0; n < p.dstate; ++n) {
      Pack<T> log = Pack<T>::Zero();
      for (std::int64_t i = 0; i < count; ++i) log(i) = p.A_log[(first + i) * p.dstate + n];
      A[static_cast<std::size_t>(n)] = -log.exp();
    }
    if (p.dtA_bias != nullptr) rate = softplus<T>(load(p.dtA_bias + first, count));
  }
  [[nodiscard]] std::int64_t row(std::int64_t t) const { return b * p.seqlen + t; }
  [[nodiscard]] Pack<T> raw_dt(std::int64_t t) const {
    return load(p.dt[row(t)] + first, count) + dt_bias;
  }
  [[nodiscard]] Pack<T> u(std::int64_t t) const { return load(p.u[row(t)] + first, count); }
  [[nodiscard]] Pack<T> alpha(std::int64_t t, const Pack<T>& delta) const {
    return p.tau != nullptr ? Pack<T>(rate * p.tau[row(t)]) : delta;
  }
  // Element (channel, n) of a [.., E, N] tensor whose channel 0 is at `base`.
  void read_states(const T* base, Pack<T>* h) const {
    for (std::int64_t n = 0; n < p.dstate; ++n)
      for (std::int64_t i = 0; i < kLanes<T>; ++i)
        h[n](i) = i < count && base != nullptr ? base[(first + i) * p.dstate + n] : T(0);
  }
  void write_states(const Pack<T>* h, T* base) const {
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t n = 0; n < p.dstate; ++n) base[(first + i) * p.dstate + n] = h[n](i);
  }
};

template <class T>
T* state_row(const Problem<T>& p, T* base, std::int64_t row) {
  return base == nullptr ? nullptr : base + row * p.channels * p.dstate;
}
template <class T>
const T* state_row(const Problem<T>& p, const T* base, std::int64_t row) {
  return base == nullptr ? nullptr : base + row * p.channels * p.dstate;
}

// h := a h + k B u for one token; returns sum C h. `fixed` is the number of states if known.
template <class T, Disc disc, int fixed>
Pack<T> advance(const Lanes<T>& v, std::int64_t t, const Pack<T>& delta, const Pack<T>& alpha,
                const Pack<T>& u, Pack<T>* h) {
  const std::int64_t dstate = fixed > 0 ? fixed : v.p.dstate;
  const T* const B = v.p.B[v.row(t)];
  const T* const C = v.p.C[v.row(t)];
  const Pack<T>* const A = v.A.data();
  const Pack<T> du = disc == Disc::Mamba ? Pack<T>(delta * u) : u;
  Pack<T> y = Pack<T>::Zero();
  for (std::int64_t n = 0; n < dstate; ++n) {
    Pack<T> drive = du * B[n];
    if constexpr (disc != Disc::Mamba) drive *= input_factor<T, disc>(delta, A[n]);
    h[n] = multiplier<T, disc>(alpha, A[n]) * h[n] + drive;
    y += C[n] * h[n];
  }
  return y;
}

template <class T, Disc disc, int fixed>
void forward_pack(const SelectiveScanForward& a, const Problem<T>& p, std::int64_t b,
                  std::int64_t pack) {
  const Lanes<T> v(p, b, pack);
  const auto y_rows = rows_of<T>(a.y);
  std::vector<Pack<T>> states(static_cast<std::size_t>(p.dstate));
  v.read_states(state_row(p, p.state_in, b), states.data());
  T* const chunk_states = a.chunk_states ? a.chunk_states.data<T>() : nullptr;
  const std::int64_t length = p.length(b);
  for (std::int64_t t = 0; t < p.seqlen; ++t) {
    if (chunk_states != nullptr && t % kSelectiveScanChunk == 0)
      v.write_states(states.data(),
                     state_row(p, chunk_states,
                               b * selective_scan_chunks(p.seqlen) + t / kSelectiveScanChunk));
    T* const out = y_rows[v.row(t)] + v.first;
    if (t >= length) {
      std::fill_n(out, v.count, T(0));
      continue;
    }
    const Pack<T> delta = softplus<T>(v.raw_dt(t));
    const Pack<T> u = v.u(t);
    Pack<T> y = advance<T, disc, fixed>(v, t, delta, v.alpha(t, delta), u, states.data());
    y += v.D * u;
    if (p.z.data != nullptr) {
      const Pack<T> z = load(p.z[v.row(t)] + v.first, v.count);
      y *= z * sigmoid<T>(z);
    }
    store<T>(y, out, v.count);
  }
  if (a.state_out) v.write_states(states.data(), state_row(p, a.state_out.data<T>(), b));
}

template <class T, Disc disc>
void forward(const SelectiveScanForward& a) {
  const Problem<T> p(a.in);
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t pack = 0; pack < p.packs; ++pack) {
      if (p.dstate == 16)
        forward_pack<T, disc, 16>(a, p, b, pack);
      else
        forward_pack<T, disc, 0>(a, p, b, pack);
    }
}

FloatScan float_scan(const Problem<float>& p) {
  return {.u = p.u.data,
          .dt = p.dt.data,
          .z = p.z.data,
          .B = p.B.data,
          .C = p.C.data,
          .y = nullptr,
          .u_stride = p.u.stride,
          .dt_stride = p.dt.stride,
          .z_stride = p.z.stride,
          .B_stride = p.B.stride,
          .C_stride = p.C.stride,
          .y_stride = 0,
          .dt_bias = p.dt_bias,
          .A_log = p.A_log,
          .D = p.D,
          .state_in = p.state_in,
          .state_out = nullptr,
          .chunk_states = nullptr,
          .lengths = p.lengths,
          .batch = p.batch,
          .seqlen = p.seqlen,
          .channels = p.channels,
          .dstate = p.dstate,
          .chunks = selective_scan_chunks(p.seqlen)};
}

void forward_float(const SelectiveScanForward& a) {
  const Problem<float> p(a.in);
  const auto y = rows_of<float>(a.y);
  FloatScan scan = float_scan(p);
  scan.y = y.data;
  scan.y_stride = y.stride;
  if (a.state_out) scan.state_out = a.state_out.data<float>();
  if (a.chunk_states) scan.chunk_states = a.chunk_states.data<float>();
  run_float_scan(scan);
}

/// Partial sums that several packs or sequences contribute to, added in a fixed order at the end.
template <class T>
struct Partials {
  std::int64_t groups;
  std::vector<T> dBC;      // [B, groups, L, 2 N]
  std::vector<T> dtau;     // [B, groups, L]
  std::vector<T> dA;       // [B, E, N], of A_log
  std::vector<T> dvector;  // [B, 3, E]: dt_bias, D, dtA_bias

  Partials(const Problem<T>& p, std::int64_t channels_per_group)
      : groups((p.channels + channels_per_group - 1) / channels_per_group),
        dBC(static_cast<std::size_t>(p.batch * groups * p.seqlen * 2 * p.dstate)),
        dtau(p.tau != nullptr ? static_cast<std::size_t>(p.batch * groups * p.seqlen) : 0),
        dA(static_cast<std::size_t>(p.batch * p.channels * p.dstate)),
        dvector(static_cast<std::size_t>(p.batch * 3 * p.channels)) {}
};

/// Scratch of one pack: the states and multipliers of one chunk.
template <class T>
struct ChunkScratch {
  std::vector<Pack<T>> h;  // [chunk + 1, N], h[0] enters the chunk
  std::vector<Pack<T>> y;  // [chunk], C h + D u
  explicit ChunkScratch(std::int64_t dstate)
      : h(static_cast<std::size_t>((kSelectiveScanChunk + 1) * dstate)),
        y(static_cast<std::size_t>(kSelectiveScanChunk)) {}
};

template <class T, Disc disc>
class BackwardPack {
 public:
  BackwardPack(const SelectiveScanBackward& a, const Problem<T>& p, std::int64_t b,
               std::int64_t pack, Partials<T>& partials, std::int64_t group)
      : a_(a),
        p_(p),
        v_(p, b, pack),
        scratch_(p.dstate),
        g_(static_cast<std::size_t>(p.dstate)),
        dA_(static_cast<std::size_t>(p.dstate), Pack<T>::Zero()),
        partials_(partials),
        group_row_((b * partials.groups + group) * p.seqlen) {}

  void run() {
    v_.read_states(state_row(p_, a_.dstate_out ? a_.dstate_out.data<T>() : nullptr, v_.b),
                   g_.data());
    const std::int64_t length = p_.length(v_.b);
    for (std::int64_t t = length; t < p_.seqlen; ++t) clear(t);
    for (std::int64_t first = (length - 1) / kSelectiveScanChunk * kSelectiveScanChunk; first >= 0;
         first -= kSelectiveScanChunk) {
      const std::int64_t last = std::min(length, first + kSelectiveScanChunk);
      recompute(first, last);
      for (std::int64_t t = last - 1; t >= first; --t) token(t, t - first);
    }
    if (a_.dstate_in) v_.write_states(g_.data(), state_row(p_, a_.dstate_in.data<T>(), v_.b));
    finish();
  }

 private:
  void clear(std::int64_t t) {
    const std::int64_t r = v_.row(t);
    std::fill_n(rows_of<T>(a_.du)[r] + v_.first, v_.count, T(0));
    std::fill_n(rows_of<T>(a_.ddt)[r] + v_.first, v_.count, T(0));
    if (a_.dz) std::fill_n(rows_of<T>(a_.dz)[r] + v_.first, v_.count, T(0));
  }

  void recompute(std::int64_t first, std::int64_t last) {
    const T* const saved =
        state_row(p_, a_.chunk_states.data<T>(),
                  v_.b * selective_scan_chunks(p_.seqlen) + first / kSelectiveScanChunk);
    v_.read_states(saved, scratch_.h.data());
    for (std::int64_t t = first; t < last; ++t) {
      Pack<T>* const h = scratch_.h.data() + (t - first + 1) * p_.dstate;
      std::copy_n(h - p_.dstate, p_.dstate, h);
      const Pack<T> delta = softplus<T>(v_.raw_dt(t));
      const Pack<T> u = v_.u(t);
      scratch_.y[static_cast<std::size_t>(t - first)] =
          advance<T, disc, 0>(v_, t, delta, v_.alpha(t, delta), u, h) + v_.D * u;
    }
  }

  // g_ holds a_{t+1} g_{t+1} on entry and a_t g_t on return.
  void token(std::int64_t t, std::int64_t i) {
    const std::int64_t r = v_.row(t);
    const Pack<T> raw = v_.raw_dt(t);
    const Pack<T> delta = softplus<T>(raw);
    const Pack<T> alpha = v_.alpha(t, delta);
    const Pack<T> u = v_.u(t);
    Pack<T> dy = load(rows_of<T>(a_.dy)[r] + v_.first, v_.count);
    if (a_.dz) {
      const Pack<T> z = load(p_.z[r] + v_.first, v_.count);
      const Pack<T> s = sigmoid<T>(z);
      const Pack<T> dz = dy * scratch_.y[static_cast<std::size_t>(i)] * s * (T(1) + z * (T(1) - s));
      store<T>(dz, rows_of<T>(a_.dz)[r] + v_.first, v_.count);
      dy *= z * s;
    }
    const T* const B = p_.B[r];
    const T* const C = p_.C[r];
    T* const dB = partials_.dBC.data() + (group_row_ + t) * 2 * p_.dstate;
    T* const dC = dB + p_.dstate;
    const Pack<T>* const before = scratch_.h.data() + i * p_.dstate;
    const Pack<T>* const after = before + p_.dstate;
    ChainRule<T> chain;
    Pack<T> du = v_.D * dy;
    for (std::int64_t n = 0; n < p_.dstate; ++n) {
      const Pack<T>& A = v_.A[static_cast<std::size_t>(n)];
      const Pack<T> factor = input_factor<T, disc>(delta, A);
      const Pack<T> g = C[n] * dy + g_[static_cast<std::size_t>(n)];
      dC[n] += (dy * after[n]).sum();
      dB[n] += (g * factor * u).sum();
      du += g * factor * B[n];
      const Pack<T> a = multiplier<T, disc>(alpha, A);
      dA_[static_cast<std::size_t>(n)] +=
          chain.template add<disc>(g * before[n], g * u * B[n], a, alpha, delta, A);
      g_[static_cast<std::size_t>(n)] = a * g;
    }
    dD_ += dy * u;
    Pack<T> ddelta = chain.ddelta;
    if (p_.tau != nullptr) {
      drate_ += chain.dalpha * p_.tau[r];
      partials_.dtau[static_cast<std::size_t>(group_row_ + t)] += (chain.dalpha * v_.rate).sum();
    } else {
      ddelta += chain.dalpha;
    }
    const Pack<T> ddt = ddelta * sigmoid<T>(raw);
    ddt_bias_ += ddt;
    store<T>(ddt, rows_of<T>(a_.ddt)[r] + v_.first, v_.count);
    store<T>(du, rows_of<T>(a_.du)[r] + v_.first, v_.count);
  }

  void finish() {
    for (std::int64_t n = 0; n < p_.dstate; ++n)  // A = -exp(A_log): dA_log = dA A
      dA_[static_cast<std::size_t>(n)] *= v_.A[static_cast<std::size_t>(n)];
    v_.write_states(dA_.data(), partials_.dA.data() + v_.b * p_.channels * p_.dstate);
    T* const vectors = partials_.dvector.data() + v_.b * 3 * p_.channels + v_.first;
    store<T>(ddt_bias_, vectors, v_.count);
    store<T>(dD_, vectors + p_.channels, v_.count);
    if (p_.dtA_bias != nullptr)
      store<T>(drate_ * sigmoid<T>(load(p_.dtA_bias + v_.first, v_.count)),
               vectors + 2 * p_.channels, v_.count);
  }

  const SelectiveScanBackward& a_;
  const Problem<T>& p_;
  Lanes<T> v_;
  ChunkScratch<T> scratch_;
  std::vector<Pack<T>> g_;
  std::vector<Pack<T>> dA_;
  Partials<T>& partials_;
  std::int64_t group_row_;
  Pack<T> ddt_bias_ = Pack<T>::Zero();
  Pack<T> dD_ = Pack<T>::Zero();
  Pack<T> drate_ = Pack<T>::Zero();
};

template <class T>
void reduce(const SelectiveScanBackward& a, const Problem<T>& p, const Partials<T>& s) {
  const auto dB = rows_of<T>(a.dB);
  const auto dC = rows_of<T>(a.dC);
#pragma omp parallel for collapse(2)
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t t = 0; t < p.seqlen; ++t) {
      const std::int64_t r = b * p.seqlen + t;
      std::fill_n(dB[r], p.dstate, T(0));
      std::fill_n(dC[r], p.dstate, T(0));
      T dtau = T(0);
      for (std::int64_t group = 0; group < s.groups; ++group) {
        const std::int64_t row = (b * s.groups + group) * p.seqlen + t;
        const T* const part = s.dBC.data() + row * 2 * p.dstate;
        for (std::int64_t n = 0; n < p.dstate; ++n) {
          dB[r][n] += part[n];
          dC[r][n] += part[p.dstate + n];
        }
        if (p.tau != nullptr) dtau += s.dtau[static_cast<std::size_t>(row)];
      }
      if (a.dintegration_timesteps) a.dintegration_timesteps.data<T>()[r] = dtau;
    }
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const T* const dA = s.dA.data() + b * p.channels * p.dstate;
    for (std::int64_t i = 0; i < p.channels * p.dstate; ++i) a.dA_log.data<T>()[i] += dA[i];
    const T* const vectors = s.dvector.data() + b * 3 * p.channels;
    for (std::int64_t e = 0; e < p.channels; ++e) {
      a.ddt_bias.data<T>()[e] += vectors[e];
      if (a.dD) a.dD.data<T>()[e] += vectors[p.channels + e];
      if (a.ddtA_bias && p.tau != nullptr) a.ddtA_bias.data<T>()[e] += vectors[2 * p.channels + e];
    }
  }
}

template <class T, Disc disc>
void backward(const SelectiveScanBackward& a) {
  const Problem<T> p(a.in);
  Partials<T> partials(p, kPacksPerGroup * kLanes<T>);
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t group = 0; group < partials.groups; ++group)
      for (std::int64_t pack = group * kPacksPerGroup;
           pack < std::min(p.packs, (group + 1) * kPacksPerGroup); ++pack)
        BackwardPack<T, disc>(a, p, b, pack, partials, group).run();
  reduce<T>(a, p, partials);
}

void backward_float(const SelectiveScanBackward& a) {
  const Problem<float> p(a.in);
  Partials<float> partials(p, kFloatGroup);
  const auto dy = rows_of<float>(a.dy);
  const auto du = rows_of<float>(a.du);
  const auto ddt = rows_of<float>(a.ddt);
  const auto dz = a.dz ? rows_of<float>(a.dz) : Rows<float>{};
  run_float_scan_backward({.in = float_scan(p),
                           .dy = dy.data,
                           .chunk_states = a.chunk_states.data<float>(),
                           .dstate_out = a.dstate_out ? a.dstate_out.data<float>() : nullptr,
                           .du = du.data,
                           .ddt = ddt.data,
                           .dz = dz.data,
                           .dstate_in = a.dstate_in ? a.dstate_in.data<float>() : nullptr,
                           .dy_stride = dy.stride,
                           .du_stride = du.stride,
                           .ddt_stride = ddt.stride,
                           .dz_stride = dz.stride,
                           .groups = partials.groups,
                           .dBC = partials.dBC.data(),
                           .dA_log = partials.dA.data(),
                           .dvectors = partials.dvector.data()});
  reduce<float>(a, p, partials);
}

// What selective_scan_float.hpp has kernels for.
bool is_float_mamba(const SelectiveScanInputs& in) {
  return in.u.dtype() == DType::float32 && in.discretization == Disc::Mamba &&
         !in.integration_timesteps;
}

template <class F>
void visit_discretization(Disc disc, F&& f) {
  switch (disc) {
    case Disc::Mamba:
      return f.template operator()<Disc::Mamba>();
    case Disc::Zoh:
      return f.template operator()<Disc::Zoh>();
    case Disc::Bilinear:
      return f.template operator()<Disc::Bilinear>();
    case Disc::Dirac:
      return f.template operator()<Disc::Dirac>();
  }
}

}  // namespace

void selective_scan_forward(Context&, const SelectiveScanForward& a) {
  if (is_float_mamba(a.in)) return forward_float(a);
  visit_float("selective_scan_forward", a.in.u.dtype(), [&]<class T>() {
    visit_discretization(a.in.discretization, [&]<Disc disc>() { forward<T, disc>(a); });
  });
}
void selective_scan_backward(Context&, const SelectiveScanBackward& a) {
  if (is_float_mamba(a.in)) return backward_float(a);
  visit_float("selective_scan_backward", a.in.u.dtype(), [&]<class T>() {
    visit_discretization(a.in.discretization, [&]<Disc disc>() { backward<T, disc>(a); });
  });
}

}  // namespace lrnn::cpu
