/// What Centaurus promises about its initial parameters and options. Every distribution is judged
/// on 10,000 draws.
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "lrnn/mixers/registry.hpp"

#include "support/distribution.hpp"

namespace lrnn {
namespace {

using testing::expect_normal;
using testing::expect_uniform;
using enum CentaurusMode;

constexpr std::int64_t kWidth = 12;
constexpr std::int64_t kStates = 20;
constexpr std::int64_t kSubstates = 4;
constexpr std::size_t kDraws = 10000;

struct Made {
  Context ctx = Context::cpu();
  ParameterStore store;
  std::unique_ptr<Mixer> mixer;

  explicit Made(const CentaurusConfig& config, std::uint64_t seed = 1,
                DType dtype = DType::float64) {
    mixer = make_mixer(MixerType::Centaurus, {.centaurus = config},
                       {.d_model = kWidth, .d_state = kStates}, ParameterScope(store, ""));
    store.materialize(ctx, dtype, seed);
  }
  std::vector<double> values(std::string_view name) {
    return ctx.to_host_as_double(store.at(name).value);
  }
};

CentaurusConfig of_mode(CentaurusMode mode) {
  return {.sub_state_dim = kSubstates, .mode = mode};
}

// The parameter in as many models of different seeds as give 10,000 values.
std::vector<double> draw(CentaurusMode mode, std::string_view name) {
  std::vector<double> all;
  for (std::uint64_t seed = 1; all.size() < kDraws; ++seed) {
    const auto some = Made(of_mode(mode), seed).values(name);
    all.insert(all.end(), some.begin(), some.end());
  }
  all.resize(kDraws);
  return all;
}
void expect_constant(CentaurusMode mode, std::string_view name, double value) {
  for (const double v : Made(of_mode(mode)).values(name)) ASSERT_NEAR(v, value, 1e-15) << name;
}

TEST(CentaurusInit, LanesRotateAtEvenlySpacedRates) {
  for (const CentaurusMode mode : {Neck, Pointwise, Dws, Full}) {
    const auto A = Made(of_mode(mode)).values("A");
    for (std::size_t i = 0; i < A.size() / 2; ++i) {
      ASSERT_EQ(A[2 * i], -0.5);
      ASSERT_NEAR(A[2 * i + 1], std::numbers::pi * static_cast<double>(i % 4) / 4, 1e-15);
    }
  }
}

TEST(CentaurusInit, StepsAreLogarithmicallySpaced) {
  const auto log_delta = Made(of_mode(Neck)).values("log_delta");
  EXPECT_NEAR(std::exp(log_delta.front()), 1e-3, 1e-15);
  EXPECT_NEAR(std::exp(log_delta.back()), 1e-1, 1e-13);
  const double gap = std::log(100.0) / (kStates - 1);
  for (std::size_t n = 1; n < log_delta.size(); ++n)
    ASSERT_NEAR(log_delta[n] - log_delta[n - 1], gap, 1e-12);
  CentaurusConfig one = of_mode(Neck);
  one.d_state = 1;
  EXPECT_NEAR(Made(one).values("log_delta")[0], std::log(1e-3), 1e-15);
}

TEST(CentaurusInit, ReadOutOfSubstatesIsNormal) {
  for (const CentaurusMode mode : {Neck, Dws, Full})
    expect_normal(draw(mode, "E"), std::numbers::sqrt2, "E");
  EXPECT_EQ(Made(of_mode(Pointwise)).store.find("E"), nullptr);
}

TEST(CentaurusInit, ProjectionsOfNeck) {
  const double in = 1 / std::sqrt(static_cast<double>(kWidth));
  const double out = 1 / std::sqrt(static_cast<double>(kStates));
  expect_uniform(draw(Neck, "B"), -in, in, "B");
  expect_uniform(draw(Neck, "C"), -out, out, "C");
}
TEST(CentaurusInit, ProjectionsOfPointwise) {
  expect_constant(Pointwise, "B", 1 / std::sqrt(static_cast<double>(kWidth)));
  expect_normal(draw(Pointwise, "C"), std::sqrt(2.0 / (kStates * kSubstates)), "C");
}
TEST(CentaurusInit, FactorsOfDws) {
  expect_constant(Dws, "B", 1.0);
  expect_constant(Dws, "C", 1.0);
}
TEST(CentaurusInit, FactorsOfFull) {
  expect_normal(draw(Full, "B"), std::sqrt(2.0 / kWidth), "B");
  expect_normal(draw(Full, "C"), std::sqrt(2.0 / (kWidth * kWidth)), "C");
}

TEST(CentaurusInit, ShapesFollowTheMode) {
  struct Expected {
    CentaurusMode mode;
    std::int64_t lanes;
    Shape B;
    Shape C;
  };
  for (const Expected& e :
       {Expected{Neck, 20, {20, 12}, {12, 20}}, Expected{Pointwise, 20, {80, 12}, {12, 80}},
        Expected{Dws, 12, {12}, {12}}, Expected{Full, 144, {144}, {144}}}) {
    Made m(of_mode(e.mode));
    const std::string what(enum_name(e.mode));
    EXPECT_EQ(m.store.at("A").shape, (Shape{e.lanes, 4, 2})) << what;
    EXPECT_EQ(m.store.at("log_delta").shape, (Shape{e.lanes})) << what;
    EXPECT_EQ(m.store.at("B").shape, e.B) << what;
    EXPECT_EQ(m.store.at("C").shape, e.C) << what;
    if (e.mode != Pointwise) {
      EXPECT_EQ(m.store.at("E").shape, (Shape{e.lanes, 4})) << what;
    }
  }
}

TEST(CentaurusInit, AllParametersStayFloat32) {
  for (const CentaurusMode mode : {Neck, Pointwise, Dws, Full}) {
    Made m(of_mode(mode), 1, DType::bfloat16);
    for (const Parameter& p : m.store) EXPECT_EQ(p.value.dtype(), DType::float32) << p.name;
    EXPECT_FALSE(m.store.at("A").options.weight_decay);
    EXPECT_FALSE(m.store.at("log_delta").options.weight_decay);
  }
}

CentaurusConfig resolved(const CentaurusConfig& config) {
  return resolve_mixer_kwargs(MixerType::Centaurus, {.centaurus = config},
                              {.d_model = 6, .d_state = 10})
      .centaurus;
}

TEST(CentaurusOptions, StatesComeFromModelOrMode) {
  EXPECT_EQ(resolved({}).d_state, 10);
  EXPECT_EQ(resolved({}).sub_state_dim, 8);
  EXPECT_EQ(resolved({}).mode, Neck);
  EXPECT_EQ(resolved({.mode = Pointwise}).d_state, 10);
  EXPECT_EQ(resolved({.mode = Dws}).d_state, 6);
  EXPECT_EQ(resolved({.mode = Full}).d_state, 36);
  EXPECT_EQ(resolved({.d_state = 6, .mode = Dws}).d_state, 6);
  EXPECT_EQ(resolved({.d_state = 36, .mode = Full}).d_state, 36);
}

TEST(CentaurusOptions, PointwiseHasThreeNames) {
  for (const char* name : {"pointwise", "pw", "s5"})
    EXPECT_EQ(enum_value<CentaurusMode>("mode", name), Pointwise);
  EXPECT_EQ(enum_name(Pointwise), "pointwise");
}

TEST(CentaurusOptions, RefusesBadOnes) {
  const auto error_of = [](const CentaurusConfig& config) -> std::string {
    try {
      static_cast<void>(resolved(config));
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "no error";
  };
  const std::string at = "mixer_kwargs.Centaurus.";
  EXPECT_EQ(error_of({.sub_state_dim = 0}), at + "sub_state_dim: expected at least 1, got 0");
  EXPECT_EQ(error_of({.d_state = 0}), at + "d_state: expected at least 1, got 0");
  EXPECT_EQ(error_of({.d_state = 10, .mode = Dws}),
            at + "d_state: expected d_model = 6 with mode \"dws\", got 10");
  EXPECT_EQ(error_of({.d_state = 6, .mode = Full}),
            at + "d_state: expected d_model^2 = 36 with mode \"full\", got 6");
  EXPECT_THROW(static_cast<void>(enum_value<CentaurusMode>("mode", "bottleneck")), ConfigError);
  EXPECT_THROW(static_cast<void>(enum_value<CentaurusDiscretization>("discretization", "euler")),
               ConfigError);
}

// lrnnx takes the names and uses none of them: the outputs are the same bits.
TEST(CentaurusOptions, DiscretizationHasNoInfluence) {
  const auto output = [](CentaurusDiscretization discretization) {
    CentaurusConfig config = of_mode(Neck);
    config.discretization = discretization;
    Made m(config);
    const Shape shape = {1, 5, kWidth};
    std::vector<double> values(5 * kWidth);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<double>(i));
    const Tensor x = m.ctx.from_host_as(shape, DType::float64, values);
    Tensor y = m.ctx.empty(shape, DType::float64);
    m.mixer->forward(m.ctx, {.x = x, .y = y}, false);
    return m.ctx.to_host_as_double(y);
  };
  const auto zoh = output(CentaurusDiscretization::Zoh);
  using enum CentaurusDiscretization;
  for (const auto other : {Bilinear, Dirac, Async, None}) EXPECT_EQ(output(other), zoh);
}

}  // namespace
}  // namespace lrnn
