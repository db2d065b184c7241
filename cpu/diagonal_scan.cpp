// Everything is computed in double, also for float operands: the sum of the two parts of a
// multiplier needs it, and a slow lane would add up the rounding of thousands of steps. Float
// operands have kernels of their own: diagonal_scan_float.hpp.
#include "lrnn/ops/diagonal_scan.hpp"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/eigen.hpp"
#include "common/exponential.hpp"
#include "diagonal_scan_float.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kChunk = kDiagonalScanChunk;
// Lanes of one work item: a constant, so that the compiler vectorises loops over them and sums do
// not depend on the number of threads. Unused lanes of the last block hold zeros.
constexpr std::int64_t kLanes = 16;

// In cache lines, so that no vector lies across two. Loops that convert them are marked for
// the compiler, which would else unroll them into scalars before it vectorises.
struct alignas(64) Lanes {
  double re[kLanes] = {};
  double im[kLanes] = {};
};

// The first `count` of kLanes elements; with all of them, a loop of known length.
template <class T>
void load(const T* from, std::int64_t count, double* to) {
  if (count == kLanes) {
#pragma omp simd
    for (std::int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<double>(from[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(from[i]);
  }
}
template <class T>
void store(const double* from, std::int64_t count, T* to) {
  if (count == kLanes) {
#pragma omp simd
    for (std::int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<T>(from[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }
}
// `count` lanes of planes whose imaginary parts lie `plane` elements further on.
template <class T>
Lanes load(const T* re, std::int64_t plane, std::int64_t count) {
  Lanes out;
  load(re, count, out.re);
  load(re + plane, count, out.im);
  return out;
}
template <class T>
void store(T* re, std::int64_t plane, std::int64_t count, const Lanes& value) {
  store(value.re, count, re);
  store(value.im, count, re + plane);
}

Lanes times(const Lanes& a, const Lanes& b) {
  Lanes out;
  for (std::int64_t i = 0; i < kLanes; ++i) {
    out.re[i] = a.re[i] * b.re[i] - a.im[i] * b.im[i];
    out.im[i] = a.re[i] * b.im[i] + a.im[i] * b.re[i];
  }
  return out;
}
// a conj(b)
Lanes times_conj(const Lanes& a, const Lanes& b) {
  Lanes out;
  for (std::int64_t i = 0; i < kLanes; ++i) {
    out.re[i] = a.re[i] * b.re[i] + a.im[i] * b.im[i];
    out.im[i] = a.im[i] * b.re[i] - a.re[i] * b.im[i];
  }
  return out;
}
void add(Lanes& sum, const Lanes& value) {
  for (std::int64_t i = 0; i < kLanes; ++i) {
    sum.re[i] += value.re[i];
    sum.im[i] += value.im[i];
  }
}

// The multipliers of one block of lanes at one position; `slope` is the derivative of an event
// multiplier by w = tau z.
struct Step {
  Lanes a;
  Lanes slope;
};

// z = re + 2 pi i turns of one block of lanes in the event form.
struct alignas(64) Rate {
  double re[kLanes] = {};
  double turns[kLanes] = {};
};
constexpr double kTwoPi = 6.283185307179586;

Step exponential_step(const Rate& z, double tau) {
  Step s;
  for (std::int64_t i = 0; i < kLanes; ++i) {
    const double size = exponential(tau * z.re[i]);
    const SinCos angle = sin_cos_of_turns(tau * z.turns[i]);
    s.a.re[i] = size * angle.cos;
    s.a.im[i] = size * angle.sin;
  }
  s.slope = s.a;
  return s;
}
// (1 + w / 2) r and r^2 with r = 1 / (1 - w / 2).
Step bilinear_step(const Rate& z, double tau) {
  Lanes numerator;
  Lanes r;
  for (std::int64_t i = 0; i < kLanes; ++i) {
    const double half_re = 0.5 * tau * z.re[i];
    const double half_im = 0.5 * tau * kTwoPi * z.turns[i];
    const double scale = 1.0 / ((1.0 - half_re) * (1.0 - half_re) + half_im * half_im);
    r.re[i] = (1.0 - half_re) * scale;
    r.im[i] = half_im * scale;
    numerator.re[i] = 1.0 + half_re;
    numerator.im[i] = half_im;
  }
  return {.a = times(numerator, r), .slope = times(r, r)};
}

template <class T>
struct Multiplier {
  const T* a;
  const T* a_low;
  const T* z;
  const T* tau;
  bool bilinear;
  std::int64_t lanes;

  Multiplier(const ScanMultiplier& m, std::int64_t n)
      : a(m.a ? m.a.data<T>() : nullptr),
        a_low(m.a_low ? m.a_low.data<T>() : nullptr),
        z(m.z ? m.z.data<T>() : nullptr),
        tau(m.tau ? m.tau.data<T>() : nullptr),
        bilinear(m.event_bilinear),
        lanes(n) {}

  [[nodiscard]] bool event() const { return z != nullptr; }

  [[nodiscard]] Step fixed(std::int64_t first, std::int64_t count) const {
    Step s;
    if (event()) return s;
    s.a = load(a + first, lanes, count);
    if (a_low != nullptr) add(s.a, load(a_low + first, lanes, count));
    return s;
  }
  [[nodiscard]] Rate rate(std::int64_t first, std::int64_t count) const {
    Rate rate;
    if (!event()) return rate;
    const auto part = [&](std::int64_t row, std::int64_t i) {
      return static_cast<double>(z[row * lanes + first + i]);
    };
    for (std::int64_t i = 0; i < count; ++i) {
      rate.re[i] = part(0, i) + part(1, i);
      rate.turns[i] = part(2, i) + part(3, i);
    }
    return rate;
  }
  [[nodiscard]] Step event_step(const Rate& rate, std::int64_t token) const {
    const auto relative = static_cast<double>(tau[token]);
    return bilinear ? bilinear_step(rate, relative) : exponential_step(rate, relative);
  }
};

// The drive before its factor.
template <class T>
struct Drive {
  const T* v;
  std::int64_t stride;  // between tokens
  std::int64_t lanes;
  bool complex;

  Drive(const TensorView& view, std::int64_t n)
      : v(view.data<T>()),
        stride(view.rank() == 4 ? 2 * n : n),
        lanes(n),
        complex(view.rank() == 4) {}

  [[nodiscard]] Lanes at(std::int64_t token, std::int64_t first, std::int64_t count) const {
    const T* const p = v + token * stride + first;
    if (complex) return load(p, lanes, count);
    Lanes out;
    load(p, count, out.re);
    return out;
  }
};

// What both passes share.
template <class T>
struct Problem {
  std::int64_t batch;
  std::int64_t seqlen;
  std::int64_t lanes;
  std::int64_t blocks;
  std::int64_t chunks;
  const std::int32_t* lengths;
  Multiplier<T> multiplier;
  Drive<T> drive;
  const T* gamma;

  Problem(const ScanMultiplier& m, const TensorView& v, const TensorView& lengths_view,
          const TensorView& gamma_view)
      : batch(v.dim(0)),
        seqlen(v.dim(1)),
        lanes(v.dim(-1)),
        blocks((lanes + kLanes - 1) / kLanes),
        chunks(diagonal_scan_chunks(seqlen)),
        lengths(lengths_view ? lengths_view.data<std::int32_t>() : nullptr),
        multiplier(m, lanes),
        drive(v, lanes),
        gamma(gamma_view ? gamma_view.data<T>() : nullptr) {}

  [[nodiscard]] std::int64_t length(std::int64_t b) const {
    return lengths == nullptr ? seqlen : lengths[b];
  }
  [[nodiscard]] Lanes input_factor(std::int64_t first, std::int64_t count) const {
    if (gamma != nullptr) return load(gamma + first, lanes, count);
    Lanes one;
    std::fill_n(one.re, kLanes, 1.0);
    return one;
  }
};

// One batch row and one block of lanes, forward.
template <class T>
void forward_block(const Problem<T>& problem, const DiagonalScanForward& args, std::int64_t b,
                   std::int64_t first) {
  const std::int64_t n = problem.lanes;
  const std::int64_t count = std::min(kLanes, n - first);
  const std::int64_t length = problem.length(b);
  const Lanes gamma = problem.input_factor(first, count);
  const Rate rate = problem.multiplier.rate(first, count);
  Step step = problem.multiplier.fixed(first, count);
  const std::int64_t state_at = b * 2 * n + first;
  Lanes x;
  if (args.state_in) x = load(args.state_in.data<T>() + state_at, n, count);
  T* const chunk_states = args.chunk_states ? args.chunk_states.data<T>() : nullptr;
  T* const out = args.x.data<T>() + (b * problem.seqlen * 2 * n + first);
  for (std::int64_t t = 0; t < problem.seqlen; ++t) {
    if (t % kChunk == 0 && chunk_states != nullptr)
      store(chunk_states + ((b * problem.chunks + t / kChunk) * 2 * n + first), n, count, x);
    if (t >= length) {
      store(out + t * 2 * n, n, count, Lanes{});
      continue;
    }
    const std::int64_t token = b * problem.seqlen + t;
    if (problem.multiplier.event()) step = problem.multiplier.event_step(rate, token);
    x = times(step.a, x);
    add(x, times(gamma, problem.drive.at(token, first, count)));
    store(out + t * 2 * n, n, count, x);
  }
  if (args.state_out) store(args.state_out.data<T>() + state_at, n, count, x);
}

// Gradients of what all positions share, of one block of lanes.
struct Sums {
  Lanes multiplier;  // a in the fixed form, z in the event form
  Lanes gamma;
};

// One batch row and one block of lanes, backward: chunk by chunk from the right, each time the
// states of the chunk, then its adjoints.
template <class T>
class BackwardBlock {
 public:
  BackwardBlock(const Problem<T>& problem, const DiagonalScanBackward& args, std::int64_t b,
                std::int64_t first, double* dtau)
      : problem_(problem),
        args_(args),
        b_(b),
        first_(first),
        count_(std::min(kLanes, problem.lanes - first)),
        dtau_(dtau),
        gamma_(problem.input_factor(first, count_)),
        rate_(problem.multiplier.rate(first, count_)),
        event_(problem.multiplier.event()) {
    steps_[0] = problem.multiplier.fixed(first, count_);
  }

  Sums run() {
    const std::int64_t n = problem_.lanes;
    const std::int64_t state_at = b_ * 2 * n + first_;
    const std::int64_t length = problem_.length(b_);
    if (args_.dstate_out) carry_ = load(args_.dstate_out.data<T>() + state_at, n, count_);
    for (std::int64_t chunk = problem_.chunks - 1; chunk >= 0; --chunk) {
      const std::int64_t begin = chunk * kChunk;
      const std::int64_t end = std::min(begin + kChunk, problem_.seqlen);
      const std::int64_t valid = std::clamp(length, begin, end);
      write_padding(valid, end);
      recompute(chunk, begin, valid);
      reverse(begin, valid);
    }
    if (args_.dstate_in) store(args_.dstate_in.data<T>() + state_at, n, count_, carry_);
    return sums_;
  }

 private:
  [[nodiscard]] std::int64_t token(std::int64_t t) const { return b_ * problem_.seqlen + t; }
  // Element `first_` of position t in a tensor [B, L, 2, N].
  [[nodiscard]] std::int64_t at(std::int64_t t) const {
    return token(t) * 2 * problem_.lanes + first_;
  }
  // The fixed form has one step for all positions.
  [[nodiscard]] Step& step_of(std::size_t j) { return steps_[event_ ? j : 0]; }

  void write_dv(std::int64_t t, const Lanes& value) const {
    T* const out = args_.dv.data<T>() + token(t) * problem_.drive.stride + first_;
    if (problem_.drive.complex) return store(out, problem_.lanes, count_, value);
    store(value.re, count_, out);
  }

  void write_padding(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t t = begin; t < end; ++t) {
      write_dv(t, {});
      if (args_.x) store(args_.x.data<T>() + at(t), problem_.lanes, count_, Lanes{});
      if (dtau_ != nullptr) dtau_[token(t)] = 0.0;
    }
  }

  // before_[j]: the state that enters position begin + j.
  void recompute(std::int64_t chunk, std::int64_t begin, std::int64_t end) {
    const std::int64_t n = problem_.lanes;
    const T* const states = args_.chunk_states.data<T>();
    Lanes x = load(states + ((b_ * problem_.chunks + chunk) * 2 * n + first_), n, count_);
    for (std::int64_t t = begin; t < end; ++t) {
      const auto j = static_cast<std::size_t>(t - begin);
      before_[j] = x;
      if (event_) steps_[j] = problem_.multiplier.event_step(rate_, token(t));
      x = times(step_of(j).a, x);
      add(x, times(gamma_, problem_.drive.at(token(t), first_, count_)));
      if (args_.x) store(args_.x.data<T>() + at(t), n, count_, x);
    }
  }

  void reverse(std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = end - 1; t >= begin; --t) {
      const auto j = static_cast<std::size_t>(t - begin);
      const Lanes v = problem_.drive.at(token(t), first_, count_);
      Lanes p = load(args_.dx.data<T>() + at(t), problem_.lanes, count_);
      add(p, carry_);
      carry_ = times_conj(p, step_of(j).a);
      const Lanes da = times_conj(p, before_[j]);
      if (event_)
        event_gradient(t, times_conj(da, step_of(j).slope));
      else
        add(sums_.multiplier, da);
      add(sums_.gamma, times_conj(p, v));
      write_dv(t, times_conj(p, gamma_));
    }
  }

  // dw: the gradient of tau_t z.
  void event_gradient(std::int64_t t, const Lanes& dw) {
    const auto tau = static_cast<double>(problem_.multiplier.tau[token(t)]);
    double parts[kLanes];
#pragma omp simd
    for (std::int64_t i = 0; i < kLanes; ++i) {
      sums_.multiplier.re[i] += tau * dw.re[i];
      sums_.multiplier.im[i] += tau * dw.im[i];
      parts[i] = dw.re[i] * rate_.re[i] + dw.im[i] * (kTwoPi * rate_.turns[i]);
    }
    if (dtau_ == nullptr) return;
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2)
      for (std::int64_t i = 0; i < half; ++i) parts[i] += parts[half + i];
    dtau_[token(t)] = parts[0];
  }

  const Problem<T>& problem_;
  const DiagonalScanBackward& args_;
  std::int64_t b_;
  std::int64_t first_;
  std::int64_t count_;
  double* dtau_;  // [B, L], the part of this block of lanes
  Lanes gamma_;
  Rate rate_;
  bool event_;
  Lanes carry_;  // what the positions behind add to the adjoint of the next state
  Sums sums_;
  Lanes before_[kChunk];
  Step steps_[kChunk];
};

// Adds lanes first, ... of `value` to planes.
template <class T>
void add_to_planes(const MutableTensorView& planes, std::int64_t first, const Lanes& value) {
  if (!planes) return;
  const std::int64_t n = planes.dim(1);
  T* const out = planes.data<T>() + first;
  for (std::int64_t i = 0; i < std::min(kLanes, n - first); ++i) {
    out[i] += static_cast<T>(value.re[i]);
    out[n + i] += static_cast<T>(value.im[i]);
  }
}

// Sums over the batch, in order. a is the same at every token, so dlog_a is conj(a) da.
template <class T>
void add_sums(const Problem<T>& problem, const DiagonalScanBackward& args,
              const std::vector<Sums>& sums) {
  for (std::int64_t block = 0; block < problem.blocks; ++block) {
    Sums total;
    for (std::int64_t b = 0; b < problem.batch; ++b) {
      const Sums& part = sums[static_cast<std::size_t>(b * problem.blocks + block)];
      add(total.multiplier, part.multiplier);
      add(total.gamma, part.gamma);
    }
    const std::int64_t first = block * kLanes;
    const Lanes a = problem.multiplier.fixed(first, std::min(kLanes, problem.lanes - first)).a;
    add_to_planes<T>(args.da, first, total.multiplier);
    add_to_planes<T>(args.dlog_a, first, times_conj(total.multiplier, a));
    add_to_planes<T>(args.dz, first, total.multiplier);
    add_to_planes<T>(args.dgamma, first, total.gamma);
  }
}

// dtau = the sum over blocks of lanes, in order.
template <class T>
void write_dtau(const MutableTensorView& out, const TensorView& partial) {
  const auto parts = as_rows<double>(partial);
  RowVector<double> sum = parts.row(0);
  for (Eigen::Index block = 1; block < parts.rows(); ++block) sum += parts.row(block);
  as_row_vector<T>(out) = sum.template cast<T>();
}

template <class View>
auto* floats(const View& view) {
  return view ? view.template data<float>() : nullptr;
}
FloatDiagonalScan float_scan(const Problem<float>& p) {
  return {.a = p.multiplier.a,
          .a_low = p.multiplier.a_low,
          .z = p.multiplier.z,
          .tau = p.multiplier.tau,
          .bilinear = p.multiplier.bilinear,
          .complex = p.drive.complex,
          .v = p.drive.v,
          .gamma = p.gamma,
          .lengths = p.lengths,
          .batch = p.batch,
          .seqlen = p.seqlen,
          .lanes = p.lanes,
          .chunks = p.chunks};
}

template <class T>
void forward(const Problem<T>& problem, const DiagonalScanForward& args) {
#pragma omp parallel for
  for (std::int64_t item = 0; item < problem.batch * problem.blocks; ++item)
    forward_block(problem, args, item / problem.blocks, item % problem.blocks * kLanes);
}
template <>
void forward(const Problem<float>& problem, const DiagonalScanForward& args) {
  run_float_diagonal({.in = float_scan(problem),
                      .state_in = floats(args.state_in),
                      .x = floats(args.x),
                      .state_out = floats(args.state_out),
                      .chunk_states = floats(args.chunk_states)});
}

// The sums of each block of lanes of each sequence; dtau, if not null, is [parts, B L].
template <class T>
std::vector<Sums> backward(const Problem<T>& problem, const DiagonalScanBackward& args,
                           double* dtau) {
  std::vector<Sums> sums(static_cast<std::size_t>(problem.batch * problem.blocks));
#pragma omp parallel for
  for (std::int64_t item = 0; item < problem.batch * problem.blocks; ++item) {
    const std::int64_t block = item % problem.blocks;
    double* const part = dtau == nullptr ? nullptr : dtau + block * problem.batch * problem.seqlen;
    sums[static_cast<std::size_t>(item)] =
        BackwardBlock<T>(problem, args, item / problem.blocks, block * kLanes, part).run();
  }
  return sums;
}
template <>
std::vector<Sums> backward(const Problem<float>& problem, const DiagonalScanBackward& args,
                           double* dtau) {
  const std::int64_t n = problem.lanes;
  std::vector<double> multiplier(static_cast<std::size_t>(problem.batch * 2 * n));
  std::vector<double> gamma(multiplier.size());
  run_float_diagonal_backward({.in = float_scan(problem),
                               .dx = floats(args.dx),
                               .chunk_states = floats(args.chunk_states),
                               .dstate_out = floats(args.dstate_out),
                               .dv = floats(args.dv),
                               .x = floats(args.x),
                               .dstate_in = floats(args.dstate_in),
                               .multiplier = multiplier.data(),
                               .gamma = gamma.data(),
                               .dtau = dtau});
  std::vector<Sums> sums;
  for (std::int64_t b = 0; b < problem.batch; ++b)
    for (std::int64_t first = 0; first < n; first += kLanes) {
      const std::int64_t at = b * 2 * n + first;
      const std::int64_t count = std::min(kLanes, n - first);
      sums.push_back({.multiplier = load(multiplier.data() + at, n, count),
                      .gamma = load(gamma.data() + at, n, count)});
    }
  return sums;
}
// The parts of dtau.
template <class T>
std::int64_t parts_of(const Problem<T>& problem) {
  return std::is_same_v<T, float> ? (problem.lanes + kDiagonalLanes - 1) / kDiagonalLanes
                                  : problem.blocks;
}

}  // namespace

void diagonal_scan_forward(Context&, const DiagonalScanForward& args) {
  visit_float("diagonal_scan_forward", args.v.dtype(), [&]<class T>() {
    forward(Problem<T>(args.multiplier, args.v, args.lengths, args.gamma), args);
  });
}

void diagonal_scan_backward(Context& ctx, const DiagonalScanBackward& args) {
  visit_float("diagonal_scan_backward", args.v.dtype(), [&]<class T>() {
    const Problem<T> problem(args.multiplier, args.v, args.lengths, args.gamma);
    Tensor partial;
    if (args.dtau)
      partial = ctx.empty({parts_of(problem), problem.batch * problem.seqlen}, DType::float64);
    add_sums(problem, args,
             backward(problem, args, args.dtau ? partial.view().data<double>() : nullptr));
    if (args.dtau) write_dtau<T>(args.dtau, partial);
  });
}

}  // namespace lrnn::cpu
