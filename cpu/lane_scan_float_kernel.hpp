// Both passes of a chunk of lane_scan in float, once per instruction set: see common/isa.hpp. A few
// sub-states go through time together: a step of one waits for two multiplications in a row, which
// those of the others hide. One channel, the usual case, keeps its weights in registers.
namespace LRNN_ISA {

constexpr int kForwardStates = 4;
constexpr int kBackwardStates = 2;

struct Complex {
  Vec re, im;
};
LRNN_INLINE void load_each(const float* from, Complex* to, const int count) {
  LRNN_EACH to[j] = {load(from + j * kPair), load(from + j * kPair + kPlane)};
}
LRNN_INLINE void store_each(float* to, const Complex* from, const int count) {
  LRNN_EACH {
    store(to + j * kPair, from[j].re);
    store(to + j * kPair + kPlane, from[j].im);
  }
}
// x := a x + v
LRNN_INLINE void step(const Complex* a, Vec v, Complex* x, const int count) {
  LRNN_EACH {
    const Complex before = x[j];
    x[j].re = a[j].re * before.re + (v - a[j].im * before.im);
    x[j].im = a[j].re * before.im + a[j].im * before.re;
  }
}
// sum + Re(weights x)
LRNN_INLINE Vec read_out(Vec sum, const Complex* weights, const Complex* x, const int count) {
  LRNN_EACH {
    sum += weights[j].re * x[j].re;
    sum -= weights[j].im * x[j].im;
  }
  return sum;
}

// What a walk of some sub-states of a vector of lanes through time fetches at token t.
LRNN_INLINE void fetch(const FloatLaneChunk& in, std::int64_t m, std::int64_t at, std::int64_t t,
                       const int together) {
  const std::int64_t walks = (in.substates + together - 1) / together;
  for (std::int64_t i = at / kLanes * walks + m / together; i < in.nexts;
       i += walks * (kFloatLanes / kLanes))
    in.next[i].fetch(t);
}

// Sub-states m, .. of a vector of lanes, `at` of the block. `alone`: one channel.
LRNN_INLINE void forward_states(const FloatLaneForward& p, std::int64_t m, std::int64_t at,
                                const bool alone, const int count) {
  const FloatLaneChunk& in = p.in;
  Complex a[kForwardStates];
  Complex x[kForwardStates];
  Complex weights[kForwardStates];
  load_each(in.a + m * kPair + at, a, count);
  load_each(p.states + m * kPair + at, x, count);
  load_each(in.weights + m * kPair + at, weights, count);
  for (std::int64_t t = 0; t < in.steps; ++t) {
    fetch(in, m, at, t, kForwardStates);
    step(a, load(in.v + t * kFloatLanes + at), x, count);
    for (std::int64_t c = 0; c < (alone ? 1 : in.channels); ++c) {
      if (!alone) load_each(in.weights + (c * in.substates + m) * kPair + at, weights, count);
      float* const w = p.w + (c * kChunk + t) * kFloatLanes + at;
      store(w, read_out(m == 0 ? Vec{} : load(w), weights, x, count));
    }
  }
  store_each(p.states + m * kPair + at, x, count);
}
LRNN_INLINE void forward_vector(const FloatLaneForward& p, std::int64_t at, const bool alone) {
  std::int64_t m = 0;
  for (; m + kForwardStates <= p.in.substates; m += kForwardStates)
    forward_states(p, m, at, alone, kForwardStates);
  for (; m < p.in.substates; ++m) forward_states(p, m, at, alone, 1);
}
void run(const FloatLaneForward& p) {
  for (std::int64_t at = 0; at < kFloatLanes; at += kLanes)
    if (p.in.channels == 1)
      forward_vector(p, at, true);
    else
      forward_vector(p, at, false);
}

// What a channel adds to the adjoints and to the gradient of its weights.
LRNN_INLINE void add_channel(Vec g, const Complex* weights, const Complex* x, Complex* p,
                             Complex* dW, const int count) {
  LRNN_EACH {
    p[j].re += g * weights[j].re;
    p[j].im -= g * weights[j].im;
    dW[j].re += g * x[j].re;
    dW[j].im -= g * x[j].im;
  }
}
// to += conj(a) p
LRNN_INLINE void add_step_back(const Complex* a, const Complex* p, Complex* to, const int count) {
  LRNN_EACH {
    to[j].re += p[j].re * a[j].re;
    to[j].re += p[j].im * a[j].im;
    to[j].im += p[j].im * a[j].re;
    to[j].im -= p[j].re * a[j].im;
  }
}
// What adjoints p of a step from `before` add to the gradient of its multiplier. Returns the sum of
// their real parts.
LRNN_INLINE Vec add_multiplier(const Complex* before, const Complex* p, Complex* da,
                               const int count) {
  Vec sum = {};
  LRNN_EACH {
    sum += p[j].re;
    da[j].re += p[j].re * before[j].re;
    da[j].re += p[j].im * before[j].im;
    da[j].im += p[j].im * before[j].re;
    da[j].im -= p[j].re * before[j].im;
  }
  return sum;
}

// The states before each step and after the last, [kChunk + 1, kBackwardStates].
LRNN_INLINE void keep_states(const FloatLaneBackward& p, const Complex* a, std::int64_t m,
                             std::int64_t at, Complex* states, const int count) {
  Complex x[kBackwardStates];
  load_each(p.states + m * kPair + at, x, count);
  for (std::int64_t t = 0; t < p.in.steps; ++t) {
    fetch(p.in, m, at, t, kBackwardStates);
    LRNN_EACH states[t * kBackwardStates + j] = x[j];
    step(a, load(p.in.v + t * kFloatLanes + at), x, count);
  }
  LRNN_EACH states[p.in.steps * kBackwardStates + j] = x[j];
}
LRNN_INLINE void backward_states(const FloatLaneBackward& p, std::int64_t m, std::int64_t at,
                                 const bool alone, const int count) {
  const FloatLaneChunk& in = p.in;
  Complex states[(kChunk + 1) * kBackwardStates];
  Complex a[kBackwardStates];
  Complex adjoint[kBackwardStates];  // of the token after, or conj(a) times it at the right end
  Complex weights[kBackwardStates];
  Complex da[kBackwardStates] = {};
  Complex dW[kBackwardStates] = {};
  load_each(in.a + m * kPair + at, a, count);
  load_each(p.carries + m * kPair + at, adjoint, count);
  load_each(in.weights + m * kPair + at, weights, count);
  keep_states(p, a, m, at, states, count);
  if (!alone)
    for (std::int64_t c = 0; c < in.channels; ++c)
      store_each(p.dW + (c * in.substates + m) * kPair + at, dW, count);
  for (std::int64_t t = in.steps - 1; t >= 0; --t) {
    const Complex* const before = states + t * kBackwardStates;
    Complex sum[kBackwardStates] = {};
    for (std::int64_t c = 0; c < (alone ? 1 : in.channels); ++c) {
      const std::int64_t pair = (c * in.substates + m) * kPair + at;
      if (!alone) load_each(in.weights + pair, weights, count);
      if (!alone) load_each(p.dW + pair, dW, count);
      add_channel(load(p.dy + (c * kChunk + t) * kFloatLanes + at), weights,
                  before + kBackwardStates, sum, dW, count);
      if (!alone) store_each(p.dW + pair, dW, count);
    }
    if (t + 1 < in.steps) {
      add_step_back(a, adjoint, sum, count);
    } else {
      LRNN_EACH sum[j] = {sum[j].re + adjoint[j].re, sum[j].im + adjoint[j].im};
    }
    LRNN_EACH adjoint[j] = sum[j];
    float* const dv = p.dv + t * kFloatLanes + at;
    store(dv, load(dv) + add_multiplier(before, adjoint, da, count));
  }
  Complex carry[kBackwardStates] = {};
  add_step_back(a, adjoint, carry, count);
  store_each(p.carries + m * kPair + at, carry, count);
  store_each(p.da + m * kPair + at, da, count);
  if (alone) store_each(p.dW + m * kPair + at, dW, count);
}
LRNN_INLINE void backward_vector(const FloatLaneBackward& p, std::int64_t at, const bool alone) {
  std::int64_t m = 0;
  for (; m + kBackwardStates <= p.in.substates; m += kBackwardStates)
    backward_states(p, m, at, alone, kBackwardStates);
  for (; m < p.in.substates; ++m) backward_states(p, m, at, alone, 1);
}
void run_backward(const FloatLaneBackward& p) {
  for (std::int64_t at = 0; at < kFloatLanes; at += kLanes)
    if (p.in.channels == 1)
      backward_vector(p, at, true);
    else
      backward_vector(p, at, false);
}

}  // namespace LRNN_ISA
