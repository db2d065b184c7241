// Both passes of diagonal_scan on float operands, once per instruction set: see common/isa.hpp.
// Half as many lanes as a vector has floats, in double. A chunk of tokens goes through all lanes of
// an item before the next one, so that pieces of rows and their pages stay known.
namespace LRNN_ISA {

constexpr int kWide = kLanes / 2;
using Double = double __attribute__((vector_size(sizeof(double) * kWide)));
using Long = std::int64_t __attribute__((vector_size(sizeof(double) * kWide)));
using Half = float __attribute__((vector_size(sizeof(float) * kWide)));

struct Complex {
  Double re, im;
};
LRNN_INLINE Complex times(const Complex& a, const Complex& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// a conj(b)
LRNN_INLINE Complex times_conj(const Complex& a, const Complex& b) {
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}
LRNN_INLINE void add(Complex& sum, const Complex& value) {
  sum.re += value.re;
  sum.im += value.im;
}

// Some neighbouring lanes, `count` of them left.
struct Lanes {
  std::int64_t first, count;
};
inline Half load_half(const float* from) {
  Half v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
// Apart from load_lanes(), which would else keep every vector in memory.
__attribute__((noinline)) inline Half load_some_half(const float* from, std::int64_t count) {
  float v[kWide] = {};
  for (int i = 0; i < count; ++i) v[i] = from[i];
  return load_half(v);
}
__attribute__((noinline)) inline void store_some_half(float* to, Half v, std::int64_t count) {
  for (int i = 0; i < count; ++i) to[i] = v[i];
}
// Lanes beyond the last are zero.
LRNN_INLINE Double load_lanes(const float* from, const Lanes& l) {
  return __builtin_convertvector(
      l.count >= kWide ? load_half(from + l.first) : load_some_half(from + l.first, l.count),
      Double);
}
LRNN_INLINE void store_lanes(float* to, const Lanes& l, Double value) {
  const Half v = __builtin_convertvector(value, Half);
  if (l.count >= kWide)
    __builtin_memcpy(to + l.first, &v, sizeof(v));
  else
    store_some_half(to + l.first, v, l.count);
}
inline void store_sums(double* to, const Lanes& l, Double value) {
  for (int i = 0; i < kWide && i < l.count; ++i) to[l.first + i] = value[i];
}
// Planes of real and imaginary parts, `plane` apart.
LRNN_INLINE Complex load_planes(const float* from, std::int64_t plane, const Lanes& l) {
  return {load_lanes(from, l), load_lanes(from + plane, l)};
}
LRNN_INLINE void store_planes(float* to, std::int64_t plane, const Lanes& l, const Complex& value) {
  store_lanes(to, l, value.re);
  store_lanes(to + plane, l, value.im);
}

// The polynomial in x with these coefficients, from the highest down; 8 to 16 of them, for
// LRNN_UNROLL unrolls no longer loops.
LRNN_INLINE Double series(Double x, const double* c, const int coefficients) {
  constexpr int kAtOnce = 8;
  Double p = c[0] - Double{};
  LRNN_UNROLL
  for (int i = 1; i < kAtOnce; ++i) p = p * x + c[i];
  LRNN_UNROLL
  for (int i = kAtOnce; i < coefficients; ++i) p = p * x + c[i];
  return p;
}
constexpr int kExpTerms = sizeof(detail::kExp) / sizeof(double);
constexpr int kSinTerms = sizeof(detail::kSin) / sizeof(double);
constexpr int kCosTerms = sizeof(detail::kCos) / sizeof(double);
static_assert(kSinTerms >= 8 && kCosTerms >= 8 && kExpTerms >= 8 && kExpTerms <= 16);
// As exponential() and sin_cos_of_turns() of common/exponential.hpp.
LRNN_INLINE Double exponential_of(Double x) {
  constexpr double kLog2 = 1.4426950408889634;
  constexpr double kLn2 = 0.693147180369123816490;
  constexpr double kLn2Low = 1.90821492927058770002e-10;
  const Double low = x < -700.0 ? -700.0 - Double{} : x;
  const Double v = low > 700.0 ? 700.0 - Double{} : low;
  const Double n = v * kLog2 + detail::kRound;
  const Double k = n - detail::kRound;
  const Double p = series((v - k * kLn2) - k * kLn2Low, detail::kExp, kExpTerms);
  return reinterpret_cast<Double>(reinterpret_cast<Long>(p) + (reinterpret_cast<Long>(n) << 52));
}
LRNN_INLINE Complex unit_of_turns(Double turns) {
  constexpr double kQuarter = 1.5707963267948966;
  const Double n = 4.0 * turns + detail::kRound;
  const Long quarter = reinterpret_cast<Long>(n);
  const Double x = kQuarter * (4.0 * turns - (n - detail::kRound));
  const Double s = x * series(x * x, detail::kSin, kSinTerms);
  const Double c = series(x * x, detail::kCos, kCosTerms);
  const Double sin = (quarter & 1) != 0 ? c : s;
  const Double cos = (quarter & 1) != 0 ? s : c;
  return {((quarter + 1) & 2) != 0 ? -cos : cos, (quarter & 2) != 0 ? -sin : sin};
}

// Multipliers at a position; `slope` is the derivative of an event multiplier by tau z.
struct Step {
  Complex a, slope;
};
constexpr double kTwoPi = 6.283185307179586;
// What all tokens of some lanes share.
struct Model {
  Step step;         // in the fixed form
  Double re, turns;  // of z = re + 2 pi i turns, in the event form
  Complex gamma;
};
LRNN_INLINE Model model_of(const FloatDiagonalScan& p, const Lanes& l) {
  Model m = {};
  if (p.z != nullptr) {
    m.re = load_lanes(p.z, l) + load_lanes(p.z + p.lanes, l);
    m.turns = load_lanes(p.z + 2 * p.lanes, l) + load_lanes(p.z + 3 * p.lanes, l);
  } else {
    m.step.a = load_planes(p.a, p.lanes, l);
    if (p.a_low != nullptr) add(m.step.a, load_planes(p.a_low, p.lanes, l));
  }
  m.gamma = {1.0 - Double{}, Double{}};
  if (p.gamma != nullptr) m.gamma = load_planes(p.gamma, p.lanes, l);
  return m;
}
// (1 + w / 2) r and r^2 with w = tau z and r = 1 / (1 - w / 2), if bilinear.
LRNN_INLINE Step event_step(const FloatDiagonalScan& p, const Model& m, std::int64_t row) {
  const auto tau = static_cast<double>(p.tau[row]);
  if (!p.bilinear) {
    const Complex unit = unit_of_turns(tau * m.turns);
    const Double size = exponential_of(tau * m.re);
    const Complex a = {size * unit.re, size * unit.im};
    return {a, a};
  }
  const Complex half = {0.5 * tau * m.re, 0.5 * tau * kTwoPi * m.turns};
  const Double scale = 1.0 / ((1.0 - half.re) * (1.0 - half.re) + half.im * half.im);
  const Complex r = {(1.0 - half.re) * scale, half.im * scale};
  return {times({1.0 + half.re, half.im}, r), times(r, r)};
}
LRNN_INLINE Complex drive(const FloatDiagonalScan& p, std::int64_t row, const Lanes& l) {
  if (p.complex) return load_planes(p.v + row * 2 * p.lanes, p.lanes, l);
  return {load_lanes(p.v + row * p.lanes, l), Double{}};
}
// a x + gamma v. x comes last: the next token waits for two multiplications.
LRNN_INLINE Complex advance(const Complex& a, const Complex& x, const Complex& gamma,
                            const Complex& v) {
  const Complex in = times(gamma, v);
  return {a.re * x.re + (in.re - a.im * x.im), a.re * x.im + (in.im + a.im * x.re)};
}

// A chunk of one sequence: rows [row, row + valid) count, those up to `tokens` are padding.
struct Chunk {
  std::int64_t row, valid, tokens;
  std::int64_t states;  // row of chunk_states
};
inline Chunk chunk_at(const FloatDiagonalScan& p, std::int64_t b, std::int64_t index) {
  const std::int64_t begin = index * kChunk;
  const std::int64_t left = p.seqlen - begin;
  const std::int64_t valid = (p.lengths == nullptr ? p.seqlen : p.lengths[b]) - begin;
  Chunk c;
  c.row = b * p.seqlen + begin;
  c.tokens = left < kChunk ? left : kChunk;
  c.valid = valid < 0 ? 0 : valid < c.tokens ? valid : c.tokens;
  c.states = b * p.chunks + index;
  return c;
}
inline std::int64_t lanes_of(const FloatDiagonalScan& p, std::int64_t first) {
  const std::int64_t left = p.lanes - first;
  return left < kDiagonalLanes ? left : kDiagonalLanes;
}

// Between chunks, the numbers of each vector of an item.
struct Carried {
  Complex x[kDiagonalLanes / kWide];
};

// `event`, here and below, is a constant.
LRNN_INLINE void forward_chunk(const FloatDiagonalForward& p, const Chunk& c, const Lanes& l,
                               Complex& state, const bool event) {
  const std::int64_t n = p.in.lanes;
  const Model m = model_of(p.in, l);
  const Complex fixed = m.step.a;
  const Complex gamma = m.gamma;
  Complex x = state;
  if (p.chunk_states != nullptr) store_planes(p.chunk_states + c.states * 2 * n, n, l, x);
  for (std::int64_t t = 0; t < c.valid; ++t) {
    const Complex a = event ? event_step(p.in, m, c.row + t).a : fixed;
    x = advance(a, x, gamma, drive(p.in, c.row + t, l));
    store_planes(p.x + (c.row + t) * 2 * n, n, l, x);
  }
  state = x;
  for (std::int64_t t = c.valid; t < c.tokens; ++t)
    store_planes(p.x + (c.row + t) * 2 * n, n, l, Complex{});
}
void run(const FloatDiagonalForward& p, std::int64_t b, std::int64_t item) {
  const std::int64_t n = p.in.lanes;
  const std::int64_t first = item * kDiagonalLanes;
  const std::int64_t lanes = lanes_of(p.in, first);
  Carried state = {};
  for (std::int64_t at = 0; at < lanes && p.state_in != nullptr; at += kWide)
    state.x[at / kWide] = load_planes(p.state_in + b * 2 * n, n, {first + at, lanes - at});
  for (std::int64_t index = 0; index < p.in.chunks; ++index)
    for (std::int64_t at = 0; at < lanes; at += kWide) {
      const Chunk c = chunk_at(p.in, b, index);
      const Lanes l = {first + at, lanes - at};
      if (p.in.z != nullptr)
        forward_chunk(p, c, l, state.x[at / kWide], true);
      else
        forward_chunk(p, c, l, state.x[at / kWide], false);
    }
  for (std::int64_t at = 0; at < lanes && p.state_out != nullptr; at += kWide)
    store_planes(p.state_out + b * 2 * n, n, {first + at, lanes - at}, state.x[at / kWide]);
}

// The gradients of some lanes, over time.
struct Sums {
  Complex multiplier, gamma;
};
// Of a chunk of a vector of lanes; `dtau` takes the parts of its lanes, [kChunk].
struct Work {
  Complex before[kChunk];
  Step steps[kChunk];
  Double dtau[kChunk];
};

LRNN_INLINE void recompute(const FloatDiagonalBackward& p, const Chunk& c, const Lanes& l,
                           const Model& m, Work& w, const bool event) {
  const std::int64_t n = p.in.lanes;
  Complex x = load_planes(p.chunk_states + c.states * 2 * n, n, l);
  for (std::int64_t t = 0; t < c.valid; ++t) {
    w.before[t] = x;
    Complex a = m.step.a;
    if (event) {
      w.steps[t] = event_step(p.in, m, c.row + t);
      a = w.steps[t].a;
    }
    x = advance(a, x, m.gamma, drive(p.in, c.row + t, l));
    if (p.x != nullptr) store_planes(p.x + (c.row + t) * 2 * n, n, l, x);
  }
}
LRNN_INLINE void write_dv(const FloatDiagonalBackward& p, std::int64_t row, const Lanes& l,
                          const Complex& value) {
  const std::int64_t n = p.in.lanes;
  if (p.in.complex)
    store_planes(p.dv + row * 2 * n, n, l, value);
  else
    store_lanes(p.dv + row * n, l, value.re);
}
// carry: what the positions behind add to the adjoint of the next state.
LRNN_INLINE void retrace(const FloatDiagonalBackward& p, const Chunk& c, const Lanes& l,
                         const Model& m, Work& w, Complex& carry, Sums& sums, const bool event) {
  const std::int64_t n = p.in.lanes;
  Complex ahead = carry;
  Sums sum = sums;
  for (std::int64_t t = c.valid - 1; t >= 0; --t) {
    const Step& step = event ? w.steps[t] : m.step;
    const Complex v = drive(p.in, c.row + t, l);
    Complex q = load_planes(p.dx + (c.row + t) * 2 * n, n, l);
    add(q, ahead);
    ahead = times_conj(q, step.a);
    Complex d = times_conj(q, w.before[t]);
    if (event) {  // of tau z
      const auto tau = static_cast<double>(p.in.tau[c.row + t]);
      d = times_conj(d, step.slope);
      w.dtau[t] += d.re * m.re + d.im * (kTwoPi * m.turns);
      d = {tau * d.re, tau * d.im};
    }
    add(sum.multiplier, d);
    add(sum.gamma, times_conj(q, v));
    write_dv(p, c.row + t, l, times_conj(q, m.gamma));
  }
  carry = ahead;
  sums = sum;
}
inline void clear_padding(const FloatDiagonalBackward& p, const Chunk& c, const Lanes& l) {
  const std::int64_t n = p.in.lanes;
  for (std::int64_t t = c.valid; t < c.tokens; ++t) {
    write_dv(p, c.row + t, l, Complex{});
    if (p.x != nullptr) store_planes(p.x + (c.row + t) * 2 * n, n, l, Complex{});
  }
}
LRNN_INLINE void backward_chunk(const FloatDiagonalBackward& p, const Chunk& c, const Lanes& l,
                                Work& w, Complex& carry, Sums& sums, const bool event) {
  const Model m = model_of(p.in, l);
  clear_padding(p, c, l);
  recompute(p, c, l, m, w, event);
  retrace(p, c, l, m, w, carry, sums, event);
}
inline void write_dtau(const Chunk& c, const Work& w, double* dtau) {
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    double sum = 0.0;
    for (int i = 0; i < kWide; ++i) sum += w.dtau[t][i];
    dtau[c.row + t] = sum;
  }
}
void run_backward(const FloatDiagonalBackward& p, std::int64_t b, std::int64_t item) {
  const std::int64_t n = p.in.lanes;
  const std::int64_t first = item * kDiagonalLanes;
  const std::int64_t lanes = lanes_of(p.in, first);
  Carried carried = {};
  Sums sums[kDiagonalLanes / kWide] = {};
  Work w;
  for (std::int64_t at = 0; at < lanes && p.dstate_out != nullptr; at += kWide)
    carried.x[at / kWide] = load_planes(p.dstate_out + b * 2 * n, n, {first + at, lanes - at});
  for (std::int64_t index = p.in.chunks - 1; index >= 0; --index) {
    const Chunk c = chunk_at(p.in, b, index);
    for (std::int64_t t = 0; t < kChunk; ++t) w.dtau[t] = Double{};
    for (std::int64_t at = 0; at < lanes; at += kWide) {
      const Lanes l = {first + at, lanes - at};
      const std::int64_t i = at / kWide;
      if (p.in.z != nullptr)
        backward_chunk(p, c, l, w, carried.x[i], sums[i], true);
      else
        backward_chunk(p, c, l, w, carried.x[i], sums[i], false);
    }
    if (p.dtau != nullptr) write_dtau(c, w, p.dtau + item * p.in.batch * p.in.seqlen);
  }
  for (std::int64_t at = 0; at < lanes; at += kWide) {
    const Lanes l = {first + at, lanes - at};
    const Sums& sum = sums[at / kWide];
    store_sums(p.multiplier + b * 2 * n, l, sum.multiplier.re);
    store_sums(p.multiplier + (b * 2 + 1) * n, l, sum.multiplier.im);
    store_sums(p.gamma + b * 2 * n, l, sum.gamma.re);
    store_sums(p.gamma + (b * 2 + 1) * n, l, sum.gamma.im);
    if (p.dstate_in != nullptr) store_planes(p.dstate_in + b * 2 * n, n, l, carried.x[at / kWide]);
  }
}

}  // namespace LRNN_ISA
