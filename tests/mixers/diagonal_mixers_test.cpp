/// What LRU and S5 promise beyond the contract of all mixers: initial values and option errors.
#include <cmath>
#include <numbers>

#include <gtest/gtest.h>

#include "lrnn/mixers/registry.hpp"

namespace lrnn {
namespace {

struct Made {
  Context ctx = Context::cpu();
  ParameterStore store;
  std::unique_ptr<Mixer> mixer;

  Made(MixerType type, const MixerKwargs& kwargs, std::int64_t d_model, std::int64_t d_state,
       std::uint64_t seed = 1) {
    mixer = make_mixer(type, kwargs, {.d_model = d_model, .d_state = d_state},
                       ParameterScope(store, ""));
    store.materialize(ctx, DType::float64, seed);
  }
  std::vector<double> values(std::string_view name) {
    return ctx.to_host_as_double(store.at(name).value);
  }
};

double variance(const std::vector<double>& v) {
  double sum = 0;
  for (const double e : v) sum += e * e;
  return sum / static_cast<double>(v.size());
}

std::string error_of(MixerType type, const MixerKwargs& kwargs) {
  try {
    static_cast<void>(resolve_mixer_kwargs(type, kwargs, {.d_model = 4, .d_state = 4}));
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "no error";
}

// A state holds tables of the parameters; a forward pass that leaves its state there renews them.
TEST(StateOfDiagonalMixers, FollowsTheParametersOfTheLastForwardPass) {
  for (const MixerType type : {MixerType::LRU, MixerType::S5, MixerType::S4, MixerType::S4D}) {
    Made m(type, {}, 4, 6);
    const auto state = m.mixer->make_state(m.ctx, 1, 3, DType::float64);
    for (Parameter& p : m.store) {
      auto values = m.ctx.to_host_as_double(p.value);
      for (double& v : values) v *= 0.75;
      m.ctx.write_from_host(p.value, values);
    }
    std::vector<double> inputs;
    for (int i = 0; i < 12; ++i) inputs.push_back(std::cos(i));
    const Tensor x = m.ctx.from_host_as({1, 3, 4}, DType::float64, inputs);
    Tensor whole = m.ctx.empty({1, 3, 4}, DType::float64);
    Tensor y = m.ctx.empty({1, 2, 4}, DType::float64);
    Tensor last = m.ctx.empty({1, 1, 4}, DType::float64);
    static_cast<void>(m.mixer->forward(m.ctx, {.x = x, .y = whole}, false));
    static_cast<void>(m.mixer->forward(
        m.ctx, {.x = x.view().slice(1, 0, 2), .y = y, .state_out = state.get()}, false));
    m.mixer->step(m.ctx, {.x = x.view().slice(1, 2, 1), .y = last, .state = *state});
    const auto expected = m.ctx.to_host_as_double(whole);
    const auto got = m.ctx.to_host_as_double(last);
    for (std::size_t c = 0; c < 4; ++c)
      EXPECT_NEAR(got[c], expected[8 + c], 1e-10) << mixer_name(type) << ' ' << c;
  }
}

TEST(Lru, StartsInTheRing) {
  constexpr std::int64_t kN = 4000;
  Made m(MixerType::LRU, {.lru = {.r_min = 0.8, .r_max = 0.9, .max_phase = 0.5}}, 1, kN);
  const auto nu_log = m.values("nu_log");
  const auto theta_log = m.values("theta_log");
  const auto gamma_log = m.values("gamma_log");
  double mean_square = 0;
  for (std::size_t n = 0; n < kN; ++n) {
    const double r = std::exp(-std::exp(nu_log[n]));
    EXPECT_GE(r, 0.8);
    EXPECT_LE(r, 0.9);
    mean_square += r * r / kN;
    EXPECT_GT(std::exp(theta_log[n]), 0.0);
    EXPECT_LE(std::exp(theta_log[n]), 0.5);
    EXPECT_NEAR(gamma_log[n], 0.5 * std::log(1 - r * r), 1e-12);
  }
  // |lambda|^2 is uniform: mean (0.64 + 0.81) / 2 up to three standard errors.
  EXPECT_NEAR(mean_square, 0.725, 3 * 0.17 / std::sqrt(12.0 * kN));
}

// 1 - |lambda|^2 is 2e-7 here: sqrt(1 - r * r) in float32 would be off by percents or -inf.
TEST(Lru, NormalizesSlowStatesToo) {
  Made m(MixerType::LRU, {.lru = {.r_min = 1 - 1e-7, .r_max = 1.0}}, 1, 1000);
  const auto nu_log = m.values("nu_log");
  const auto gamma_log = m.values("gamma_log");
  for (std::size_t n = 0; n < nu_log.size(); ++n) {
    ASSERT_TRUE(std::isfinite(gamma_log[n]));
    // 1 - r^2 = 2 nu (1 - nu + ...)
    ASSERT_NEAR(gamma_log[n], 0.5 * (std::log(2.0) + nu_log[n]), 1e-6);
  }
}

TEST(Lru, ProjectionsHaveTheirScale) {
  Made m(MixerType::LRU, {}, 50, 80);
  EXPECT_NEAR(variance(m.values("B_re")), 1.0 / 100, 0.001);
  EXPECT_NEAR(variance(m.values("B_im")), 1.0 / 100, 0.001);
  EXPECT_NEAR(variance(m.values("C_re")), 1.0 / 80, 0.001);
  EXPECT_NEAR(variance(m.values("C_im")), 1.0 / 80, 0.001);
}

TEST(Lru, RefusesBadOptions) {
  EXPECT_EQ(error_of(MixerType::LRU, {.lru = {.r_max = 1.5}}),
            "mixer_kwargs.LRU.r_max: expected a number in (0, 1], got 1.5");
  EXPECT_EQ(error_of(MixerType::LRU, {.lru = {.r_min = 0.9, .r_max = 0.5}}),
            "mixer_kwargs.LRU.r_min: expected a number in [0, 1) up to r_max = 0.5, got 0.9");
  EXPECT_EQ(error_of(MixerType::LRU, {.lru = {.max_phase = -1.0}}),
            "mixer_kwargs.LRU.max_phase: expected a positive number, got -1");
  EXPECT_EQ(error_of(MixerType::LRU, {.lru = {.d_state = 0}}),
            "mixer_kwargs.LRU.d_state: expected at least 1, got 0");
}

TEST(S5, StartsAsDocumented) {
  Made m(MixerType::S5, {.s5 = {.dt_min = 0.01, .dt_max = 1.0}}, 64, 3);
  const auto A = m.values("A");
  for (std::size_t n = 0; n < 3; ++n) {
    EXPECT_NEAR(std::log1p(std::exp(A[2 * n])), 0.5, 1e-12);
    EXPECT_NEAR(A[2 * n + 1], std::numbers::pi * static_cast<double>(n), 1e-12);
  }
  const auto log_dt = m.values("log_dt");
  EXPECT_NEAR(log_dt[0], std::log(0.01), 1e-12);
  EXPECT_NEAR(log_dt[1], std::log(0.1), 1e-12);
  EXPECT_NEAR(log_dt[2], 0.0, 1e-12);
  for (const double b : m.values("B")) EXPECT_EQ(b, 0.125);
  EXPECT_NEAR(variance(m.values("D")), 2.0 / 64, 0.004);
}

TEST(S5, RefusesBadOptions) {
  EXPECT_EQ(error_of(MixerType::S5, {.s5 = {.conj_sym = true}}),
            "mixer_kwargs.S5.conj_sym: expected false (all states are independent), got true");
  EXPECT_EQ(
      error_of(MixerType::S5, {.s5 = {.discretization = S5Discretization::None, .event = true}}),
      "mixer_kwargs.S5.event: expected false with discretization \"no_discretization\" "
      "(there is no step to scale), got true");
  EXPECT_EQ(error_of(MixerType::S5, {.s5 = {.dt_min = 0.1, .dt_max = 0.01}}),
            "mixer_kwargs.S5.dt_max: expected a number of at least dt_min = 0.1, got 0.01");
  EXPECT_THROW(static_cast<void>(enum_value<S5Discretization>("discretization", "async")),
               ConfigError);
}

// tau = 1 everywhere is the plain S5.
TEST(S5, UnitTimeStepsChangeNothing) {
  for (const S5Discretization d :
       {S5Discretization::Zoh, S5Discretization::Bilinear, S5Discretization::Dirac}) {
    Made m(MixerType::S5, {.s5 = {.discretization = d, .event = true}}, 3, 5);
    std::vector<double> values;
    for (int i = 0; i < 2 * 40 * 3; ++i) values.push_back(std::sin(i));
    const Tensor x = m.ctx.from_host_as({2, 40, 3}, DType::float64, values);
    const Tensor tau = m.ctx.from_host_as({2, 40}, DType::float64, std::vector<double>(80, 1.0));
    Tensor plain = m.ctx.empty({2, 40, 3}, DType::float64);
    Tensor event = m.ctx.empty({2, 40, 3}, DType::float64);
    m.mixer->forward(m.ctx, {.x = x, .y = plain}, false);
    m.mixer->forward(m.ctx, {.x = x, .integration_timesteps = tau, .y = event}, false);
    const auto want = m.ctx.to_host_as_double(plain);
    const auto got = m.ctx.to_host_as_double(event);
    for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-12);
  }
}

}  // namespace
}  // namespace lrnn
