/// What every mixer promises, for every registered variant of its options.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <omp.h>
#include <optional>

#include <gtest/gtest.h>

#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

// Random shapes per variant and test on the CPU, beside the edge lengths; every mixer has three
// variants or more.
constexpr int kRandomCases = 100;
constexpr int kCudaCases = 50;  // per variant and test, edge lengths included
// Of KV caches: two chunks of attention, one token and a short prefix.
constexpr std::int64_t kMaxSeqlen = 72;

// One thread: the tensors are so small that more would spend their time waiting for each other.
class OneThread : public ::testing::Environment {
  void SetUp() override { omp_set_num_threads(1); }
};
const ::testing::Environment* const kOneThread =
    ::testing::AddGlobalTestEnvironment(new OneThread);  // owned by the framework

using Named = std::map<std::string, std::vector<double>>;

/// One mixer with its parameters on one device.
struct Instance {
  Context ctx;
  ParameterStore store;
  std::unique_ptr<Mixer> mixer;
  DType dtype;

  Instance(Context context, const MixerVariant& v, std::int64_t d_model, std::int64_t d_state,
           DType type, std::uint64_t seed)
      : ctx(std::move(context)), dtype(type) {
    mixer = make_mixer(v.type, v.kwargs, {.d_model = d_model, .d_state = d_state},
                       ParameterScope(store, "mixer."));
    store.materialize(ctx, dtype, seed);
    store.enable_grad(ctx);
    // Noise, so that no bias is 0 and no D is 1. Values stay exact in float32.
    for (Parameter& p : store) {
      Rng rng(seed, p.name + "#noise");
      auto values = ctx.to_host_as_double(p.value);
      for (double& e : values)
        e = static_cast<double>(static_cast<float>(e + 0.05 * rng.uniform(-1, 1)));
      ctx.write_from_host(p.value, values);
    }
  }
  void copy_parameters_from(Instance& other) {
    for (Parameter& p : store)
      ctx.write_from_host(p.value, other.ctx.to_host_as_double(other.store.at(p.name).value));
  }
};

struct Sizes {
  std::int64_t batch;
  std::int64_t seqlen;
  std::int64_t d_model;
  std::int64_t d_state;
};
std::ostream& operator<<(std::ostream& os, const Sizes& s) {
  return os << "B " << s.batch << " L " << s.seqlen << " d_model " << s.d_model << " d_state "
            << s.d_state;
}

struct Inputs {
  std::vector<double> x;
  std::vector<double> dy;
  std::vector<double> tau;
  std::vector<double> lengths;  // empty: none
};

Inputs random_inputs(const Sizes& s, std::uint64_t seed, bool with_lengths) {
  Rng rng(seed, "inputs");
  Inputs in;
  const auto n = static_cast<std::size_t>(s.batch * s.seqlen * s.d_model);
  const auto rounded = [&](double low, double high) {
    return static_cast<double>(to_float(to_bfloat16(static_cast<float>(rng.uniform(low, high)))));
  };
  for (std::size_t i = 0; i < n; ++i) in.x.push_back(rounded(-1, 1));
  for (std::size_t i = 0; i < n; ++i) in.dy.push_back(rounded(-1, 1));
  for (std::int64_t i = 0; i < s.batch * s.seqlen; ++i) in.tau.push_back(rounded(0.2, 2.0));
  if (with_lengths)
    for (std::int64_t b = 0; b < s.batch; ++b)
      in.lengths.push_back(
          static_cast<double>(1 + rng.below(static_cast<std::uint64_t>(s.seqlen))));
  return in;
}

std::vector<std::int64_t> edge_lengths(const MixerVariant& v) {
  std::vector<std::int64_t> lengths = {1, 2, v.conv_width - 1, v.conv_width, v.conv_width + 1};
  if (v.chunk > 0)
    for (const std::int64_t l : {v.chunk - 1, v.chunk, v.chunk + 1, 2 * v.chunk + 1})
      lengths.push_back(l);
  std::erase_if(lengths, [](std::int64_t l) { return l < 1; });
  return lengths;
}

int cpu_cases(const MixerVariant& v) {
  return kRandomCases + static_cast<int>(edge_lengths(v).size());
}

// Case i of a variant: the edge lengths first, then random ones.
Sizes sizes_of(const MixerVariant& v, int i, std::string_view test) {
  Rng rng(static_cast<std::uint64_t>(i), std::string(test) + v.name);
  const auto edges = edge_lengths(v);
  const auto& [d_model, d_state] = v.sizes[rng.below(v.sizes.size())];
  const auto k = static_cast<std::size_t>(i);
  return {.batch = static_cast<std::int64_t>(1 + rng.below(3)),
          .seqlen = k < edges.size() ? edges[k] : static_cast<std::int64_t>(1 + rng.below(24)),
          .d_model = d_model,
          .d_state = d_state};
}

// What the mixer remembers of a sequence.
std::unique_ptr<MixerState> state_after(Instance& m, const Sizes& s, const Inputs& in) {
  auto state = m.mixer->make_state(m.ctx, s.batch, kMaxSeqlen, m.dtype);
  const Tensor x = m.ctx.from_host_as({s.batch, s.seqlen, s.d_model}, m.dtype, in.x);
  Tensor y = m.ctx.empty({s.batch, s.seqlen, s.d_model}, m.dtype);
  m.mixer->forward(m.ctx, {.x = x, .y = y, .state_out = state.get()}, false);
  return state;
}

// A state that the mixer can reach: what it remembers of a short random sequence.
std::unique_ptr<MixerState> random_state(Instance& m, const Sizes& s, std::uint64_t seed) {
  const Sizes before{s.batch, 3, s.d_model, s.d_state};
  return state_after(m, before, random_inputs(before, seed + 77, false));
}

void for_each_float(MixerState& state, const MixerState::Visitor& f) {
  state.visit([&](std::string_view name, MutableTensorView t) {
    if (t.dtype() != DType::int32 && t.dtype() != DType::int64) f(name, t);
  });
}

Named read_state(Context& ctx, MixerState& state) {
  Named out;
  for_each_float(state, [&](std::string_view name, MutableTensorView t) {
    out[std::string(name)] = ctx.to_host_as_double(t);
  });
  return out;
}

double max_abs(const std::vector<double>& v) {
  double m = 0;
  for (const double e : v) m = std::max(m, std::abs(e));
  return m;
}

void expect_close(const std::vector<double>& got, const std::vector<double>& want, double tolerance,
                  const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  const double scale = 1 + max_abs(want);
  for (std::size_t i = 0; i < want.size(); ++i)
    ASSERT_NEAR(got[i], want[i], tolerance * scale) << what << '[' << i << ']';
}

void expect_close(const Named& got, const Named& want, double tolerance, const std::string& what) {
  for (const auto& [name, values] : want)
    expect_close(got.at(name), values, tolerance, what + name);
}

/// Everything one forward and backward pass produces.
struct Pass {
  std::vector<double> y;
  std::vector<double> dx;
  std::vector<double> dtau;
  Named grads;
  Named state_out;
  Named dstate_in;
  std::unique_ptr<MixerState> final_state;
  std::unique_ptr<MixerState> dstate;
};

struct PassOptions {
  bool event = false;
  MixerState* state_in = nullptr;
  MixerState* dstate_out = nullptr;
  bool backward = true;
  bool stateless = false;
};

Pass run(Instance& m, const Sizes& s, const Inputs& in, const PassOptions& o) {
  Context& ctx = m.ctx;
  const Shape shape = {s.batch, s.seqlen, s.d_model};
  const Tensor x = ctx.from_host_as(shape, m.dtype, in.x);
  Tensor y = ctx.empty(shape, m.dtype);
  Tensor tau, lengths;
  if (o.event) tau = ctx.from_host_as({s.batch, s.seqlen}, accumulate_dtype(m.dtype), in.tau);
  if (!in.lengths.empty()) lengths = ctx.from_host_as({s.batch}, DType::int32, in.lengths);
  Pass p;
  if (!o.stateless) p.final_state = m.mixer->make_state(ctx, s.batch, kMaxSeqlen, m.dtype);
  auto saved = m.mixer->forward(ctx,
                                {.x = x,
                                 .integration_timesteps = tau,
                                 .lengths = lengths,
                                 .state_in = o.state_in,
                                 .y = y,
                                 .state_out = p.final_state.get()},
                                o.backward);
  p.y = ctx.to_host_as_double(y);
  if (p.final_state) p.state_out = read_state(ctx, *p.final_state);
  if (!o.backward) return p;
  m.store.zero_grad(ctx);
  const Tensor dy = ctx.from_host_as(shape, m.dtype, in.dy);
  Tensor dx = ctx.empty(shape, m.dtype);
  Tensor dtau;
  if (o.event) dtau = ctx.zeros({s.batch, s.seqlen}, accumulate_dtype(m.dtype));
  if (o.state_in != nullptr) p.dstate = m.mixer->make_state(ctx, s.batch, kMaxSeqlen, m.dtype);
  m.mixer->backward(ctx, *saved,
                    {.dy = dy,
                     .dstate_out = o.dstate_out,
                     .dx = dx,
                     .dintegration_timesteps = dtau,
                     .dstate_in = p.dstate.get()});
  p.dx = ctx.to_host_as_double(dx);
  if (o.event) p.dtau = ctx.to_host_as_double(dtau);
  for (Parameter& q : m.store) p.grads[q.name] = ctx.to_host_as_double(q.grad);
  if (p.dstate) p.dstate_in = read_state(ctx, *p.dstate);
  return p;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double s = 0;
  for (std::size_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
  return s;
}

void add(const Named& values, Named& sums) {
  for (const auto& [name, v] : values) {
    auto& sum = sums[name];
    sum.resize(v.size(), 0.0);
    for (std::size_t i = 0; i < v.size(); ++i) sum[i] += v[i];
  }
}

class MixerContract : public ::testing::TestWithParam<MixerVariant> {};

/// The loss of the gradient test: <y, dy> + <final state, its cotangent>.
struct GradientProblem {
  Instance& m;
  Sizes s;
  Inputs in;
  bool event;
  std::unique_ptr<MixerState> state_in;
  std::unique_ptr<MixerState> dstate_out;

  double loss() {
    const Pass p = run(m, s, in,
                       {.event = event,
                        .state_in = state_in.get(),
                        .backward = false,
                        .stateless = dstate_out == nullptr});
    double sum = dot(p.y, in.dy);
    if (dstate_out)
      for (const auto& [name, values] : read_state(m.ctx, *dstate_out))
        sum += dot(p.state_out.at(name), values);
    return sum;
  }
};

// Fourth-order difference quotient along a random direction of +-1 against <gradient, direction>.
// h is small because frequencies times lengths reach several hundred.
void check_direction(const std::string& what, const std::vector<double>& gradient,
                     const std::vector<double>& values, double tolerance, std::uint64_t seed,
                     const std::function<double(const std::vector<double>&)>& loss_at) {
  Rng rng(seed, what);
  std::vector<double> direction(values.size());
  for (double& d : direction) d = rng.uniform() < 0.5 ? -1.0 : 1.0;
  constexpr double h = 4e-5;
  const auto at = [&](double step) {
    std::vector<double> moved = values;
    for (std::size_t i = 0; i < moved.size(); ++i) moved[i] += step * direction[i];
    return loss_at(moved);
  };
  const double numeric = (at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h);
  const double analytic = dot(gradient, direction);
  const double norm = std::sqrt(dot(gradient, gradient));
  // 1e-9: what rounding of the loss leaves after division by h.
  ASSERT_NEAR(analytic, numeric, tolerance * (std::abs(numeric) + norm) + 1e-9) << what;
}

void check_gradients(GradientProblem& p, double tolerance, std::uint64_t seed) {
  Pass pass = run(p.m, p.s, p.in,
                  {.event = p.event,
                   .state_in = p.state_in.get(),
                   .dstate_out = p.dstate_out.get(),
                   .stateless = p.dstate_out == nullptr});
  const auto over = [&](std::vector<double>& slot) {
    return [&](const std::vector<double>& moved) {
      const std::vector<double> kept = std::exchange(slot, moved);
      const double value = p.loss();
      slot = kept;
      return value;
    };
  };
  check_direction("x", pass.dx, p.in.x, tolerance, seed, over(p.in.x));
  if (p.event && p.m.mixer->uses_integration_timesteps())
    check_direction("integration_timesteps", pass.dtau, p.in.tau, tolerance, seed, over(p.in.tau));
  const auto over_tensor = [&](MutableTensorView t) {
    return [&p, t](const std::vector<double>& moved) {
      const auto kept = p.m.ctx.to_host_as_double(t);
      p.m.ctx.write_from_host(t, moved);
      const double value = p.loss();
      p.m.ctx.write_from_host(t, kept);
      return value;
    };
  };
  for (Parameter& q : p.m.store)
    check_direction(q.name, pass.grads.at(q.name), p.m.ctx.to_host_as_double(q.value), tolerance,
                    seed, over_tensor(q.value));
  if (!p.state_in) return;
  for_each_float(*p.state_in, [&](std::string_view name, MutableTensorView t) {
    check_direction(std::string(name), pass.dstate_in.at(std::string(name)),
                    p.m.ctx.to_host_as_double(t), tolerance, seed, over_tensor(t));
  });
}

// A cotangent of the final state. Slots of a KV cache that hold nothing get none.
std::unique_ptr<MixerState> random_cotangent(Instance& m, const Pass& reached, const Sizes& s,
                                             std::uint64_t seed) {
  auto cotangent = m.mixer->make_state(m.ctx, s.batch, kMaxSeqlen, m.dtype);
  for_each_float(*cotangent, [&](std::string_view name, MutableTensorView t) {
    Rng rng(seed, name);
    auto values = m.ctx.to_host_as_double(t);
    const auto& state = reached.state_out.at(std::string(name));
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = state[i] == 0.0 ? 0.0 : rng.uniform(-1, 1);
    m.ctx.write_from_host(t, values);
  });
  return cotangent;
}

void gradient_case(const MixerVariant& v, int i, bool with_lengths) {
  const auto seed = static_cast<std::uint64_t>(i);
  const Sizes s = sizes_of(v, i, with_lengths ? "gradient_lengths" : "gradient");
  SCOPED_TRACE(detail::concat("case ", i, ": ", s));
  Instance m(Context::cpu(), v, s.d_model, s.d_state, DType::float64, seed);
  GradientProblem p{m, s, random_inputs(s, seed, with_lengths), v.event, nullptr, nullptr};
  if (v.causal) {
    if (i % 2 == 0) p.state_in = random_state(m, s, seed);
    const Pass reached =
        run(m, s, p.in, {.event = v.event, .state_in = p.state_in.get(), .backward = false});
    p.dstate_out = random_cotangent(m, reached, s, seed);
  }
  check_gradients(p, v.gradient_tolerance, seed);
}

TEST_P(MixerContract, GradientsMatchCalculus) {
  for (int i = 0; i < cpu_cases(GetParam()) && !HasFatalFailure(); ++i)
    gradient_case(GetParam(), i, false);
}

TEST_P(MixerContract, GradientsWithLengthsMatchCalculus) {
  for (int i = 0; i < cpu_cases(GetParam()) && !HasFatalFailure(); ++i)
    gradient_case(GetParam(), i, true);
}

Inputs cut_inputs(const Inputs& in, const Sizes& s, std::int64_t begin, std::int64_t length) {
  Inputs out;
  const auto cut = [&](const std::vector<double>& v, std::int64_t width) {
    std::vector<double> part;
    for (std::int64_t b = 0; b < s.batch; ++b) {
      const auto first = v.begin() + (b * s.seqlen + begin) * width;
      part.insert(part.end(), first, first + length * width);
    }
    return part;
  };
  out.x = cut(in.x, s.d_model);
  out.dy = cut(in.dy, s.d_model);
  out.tau = cut(in.tau, 1);
  return out;
}

// Two chunks with the state passed on, and its gradient passed back, equal one pass.
void chunks_case(const MixerVariant& v, Instance& m, const Sizes& s, int i, double tolerance) {
  const auto seed = static_cast<std::uint64_t>(i);
  Rng rng(seed, "split");
  const auto at =
      static_cast<std::int64_t>(1 + rng.below(static_cast<std::uint64_t>(s.seqlen - 1)));
  const Inputs in = random_inputs(s, seed, false);
  auto start = random_state(m, s, seed);
  Pass whole = run(m, s, in, {.event = v.event, .state_in = start.get()});
  const Sizes s1{s.batch, at, s.d_model, s.d_state};
  const Sizes s2{s.batch, s.seqlen - at, s.d_model, s.d_state};
  const Inputs in1 = cut_inputs(in, s, 0, at);
  const Inputs in2 = cut_inputs(in, s, at, s.seqlen - at);
  Pass before = run(m, s1, in1, {.event = v.event, .state_in = start.get(), .backward = false});
  Pass second = run(m, s2, in2, {.event = v.event, .state_in = before.final_state.get()});
  Pass first = run(m, s1, in1,
                   {.event = v.event, .state_in = start.get(), .dstate_out = second.dstate.get()});
  for (const auto& [part, begin, length] :
       {std::tuple{&first, std::int64_t{0}, at}, std::tuple{&second, at, s.seqlen - at}}) {
    const Inputs want = cut_inputs({whole.y, whole.dx, in.tau, {}}, s, begin, length);
    expect_close(part->y, want.x, tolerance, "y");
    expect_close(part->dx, want.dy, tolerance, "dx");
  }
  expect_close(second.state_out, whole.state_out, tolerance, "state ");
  expect_close(first.dstate_in, whole.dstate_in, tolerance, "dstate_in ");
  for (const auto& [name, want] : whole.grads) {
    std::vector<double> sum = first.grads.at(name);
    for (std::size_t k = 0; k < sum.size(); ++k) sum[k] += second.grads.at(name)[k];
    expect_close(sum, want, tolerance, "d " + name);
  }
}

// Token by token equals forward, states included.
void steps_case(const MixerVariant& v, Instance& m, const Sizes& s, int i, double tolerance) {
  const auto seed = static_cast<std::uint64_t>(i);
  const Inputs in = random_inputs(s, seed, false);
  auto state = random_state(m, s, seed);
  const Pass whole = run(m, s, in, {.event = v.event, .state_in = state.get(), .backward = false});
  for (std::int64_t t = 0; t < s.seqlen; ++t) {
    const Inputs token = cut_inputs(in, s, t, 1);
    const Tensor x = m.ctx.from_host_as({s.batch, 1, s.d_model}, m.dtype, token.x);
    Tensor y = m.ctx.empty({s.batch, 1, s.d_model}, m.dtype);
    Tensor tau;
    if (v.event) tau = m.ctx.from_host_as({s.batch, 1}, accumulate_dtype(m.dtype), token.tau);
    m.mixer->step(m.ctx, {.x = x, .integration_timesteps = tau, .y = y, .state = *state});
    expect_close(m.ctx.to_host_as_double(y), cut_inputs({whole.y, whole.y, in.tau, {}}, s, t, 1).x,
                 tolerance, detail::concat("y at t = ", t, ' '));
  }
  expect_close(read_state(m.ctx, *state), whole.state_out, tolerance, "state ");
}

void consistency_cases(const MixerVariant& v, bool cuda, DType dtype, double tolerance, int count) {
  for (int i = 0; i < count && !::testing::Test::HasFatalFailure(); ++i) {
    Sizes s = sizes_of(v, i, "consistency");
    s.seqlen = std::max<std::int64_t>(s.seqlen, 2);
    SCOPED_TRACE(detail::concat("case ", i, ": ", s));
    Instance m(cuda ? Context::cuda() : Context::cpu(), v, s.d_model, s.d_state, dtype,
               static_cast<std::uint64_t>(i));
    chunks_case(v, m, s, i, tolerance);
    steps_case(v, m, s, i, tolerance);
  }
}

TEST_P(MixerContract, WholeEqualsChunksEqualsSteps) {
  if (!GetParam().causal) GTEST_SKIP() << "not causal: no state";
  consistency_cases(GetParam(), false, DType::float64, 1e-11, cpu_cases(GetParam()));
}
TEST_P(MixerContract, WholeEqualsChunksEqualsStepsInFloat32) {
  if (!GetParam().causal) GTEST_SKIP() << "not causal: no state";
  consistency_cases(GetParam(), false, DType::float32, 1e-4, cpu_cases(GetParam()));
}
TEST_P(MixerContract, CudaWholeEqualsChunksEqualsSteps) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  if (!GetParam().causal) GTEST_SKIP() << "not causal: no state";
  consistency_cases(GetParam(), true, DType::float32, 1e-4, kCudaCases / 2);
}

std::vector<double> cut_row(const std::vector<double>& all, std::int64_t row, std::int64_t stride,
                            std::int64_t count) {
  const auto first = all.begin() + row * stride;
  return {first, first + count};
}

// What stands at padding must not matter: timesteps and gradients may be NaN there. Inputs are
// those of tokens and finite, since a model checks the ids of padding too.
void poison_padding(const Sizes& s, Inputs& in) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  const auto poison = [&](std::vector<double>& v, std::int64_t width, double value) {
    for (std::int64_t b = 0; b < s.batch; ++b) {
      const auto length = static_cast<std::int64_t>(in.lengths[static_cast<std::size_t>(b)]);
      std::fill(v.begin() + (b * s.seqlen + length) * width, v.begin() + (b + 1) * s.seqlen * width,
                value);
    }
  };
  poison(in.x, s.d_model, 50.0);
  poison(in.dy, s.d_model, kNan);
  poison(in.tau, 1, kNan);
}

// Compares row b of a padded pass with the pass of that row on its own.
void expect_row(const Pass& padded, const Pass& alone, const Sizes& s, std::int64_t b) {
  const std::int64_t width = s.seqlen * s.d_model;
  const auto with_zeros = [](std::vector<double> v, std::int64_t size) {
    v.resize(static_cast<std::size_t>(size), 0.0);
    return v;
  };
  expect_close(cut_row(padded.y, b, width, width), with_zeros(alone.y, width), 1e-12, "y");
  expect_close(cut_row(padded.dx, b, width, width), with_zeros(alone.dx, width), 1e-12, "dx");
  if (!padded.dtau.empty())
    expect_close(cut_row(padded.dtau, b, s.seqlen, s.seqlen), with_zeros(alone.dtau, s.seqlen),
                 1e-12, "dtau");
  const auto expect_states = [&](const Named& all, const Named& one, const std::string& what) {
    for (const auto& [name, values] : one) {
      const auto size = static_cast<std::int64_t>(values.size());
      expect_close(cut_row(all.at(name), b, size, size), values, 1e-12, what + name);
    }
  };
  expect_states(padded.state_out, alone.state_out, "state ");
  expect_states(padded.dstate_in, alone.dstate_in, "dstate_in ");
}

// A padded batch from the start (odd i) or from states on the way (even i).
void padding_case(const MixerVariant& v, int i) {
  const auto seed = static_cast<std::uint64_t>(i);
  const Sizes s = sizes_of(v, i, "padding");
  SCOPED_TRACE(detail::concat("case ", i, ": ", s));
  Instance m(Context::cpu(), v, s.d_model, s.d_state, DType::float64, seed);
  Inputs in = random_inputs(s, seed, true);
  poison_padding(s, in);
  const bool continued = v.causal && i % 2 == 0;
  const Sizes before{s.batch, 3, s.d_model, s.d_state};
  const Inputs prefix = random_inputs(before, seed + 77, false);
  const auto start = continued ? state_after(m, before, prefix) : nullptr;
  const Pass padded =
      run(m, s, in, {.event = v.event, .state_in = start.get(), .stateless = !v.causal});
  Named sum;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const auto length = static_cast<std::int64_t>(in.lengths[static_cast<std::size_t>(b)]);
    const auto row = [&](const std::vector<double>& all, std::int64_t width) {
      return cut_row(all, b, s.seqlen * width, length * width);
    };
    const Inputs own{row(in.x, s.d_model), row(in.dy, s.d_model), row(in.tau, 1), {}};
    const Inputs own_prefix{cut_row(prefix.x, b, 3 * s.d_model, 3 * s.d_model), {}, {}, {}};
    const auto own_start =
        continued ? state_after(m, {1, 3, s.d_model, s.d_state}, own_prefix) : nullptr;
    const Pass alone = run(m, {1, length, s.d_model, s.d_state}, own,
                           {.event = v.event, .state_in = own_start.get(), .stateless = !v.causal});
    expect_row(padded, alone, s, b);
    add(alone.grads, sum);
  }
  expect_close(padded.grads, sum, 1e-12, "d ");
}

// A padded row gives the values, the state and the gradients of the row without its padding.
TEST_P(MixerContract, PaddedEqualsUnpadded) {
  const MixerVariant& v = GetParam();
  for (int i = 0; i < cpu_cases(v) && !HasFatalFailure(); ++i) padding_case(v, i);
}

void causality_case(const MixerVariant& v, int i, DType dtype) {
  const auto seed = static_cast<std::uint64_t>(i);
  Sizes s = sizes_of(v, i, "causal");
  s.seqlen = std::max<std::int64_t>(s.seqlen, 2);
  Instance m(Context::cpu(), v, s.d_model, s.d_state, dtype, seed);
  const Inputs in = random_inputs(s, seed, false);
  const auto earlier = [&](const Inputs& inputs) {
    const Pass p = run(m, s, inputs, {.event = v.event, .backward = false});
    return cut_inputs({p.y, in.dy, in.tau, {}}, s, 0, s.seqlen - 1).x;
  };
  const auto clean = earlier(in);
  for (const double value : {0.5, std::numeric_limits<double>::infinity()}) {
    Inputs changed = in;
    for (std::int64_t b = 0; b < s.batch; ++b)
      std::fill_n(changed.x.begin() + ((b + 1) * s.seqlen - 1) * s.d_model, s.d_model, value);
    const auto got = earlier(changed);
    ASSERT_EQ(std::memcmp(got.data(), clean.data(), clean.size() * sizeof(double)), 0)
        << "case " << i << ": " << s << ", " << dtype << ", last token set to " << value;
  }
}

// Changing or poisoning the last token changes no bit of an earlier output.
TEST_P(MixerContract, IsExactlyCausal) {
  const MixerVariant& v = GetParam();
  if (!v.causal) GTEST_SKIP() << "not causal by option";
  for (int i = 0; i < cpu_cases(v) && !HasFatalFailure(); ++i)
    for (const DType dtype : {DType::float64, DType::float32}) causality_case(v, i, dtype);
}

// The bits of values, states and gradients do not depend on the number of threads.
TEST_P(MixerContract, SameBitsForAnyNumberOfThreads) {
  const MixerVariant& v = GetParam();
  const int before = omp_get_max_threads();
  for (const std::int64_t seqlen : {5, 70})
    for (const DType dtype : {DType::float64, DType::float32}) {
      const Sizes s{3, seqlen, v.sizes[0].first, v.sizes[0].second};
      Instance m(Context::cpu(), v, s.d_model, s.d_state, dtype, 9);
      const Inputs in = random_inputs(s, 9, true);
      const auto with_threads = [&](int threads) {
        omp_set_num_threads(threads);
        return run(m, s, in, {.event = v.event, .stateless = !v.causal});
      };
      const Pass one = with_threads(1);
      const Pass three = with_threads(3);
      EXPECT_EQ(three.y, one.y) << s << ", " << dtype;
      EXPECT_EQ(three.dx, one.dx) << s << ", " << dtype;
      EXPECT_EQ(three.dtau, one.dtau) << s << ", " << dtype;
      EXPECT_EQ(three.grads, one.grads) << s << ", " << dtype;
      EXPECT_EQ(three.state_out, one.state_out) << s << ", " << dtype;
    }
  omp_set_num_threads(before);
}

TEST_P(MixerContract, ClearedStateIsTheStart) {
  const MixerVariant& v = GetParam();
  if (!v.causal) GTEST_SKIP() << "not causal: no state";
  const Sizes s{2, 7, v.sizes[0].first, v.sizes[0].second};
  Instance m(Context::cpu(), v, s.d_model, s.d_state, DType::float64, 5);
  const Inputs in = random_inputs(s, 5, false);
  auto cleared = m.mixer->make_state(m.ctx, s.batch, kMaxSeqlen, m.dtype);
  const Pass fresh = run(m, s, in, {.event = v.event, .backward = false});
  const Pass from_state =
      run(m, s, in, {.event = v.event, .state_in = cleared.get(), .backward = false});
  expect_close(from_state.y, fresh.y, 1e-14, "y");
}

// The final state may be written over the initial one when nothing is kept.
TEST_P(MixerContract, StateMayBeUpdatedInPlace) {
  const MixerVariant& v = GetParam();
  if (!v.causal) GTEST_SKIP() << "not causal: no state";
  const Sizes s{2, 9, v.sizes[0].first, v.sizes[0].second};
  Instance m(Context::cpu(), v, s.d_model, s.d_state, DType::float64, 6);
  const Inputs in = random_inputs(s, 6, false);
  auto state = random_state(m, s, 6);
  const Pass want = run(m, s, in, {.event = v.event, .state_in = state.get(), .backward = false});
  const Tensor x = m.ctx.from_host_as({s.batch, s.seqlen, s.d_model}, m.dtype, in.x);
  Tensor y = m.ctx.empty({s.batch, s.seqlen, s.d_model}, m.dtype);
  Tensor tau;
  if (v.event) tau = m.ctx.from_host_as({s.batch, s.seqlen}, m.dtype, in.tau);
  m.mixer->forward(m.ctx,
                   {.x = x,
                    .integration_timesteps = tau,
                    .state_in = state.get(),
                    .y = y,
                    .state_out = state.get()},
                   false);
  expect_close(m.ctx.to_host_as_double(y), want.y, 1e-14, "y");
  expect_close(read_state(m.ctx, *state), want.state_out, 1e-14, "state ");
}

double nmse(const std::vector<double>& got, const std::vector<double>& want) {
  double error = 0;
  double power = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    power += want[i] * want[i];
  }
  return error / std::max(power, 1e-30);
}

// Each value moved at random by at most one unit of rounding of `dtype`.
std::vector<double> moved(std::vector<double> values, DType dtype, Rng& rng) {
  const double unit = dtype == DType::bfloat16 ? 0x1p-8 : 0x1p-24;
  for (double& v : values) v *= 1 + unit * rng.uniform(-1, 1);
  return values;
}

using Factors = std::vector<double>;

// Moves the recurrent state by up to one unit of float32.
void move_state(Instance& m, MixerState& state, Factors& factors, Rng& rng) {
  state.visit([&](std::string_view name, MutableTensorView t) {
    if (name != "lrnn_state") return;
    auto values = m.ctx.to_host_as_double(t);
    while (factors.size() < values.size()) factors.push_back(moved({1.0}, DType::float32, rng)[0]);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] *= factors[i];
    m.ctx.write_from_host(t, values);
  });
}

void prepend(const std::vector<double>& values, std::vector<double>& all) {
  all.insert(all.begin(), values.begin(), values.end());
}

// The pass of one row, taken token by token, with states and their gradients moved between tokens:
// by the same factors at every token, as the rounding of a multiplier that hardly changes does.
Pass moved_row(Instance& m, const Sizes& s, const Inputs& row, bool event, Rng& rng) {
  const Sizes one{1, 1, s.d_model, s.d_state};
  Pass all;
  std::vector<std::unique_ptr<MixerState>> states;  // after each token
  const auto state_before = [&](std::int64_t t) {
    return t > 0 ? states[static_cast<std::size_t>(t - 1)].get() : nullptr;
  };
  Factors factors;
  for (std::int64_t t = 0; t < s.seqlen; ++t) {
    Pass p = run(m, one, cut_inputs(row, s, t, 1),
                 {.event = event, .state_in = state_before(t), .backward = false});
    all.y.insert(all.y.end(), p.y.begin(), p.y.end());
    move_state(m, *p.final_state, factors, rng);
    states.push_back(std::move(p.final_state));
  }
  all.state_out = read_state(m.ctx, *states.back());
  std::unique_ptr<MixerState> dstate;
  factors.clear();
  for (std::int64_t t = s.seqlen; t-- > 0;) {
    Pass p = run(m, one, cut_inputs(row, s, t, 1),
                 {.event = event, .state_in = state_before(t), .dstate_out = dstate.get()});
    prepend(p.dx, all.dx);
    prepend(p.dtau, all.dtau);
    add(p.grads, all.grads);
    if (p.dstate) move_state(m, *p.dstate, factors, rng);
    dstate = std::move(p.dstate);
  }
  return all;
}

Pass moved_rows(Instance& m, const Sizes& s, const Inputs& in, bool event, Rng& rng) {
  Pass all;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const auto length = in.lengths.empty()
                            ? s.seqlen
                            : static_cast<std::int64_t>(in.lengths[static_cast<std::size_t>(b)]);
    const auto row = [&](const std::vector<double>& v, std::int64_t width) {
      return cut_row(v, b, s.seqlen * width, length * width);
    };
    const Pass p =
        moved_row(m, {1, length, s.d_model, s.d_state},
                  {row(in.x, s.d_model), row(in.dy, s.d_model), row(in.tau, 1), {}}, event, rng);
    const auto append = [&](std::vector<double>& to, const std::vector<double>& v,
                            std::int64_t width) {
      to.insert(to.end(), v.begin(), v.end());
      to.resize(static_cast<std::size_t>((b + 1) * s.seqlen * width), 0.0);
    };
    append(all.y, p.y, s.d_model);
    append(all.dx, p.dx, s.d_model);
    if (event) append(all.dtau, p.dtau, 1);
    for (const auto& [name, v] : p.state_out)
      all.state_out[name].insert(all.state_out[name].end(), v.begin(), v.end());
    add(p.grads, all.grads);
  }
  return all;
}

/// The double reference of one case, and how much its results move with roundings.
class Reference {
 public:
  Reference(const MixerVariant& v, const Sizes& s, const Inputs& in, const PassOptions& options,
            Instance& rounded, std::uint64_t seed)
      : sizes_(s),
        inputs_(in),
        options_(options),
        dtype_(rounded.dtype),
        seed_(seed),
        recurrent_(v.type != MixerType::Attn),
        has_float32_projections_(v.type == MixerType::LRU || v.type == MixerType::S5 ||
                                 v.type == MixerType::Centaurus) {
    cpu_ =
        std::make_unique<Instance>(Context::cpu(), v, s.d_model, s.d_state, DType::float64, seed);
    cpu_->copy_parameters_from(rounded);
    want_ = run(*cpu_, s, in, options);
  }

  // A result may be as far off as its fixed limit or, where cancellation makes that impossible in
  // `dtype`, as far as the rounding of every value on the way moves the exact result. To first
  // order these movements add up, with random signs, so that their mean squares do. A neighbour
  // shows the movement by the inputs, the parameters and the states of all tokens: each evenly
  // spread over one unit of rounding, which is a third of a unit squared in mean square. Ten more
  // values at most are rounded on the way to any one result (projections, convolution, gates,
  // multiplier, read-out and their gradients), each by up to a unit: 10 * 3, and one for the values
  // that the neighbour moves.
  //
  // One neighbour says little where few values are moved (at d_model 1 its movement is the square
  // of about one normal number). The largest of twelve falls short of the mean square with a chance
  // of 0.68^12 = 1 % there, and less elsewhere. The first ones are enough where they show it.
  template <class Select>
  void expect_near(const Pass& got, const Select& select, double limit, const std::string& name) {
    constexpr double kRoundings = 32;
    constexpr std::size_t kNeighbours = 12;
    const double error = nmse(select(got), select(want_));
    if (error <= limit) return;
    double movement = 0;
    for (std::size_t i = 0; i < kNeighbours && !(error <= kRoundings * movement); ++i)
      movement = std::max(movement, nmse(select(neighbour(i)), select(want_)));
    EXPECT_LE(error, kRoundings * movement) << name << ", fixed limit " << limit;
  }

  [[nodiscard]] const Pass& want() const { return want_; }

 private:
  // LRU, S5 and Centaurus keep the matrices of their projections in float32; products in bfloat16
  // read them rounded. (What has no weight decay belongs to the recurrence.)
  [[nodiscard]] DType rounded_as(const Parameter& p) const {
    const bool read_rounded = has_float32_projections_ && p.options.weight_decay;
    return p.options.keep_float32 && !read_rounded ? DType::float32 : dtype_;
  }

  const Pass& neighbour(std::size_t i) {
    while (neighbours_.size() <= i) {
      Rng rng(seed_, detail::concat("rounding", neighbours_.size()));
      Inputs in = inputs_;
      in.x = moved(in.x, dtype_, rng);
      in.dy = moved(in.dy, dtype_, rng);
      std::vector<std::vector<double>> kept;
      for (Parameter& p : cpu_->store) {
        kept.push_back(cpu_->ctx.to_host_as_double(p.value));
        cpu_->ctx.write_from_host(p.value, moved(kept.back(), rounded_as(p), rng));
      }
      neighbours_.push_back(recurrent_ ? moved_rows(*cpu_, sizes_, in, options_.event, rng)
                                       : run(*cpu_, sizes_, in, options_));
      std::size_t k = 0;
      for (Parameter& p : cpu_->store) cpu_->ctx.write_from_host(p.value, kept[k++]);
    }
    return neighbours_[i];
  }

  Sizes sizes_;
  Inputs inputs_;
  PassOptions options_;
  DType dtype_;
  std::uint64_t seed_;
  bool recurrent_;
  bool has_float32_projections_;
  std::unique_ptr<Instance> cpu_;
  Pass want_;  // its states live in the memory of cpu_, as those of the neighbours
  std::vector<Pass> neighbours_;
};

// A device in `dtype` against the CPU in double, with the parameters as the device holds them.
void rounded_case(const MixerVariant& v, int i, Context ctx, DType dtype, double forward_limit,
                  double gradient_limit) {
  const auto seed = static_cast<std::uint64_t>(i);
  const Sizes s = sizes_of(v, i, "cuda");
  SCOPED_TRACE(detail::concat("case ", i, ": ", s, ", ", dtype));
  Instance rounded(std::move(ctx), v, s.d_model, s.d_state, dtype, seed);
  const Inputs in = random_inputs(s, seed, i % 3 == 1);
  const PassOptions options{.event = v.event, .stateless = !v.causal};
  const Pass got = run(rounded, s, in, options);
  Reference reference(v, s, in, options, rounded, seed);
  reference.expect_near(
      got, [](const Pass& p) { return p.y; }, forward_limit, "y");
  for (const auto& [name, values] : reference.want().state_out)
    reference.expect_near(
        got, [&name = name](const Pass& p) { return p.state_out.at(name); }, forward_limit, name);
  reference.expect_near(
      got, [](const Pass& p) { return p.dx; }, gradient_limit, "dx");
  if (v.event)
    reference.expect_near(
        got, [](const Pass& p) { return p.dtau; }, gradient_limit, "dtau");
  for (const auto& [name, values] : reference.want().grads)
    reference.expect_near(
        got, [&name = name](const Pass& p) { return p.grads.at(name); }, gradient_limit, name);
}

TEST_P(MixerContract, CpuFloat32MatchesDouble) {
  const MixerVariant& v = GetParam();
  for (int i = 0; i < cpu_cases(v); ++i)
    rounded_case(v, i, Context::cpu(), DType::float32, v.float32_nmse, v.float32_gradient_nmse);
}

TEST_P(MixerContract, CudaFloat32MatchesDouble) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const MixerVariant& v = GetParam();
  for (int i = 0; i < kCudaCases; ++i)
    rounded_case(v, i, Context::cuda(), DType::float32, v.float32_nmse, v.float32_gradient_nmse);
}

TEST_P(MixerContract, CudaBfloat16MatchesDouble) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const MixerVariant& v = GetParam();
  for (int i = 0; i < kCudaCases; ++i)
    rounded_case(v, i, Context::cuda(), DType::bfloat16, v.bfloat16_nmse, v.bfloat16_gradient_nmse);
}

std::string variant_name(const ::testing::TestParamInfo<MixerVariant>& info) {
  return std::string(mixer_name(info.param.type)) + "_" + info.param.name;
}
INSTANTIATE_TEST_SUITE_P(AllMixers, MixerContract, ::testing::ValuesIn(all_mixer_variants()),
                         variant_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(MixerContract);

}  // namespace
}  // namespace lrnn::testing
