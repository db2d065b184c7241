// Both passes of a chunk of dplr_scan in float, once per instruction set: see common/isa.hpp. Token
// by token through all states, whose sums the next token waits for; a few states at a time, each
// with sums of its own, so that no addition waits for the one before it. Gradients that all tokens
// share are added up afterwards, state by state, where they stay in registers.
namespace LRNN_ISA {

constexpr int kSums = kMost;
constexpr int kStates = kLanes == 16 ? 4 : 2;  // three complex numbers of each in registers
constexpr std::int64_t kHistory = (kChunk + 1) * 2 * kLanes;

struct Complex {
  Vec re, im;
};
// Neighbouring complex numbers lie `stride` floats apart.
LRNN_INLINE void load_each(const float* from, std::int64_t stride, std::int64_t plane, Complex* to,
                           const int count) {
  LRNN_EACH to[j] = {load(from + j * stride), load(from + j * stride + plane)};
}
LRNN_INLINE void store_each(float* to, std::int64_t stride, std::int64_t plane, const Complex* from,
                            const int count) {
  LRNN_EACH {
    store(to + j * stride, from[j].re);
    store(to + j * stride + plane, from[j].im);
  }
}
// to += factor from
LRNN_INLINE void add_scaled(Complex* to, Vec factor, const Complex* from, const int count) {
  LRNN_EACH {
    to[j].re += factor * from[j].re;
    to[j].im += factor * from[j].im;
  }
}
// to += factor conj(from)
LRNN_INLINE void add_scaled_conj(Complex* to, Vec factor, const Complex* from, const int count) {
  LRNN_EACH {
    to[j].re += factor * from[j].re;
    to[j].im -= factor * from[j].im;
  }
}

// The states of a token, a vector of heads of them.
struct States {
  float* at;
  std::int64_t stride, plane;
};
LRNN_INLINE void load_each(const States& x, std::int64_t n, Complex* to, const int count) {
  load_each(x.at + n * x.stride, x.stride, x.plane, to, count);
}
LRNN_INLINE void store_each(const States& x, std::int64_t n, const Complex* from, const int count) {
  store_each(x.at + n * x.stride, x.stride, x.plane, from, count);
}

// Adds real and imaginary products of states n, .. to sums.
LRNN_INLINE void add_products(const float* p, const States& q, std::int64_t n, Complex* sums,
                              const int count) {
  Complex a[kSums];
  Complex b[kSums];
  load_each(p + n * kPair, kPair, kPlane, a, count);
  load_each(q, n, b, count);
  LRNN_EACH {
    sums[j].re += a[j].re * b[j].re;
    sums[j].im += a[j].im * b[j].im;
  }
}
// The sums over n of Re p Re q and of Im p Im q.
LRNN_INLINE Complex products(const float* p, const States& q, std::int64_t states) {
  Complex sums[kSums] = {};
  std::int64_t n = 0;
  for (; n + kSums <= states; n += kSums) add_products(p, q, n, sums, kSums);
  for (; n < states; ++n) add_products(p, q, n, sums, 1);
  constexpr int count = kSums - 1;
  LRNN_EACH {
    sums[0].re += sums[j + 1].re;
    sums[0].im += sums[j + 1].im;
  }
  return sums[0];
}

// after := before + e before - sum_r w_r s_r + b u, for states n, ..
LRNN_INLINE void advance_states(const FloatDplrModel& model, const States& before,
                                const States& after, std::int64_t n, std::int64_t at,
                                const float* s, std::int64_t s_stride, Vec u, const int count) {
  const auto of = [&](const float* field) { return field + n * kPair + at; };
  Complex x[kStates];
  Complex step[kStates] = {};
  Complex f[kStates];
  load_each(before, n, x, count);
  load_each(of(model.b), kPair, kPlane, f, count);
  add_scaled(step, u, f, count);
  for (const float* e : {model.e, model.e_low}) {
    if (e == nullptr) continue;
    load_each(of(e), kPair, kPlane, f, count);
    LRNN_EACH {
      step[j].re += f[j].re * x[j].re;
      step[j].re -= f[j].im * x[j].im;
      step[j].im += f[j].re * x[j].im;
      step[j].im += f[j].im * x[j].re;
    }
  }
  for (std::int64_t r = 0; r < model.rank; ++r) {
    load_each(of(model.w[r]), kPair, kPlane, f, count);
    add_scaled(step, -load(s + r * s_stride), f, count);
  }
  LRNN_EACH {
    x[j].re += step[j].re;
    x[j].im += step[j].im;
  }
  store_each(after, n, x, count);
}
// One token, for the heads from `at` on; s[r] = <k_r, before>.
LRNN_INLINE void advance(const FloatDplrModel& model, const States& before, const States& after,
                         std::int64_t at, float* s, std::int64_t s_stride, Vec u) {
  for (std::int64_t r = 0; r < model.rank; ++r) {
    const Complex sum = products(model.k[r] + at, before, model.states);
    store(s + r * s_stride, 2.0F * (sum.re + sum.im));
  }
  std::int64_t n = 0;
  for (; n + kStates <= model.states; n += kStates)
    advance_states(model, before, after, n, at, s, s_stride, u, kStates);
  for (; n < model.states; ++n) advance_states(model, before, after, n, at, s, s_stride, u, 1);
}

// Calls f(p); with one w, k and C, the usual case, it knows so and keeps their places in registers.
template <class P, class F>
LRNN_INLINE void specialise(const P& p, const F& f) {
  if (p.model.rank != 1 || p.model.channels != 1) return f(p);
  const float* const w = p.model.w[0];
  const float* const k = p.model.k[0];
  const float* const C = p.model.C[0];
  P one = p;
  one.model.w = &w;
  one.model.k = &k;
  one.model.C = &C;
  one.model.rank = one.model.channels = 1;
  f(one);
}

LRNN_INLINE void run_vector(const FloatDplrForward& p, std::int64_t at) {
  const States x = {p.x + at, kPair, kPlane};
  for (std::int64_t t = 0; t < p.steps; ++t) {
    for (std::int64_t i = at / kLanes; i < p.nexts; i += kFloatHeads / kLanes) p.next[i].fetch(t);
    advance(p.model, x, x, at, p.scratch, kFloatHeads, load(p.u + t * kFloatHeads + at));
    for (std::int64_t c = 0; c < p.model.channels; ++c) {
      const Complex sum = products(p.model.C[c] + at, x, p.model.states);
      store(p.y + (c * kChunk + t) * kFloatHeads + at, 2.0F * (sum.re - sum.im));
    }
  }
}
void run(const FloatDplrForward& p) {
  specialise(p, [](const FloatDplrForward& q) LRNN_INLINE_LAMBDA {
    for (std::int64_t at = 0; at < kFloatHeads; at += kLanes) run_vector(q, at);
  });
}

// A vector of heads of a chunk. Histories are [N, kChunk + 1, 2, kLanes], those of q with one token
// more than it has: states 4 KiB apart would lie in one set of the first cache.
struct Work {
  const FloatDplrBackward& p;
  std::int64_t at;
  float *x, *q;
  float *s, *r;  // [R, kChunk, kLanes]

  [[nodiscard]] States x_at(std::int64_t t) const { return {x + t * 2 * kLanes, kHistory, kLanes}; }
  [[nodiscard]] States q_at(std::int64_t t) const { return {q + t * 2 * kLanes, kHistory, kLanes}; }
  [[nodiscard]] Vec dy(std::int64_t c, std::int64_t t) const {
    return load(p.dy + (c * kChunk + t) * kFloatHeads + at);
  }
};

// to := M^* q with the sums r = <w, q> of token t, plus what dy of token t - 1 adds; without q and
// r, if `first`, and without dy at the left end of the chunk.
LRNN_INLINE void retreat_states(const Work& w, std::int64_t t, const States& from, const States& to,
                                std::int64_t n, const bool first, const int count) {
  const FloatDplrModel& model = w.p.model;
  const auto of = [&](const float* field) { return field + n * kPair + w.at; };
  Complex q[kStates];
  Complex f[kStates];
  load_each(from, n, q, count);
  if (!first) {
    Complex step[kStates] = {};
    load_each(of(model.e), kPair, kPlane, f, count);
    LRNN_EACH {
      step[j].re += f[j].re * q[j].re;
      step[j].re += f[j].im * q[j].im;
      step[j].im += f[j].re * q[j].im;
      step[j].im -= f[j].im * q[j].re;
    }
    for (std::int64_t r = 0; r < model.rank; ++r) {
      load_each(of(model.k[r]), kPair, kPlane, f, count);
      add_scaled(step, -load(w.r + (r * kChunk + t) * kLanes), f, count);
    }
    LRNN_EACH {
      q[j].re += step[j].re;
      q[j].im += step[j].im;
    }
  }
  for (std::int64_t c = 0; c < model.channels && t > 0; ++c) {
    load_each(of(model.C[c]), kPair, kPlane, f, count);
    add_scaled_conj(q, 2.0F * w.dy(c, t - 1), f, count);
  }
  store_each(to, n, q, count);
}
LRNN_INLINE void retreat(const Work& w, std::int64_t t, const States& from, const States& to,
                         const bool first) {
  const std::int64_t states = w.p.model.states;
  std::int64_t n = 0;
  for (; n + kStates <= states; n += kStates) retreat_states(w, t, from, to, n, first, kStates);
  for (; n < states; ++n) retreat_states(w, t, from, to, n, first, 1);
}

// x, s, q, r and du of all tokens.
LRNN_INLINE void walk_tokens(const Work& w) {
  const FloatDplrModel& model = w.p.model;
  const std::int64_t steps = w.p.steps;
  const std::int64_t row = kChunk * kLanes;
  for (std::int64_t n = 0; n < model.states; ++n) {
    Complex x;
    load_each(w.p.x + n * kPair + w.at, kPair, kPlane, &x, 1);
    store_each(w.x_at(0), n, &x, 1);
  }
  for (std::int64_t t = 0; t < steps; ++t) {
    for (std::int64_t i = w.at / kLanes; i < w.p.nexts; i += kFloatHeads / kLanes)
      w.p.next[i].fetch(t);
    advance(model, w.x_at(t), w.x_at(t + 1), w.at, w.s + t * kLanes, row,
            load(w.p.u + t * kFloatHeads + w.at));
  }
  const States carry = {w.p.carry + w.at, kPair, kPlane};
  retreat(w, steps, carry, w.q_at(steps - 1), true);
  for (std::int64_t t = steps - 1; t >= 0; --t) {
    const Complex through = products(model.b + w.at, w.q_at(t), model.states);
    store(w.p.du + t * kFloatHeads + w.at, through.re + through.im);
    for (std::int64_t r = 0; r < model.rank; ++r) {
      const Complex sum = products(model.w[r] + w.at, w.q_at(t), model.states);
      store(w.r + (r * kChunk + t) * kLanes, 2.0F * (sum.re + sum.im));
    }
    retreat(w, t, w.q_at(t), t > 0 ? w.q_at(t - 1) : carry, false);
  }
}

// The sum over tokens of factor[t] history[t]. Two at a time hide the additions.
LRNN_INLINE Complex weighted_sum(const Work& w, const float* factor, std::int64_t factor_stride,
                                 const float* history) {
  Complex sums[2] = {};
  std::int64_t t = 0;
  const auto add = [&](Complex& sum, std::int64_t i) {
    const Vec f = load(factor + i * factor_stride);
    sum.re += f * load(history + i * 2 * kLanes);
    sum.im += f * load(history + i * 2 * kLanes + kLanes);
  };
  for (; t + 2 <= w.p.steps; t += 2) {
    add(sums[0], t);
    add(sums[1], t + 1);
  }
  if (t < w.p.steps) add(sums[0], t);
  return {sums[0].re + sums[1].re, sums[0].im + sums[1].im};
}
// sum over tokens of q conj(x)
LRNN_INLINE Complex conjugate_sum(const Work& w, const float* q, const float* x) {
  Vec real[2] = {};
  Vec imaginary[2] = {};
  for (std::int64_t t = 0; t < w.p.steps; ++t) {
    const Complex a = {load(q + t * 2 * kLanes), load(q + t * 2 * kLanes + kLanes)};
    const Complex b = {load(x + t * 2 * kLanes), load(x + t * 2 * kLanes + kLanes)};
    real[0] += a.re * b.re;
    real[1] += a.im * b.im;
    imaginary[0] += a.im * b.re;
    imaginary[1] += a.re * b.im;
  }
  return {real[0] + real[1], imaginary[0] - imaginary[1]};
}
LRNN_INLINE void add_fields(const Work& w, std::int64_t n) {
  const FloatDplrModel& model = w.p.model;
  const float* const x = w.x + n * kHistory;
  const float* const q = w.q + n * kHistory;
  float* field = w.p.fields + n * kPair + w.at;
  const auto write = [&](float scale, float conjugate, const Complex& sum) {
    store(field, scale * sum.re);
    store(field + kPlane, conjugate * scale * sum.im);
    field += model.states * kPair;
  };
  write(1.0F, 1.0F, conjugate_sum(w, q, x));
  write(1.0F, 1.0F, weighted_sum(w, w.p.u + w.at, kFloatHeads, q));
  for (std::int64_t r = 0; r < model.rank; ++r)
    write(-1.0F, 1.0F, weighted_sum(w, w.s + r * kChunk * kLanes, kLanes, q));
  for (std::int64_t r = 0; r < model.rank; ++r)
    write(-1.0F, 1.0F, weighted_sum(w, w.r + r * kChunk * kLanes, kLanes, x));
  for (std::int64_t c = 0; c < model.channels; ++c)
    write(2.0F, -1.0F,
          weighted_sum(w, w.p.dy + c * kChunk * kFloatHeads + w.at, kFloatHeads, x + 2 * kLanes));
}

LRNN_INLINE void run_vector(const FloatDplrBackward& p, std::int64_t at) {
  const std::int64_t states = p.model.states;
  float* const q = p.scratch + states * kHistory;
  float* const s = q + states * kHistory;
  const Work w = {p, at, p.scratch, q, s, s + p.model.rank * kChunk * kLanes};
  walk_tokens(w);
  for (std::int64_t n = 0; n < states; ++n) add_fields(w, n);
}
void run_backward(const FloatDplrBackward& p) {
  specialise(p, [](const FloatDplrBackward& q) LRNN_INLINE_LAMBDA {
    for (std::int64_t at = 0; at < kFloatHeads; at += kLanes) run_vector(q, at);
  });
}

}  // namespace LRNN_ISA
