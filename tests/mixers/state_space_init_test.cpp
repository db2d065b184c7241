/// What S4D promises about its initial parameters and options. Every distribution is judged on
/// 10,000 draws.
#include <cmath>
#include <functional>
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

constexpr std::int64_t kWidth = 100;
constexpr std::int64_t kStates = 8;  // N / 2
constexpr std::size_t kDraws = 10000;

struct Made {
  Context ctx = Context::cpu();
  ParameterStore store;
  std::unique_ptr<Mixer> mixer;

  explicit Made(const S4dConfig& config, std::uint64_t seed = 1, DType dtype = DType::float64,
                std::int64_t d_model = kWidth) {
    mixer = make_mixer(MixerType::S4D, {.s4d = config},
                       {.d_model = d_model, .d_state = 2 * kStates}, ParameterScope(store, ""));
    store.materialize(ctx, dtype, seed);
  }
  std::vector<double> values(std::string_view name) {
    return ctx.to_host_as_double(store.at(name).value);
  }
};

// The parameter in as many models of different seeds as give 10,000 values.
std::vector<double> draw(const S4dConfig& config, std::string_view name) {
  std::vector<double> all;
  for (std::uint64_t seed = 1; all.size() < kDraws; ++seed) {
    const auto some = Made(config, seed).values(name);
    all.insert(all.end(), some.begin(), some.end());
  }
  all.resize(kDraws);
  return all;
}
std::vector<double> every_other(const std::vector<double>& v, std::size_t first) {
  std::vector<double> out;
  for (std::size_t i = first; i < v.size(); i += 2) out.push_back(v[i]);
  return out;
}

const double kLow = std::log(1e-3);
const double kHigh = std::log(1e-1);

TEST(S4dInit, StepsAreLogUniform) {
  expect_uniform(draw({}, "inv_dt"), kLow, kHigh, "inv_dt");
  expect_uniform(draw({.dt_min = 0.01, .dt_max = 0.5}, "inv_dt"), std::log(0.01), std::log(0.5),
                 "range");
}

// Whatever stands between the parameter and the step, the step is log-uniform.
TEST(S4dInit, StepsAreLogUniformBehindEveryTransform) {
  struct Form {
    LaneTransform transform;
    std::function<double(double)> step;
  };
  const Form forms[] = {
      {LaneTransform::Identity, [](double p) { return p; }},
      {LaneTransform::Exp, [](double p) { return std::exp(p); }},
      {LaneTransform::Softplus, [](double p) { return std::log1p(std::exp(p)); }},
      {LaneTransform::Sigmoid, [](double p) { return 1 / (1 + std::exp(-p)); }},
  };
  for (const bool fast : {false, true})
    for (const Form& form : forms) {
      auto v = draw({.dt_tie = false, .dt_fast = fast, .dt_transform = form.transform}, "inv_dt");
      for (double& p : v) p = std::log(form.step(fast ? std::sinh(p) : p));
      expect_uniform(v, kLow, kHigh, std::string(enum_name(form.transform)));
    }
  // lrnnx's inverse of max(p, 0) + 1e-4 leaves the 1e-4 in.
  auto v = draw({.dt_transform = LaneTransform::Relu}, "inv_dt");
  for (double& p : v) p = std::log(p);
  expect_uniform(v, kLow, kHigh, "relu");
}

TEST(S4dInit, TiedAndUntiedStepsHaveTheirShapes) {
  EXPECT_EQ(Made({}).store.at("inv_dt").shape, (Shape{kWidth, 1}));
  EXPECT_EQ(Made({.dt_tie = false}).store.at("inv_dt").shape, (Shape{kWidth, kStates}));
}

TEST(S4dInit, DeterministicStepsAreSpacedAndReadOutIsTheFirstCoefficient) {
  Made m({.deterministic = true});
  const auto inv_dt = m.values("inv_dt");
  for (std::size_t h = 0; h < kWidth; ++h)
    ASSERT_NEAR(inv_dt[h], kLow + (kHigh - kLow) * static_cast<double>(h) / (kWidth - 1), 1e-12);
  // The first row of a unitary matrix, real and positive: both halves have the length 1.
  const auto C = m.values("C");
  for (std::size_t h = 0; h < kWidth; ++h) {
    double length = 0;
    for (std::size_t n = 0; n < kStates; ++n) {
      const std::size_t at = 2 * (h * kStates + n);
      ASSERT_GT(C[at], 0.0);
      ASSERT_NEAR(C[at + 1], 0.0, 1e-12);
      length += 2 * C[at] * C[at];
    }
    ASSERT_NEAR(length, 1.0, 1e-12);
  }
  EXPECT_EQ(Made({.deterministic = true}, 2).values("C"), C);
}

TEST(S4dInit, ReadOutIsComplexNormal) {
  auto C = draw({.channels = 2}, "C");
  const auto re = every_other(C, 0);
  const auto im = every_other(C, 1);
  expect_normal(re, std::numbers::sqrt2 / 2, "Re C");
  expect_normal(im, std::numbers::sqrt2 / 2, "Im C");
  double product = 0;
  for (std::size_t i = 0; i < re.size(); ++i) product += re[i] * im[i];
  // The variance of the product of two independent parts is 1/4.
  const auto n = static_cast<double>(re.size());
  EXPECT_NEAR(product / n, 0.0, 4 * 0.5 / std::sqrt(n));
  expect_normal(draw({}, "D"), 1.0, "D");
}

// -1/2 +- i pi n.
TEST(S4dInit, SpectrumPassesThroughTheTransforms) {
  const S4dConfig plain{.n_ssm = 2, .init = StateSpaceInit::DiagLin};
  Made m(plain);
  EXPECT_EQ(m.store.at("A_real").shape, (Shape{2, kStates}));
  const auto A_imag = m.values("A_imag");
  for (std::size_t copy = 0; copy < 2; ++copy)
    for (std::size_t n = 0; n < kStates; ++n)
      // 0 is clamped to 1e-4.
      EXPECT_NEAR(A_imag[copy * kStates + n],
                  n == 0 ? 1e-4 : std::numbers::pi * static_cast<double>(n), 1e-12);
  const auto A_real = [&](LaneTransform transform) {
    S4dConfig config = plain;
    config.real_transform = transform;
    return Made(config).values("A_real");
  };
  for (const double p : A_real(LaneTransform::Exp)) EXPECT_NEAR(p, std::log(0.5), 1e-12);
  for (const double p : A_real(LaneTransform::Identity)) EXPECT_EQ(p, 0.5);
  for (const double p : A_real(LaneTransform::Relu)) EXPECT_EQ(p, 0.5);
  for (const double p : A_real(LaneTransform::Sigmoid)) EXPECT_NEAR(p, 0.0, 1e-12);
  for (const double p : A_real(LaneTransform::Softplus))
    EXPECT_NEAR(p, std::log(std::exp(0.5) - 1), 1e-12);
  for (const double b : every_other(m.values("B"), 0)) EXPECT_EQ(b, 1.0);
  for (const double b : every_other(m.values("B"), 1)) EXPECT_EQ(b, 0.0);
}

TEST(S4dInit, CopiesOfLegsAreEqual) {
  Made m({.n_ssm = 4});
  for (const char* name : {"A_real", "A_imag", "B"}) {
    const auto v = m.values(name);
    const std::size_t part = v.size() / 4;
    for (std::size_t i = part; i < v.size(); ++i) ASSERT_EQ(v[i], v[i % part]) << name;
  }
  for (const double b : every_other(m.values("B"), 1)) ASSERT_LE(std::abs(b), 2.0);
}

TEST(S4dInit, DenseLayersHaveTheScaleOfTheirInputs) {
  const S4dConfig config{.channels = 2, .gate = 3};
  const auto bound = [](std::int64_t inputs) { return 1 / std::sqrt(static_cast<double>(inputs)); };
  expect_uniform(draw(config, "output_linear.0.weight"), -bound(3 * kWidth), bound(3 * kWidth),
                 "output_linear");
  expect_uniform(draw(config, "input_gate.0.weight"), -bound(kWidth), bound(kWidth), "input_gate");
  expect_uniform(draw(config, "output_gate.weight"), -bound(2 * kWidth), bound(2 * kWidth),
                 "output_gate");
  Made m(config);
  for (const char* name : {"output_linear.0.bias", "input_gate.0.bias", "output_gate.bias"})
    for (const double v : m.values(name)) ASSERT_EQ(v, 0.0) << name;
}

TEST(S4dInit, LayersExistAsTheOptionsSay) {
  const auto names = [](const S4dConfig& config) {
    std::string all;
    for (const Parameter& p : Made(config).store)
      if (p.name.find('.') != std::string::npos) all += p.name + " ";
    return all;
  };
  const std::string out = "output_linear.0.weight output_linear.0.bias ";
  const std::string in = "input_gate.0.weight input_gate.0.bias ";
  const std::string middle = "output_gate.weight output_gate.bias ";
  EXPECT_EQ(names({}), out);
  EXPECT_EQ(names({.final_act = std::nullopt}), "");
  EXPECT_EQ(names({.final_act = std::nullopt, .postact = FinalActivation::Glu}), out);
  EXPECT_EQ(names({.gate = 2}), in + middle + out);
  EXPECT_EQ(names({.channels = 2, .gate = 2}), in + out);
}

TEST(S4dInit, StateSpaceStaysFloat32WithoutDecay) {
  Made m({}, 1, DType::bfloat16);
  for (const char* name : {"inv_dt", "C", "B", "A_real", "A_imag", "D"})
    EXPECT_EQ(m.store.at(name).value.dtype(), DType::float32) << name;
  for (const char* name : {"inv_dt", "C", "B", "A_real", "A_imag"})
    EXPECT_FALSE(m.store.at(name).options.weight_decay) << name;
  for (const char* name : {"output_linear.0.weight", "output_linear.0.bias"})
    EXPECT_EQ(m.store.at(name).value.dtype(), DType::bfloat16) << name;
}

TEST(S4dOptions, TakeTheirDefaultsFromTheModel) {
  const S4dConfig c = resolve_mixer_kwargs(MixerType::S4D, {}, {.d_model = 6, .d_state = 10}).s4d;
  EXPECT_EQ(c.d_state, 10);
  EXPECT_EQ(c.n_ssm, 6);
  EXPECT_EQ(c.disc, S4dDiscretization::Zoh);
}

// Options without an influence on the numbers.
TEST(S4dOptions, SomeAreAcceptedWithoutEffect) {
  const auto plain = Made({}).values("C");
  EXPECT_EQ(Made({.l_max = 4, .verbose = false, .tie_dropout = true}).values("C"), plain);
}

TEST(S4dOptions, RefusesBadOnes) {
  const auto error_of = [](const S4dConfig& config) -> std::string {
    try {
      static_cast<void>(
          resolve_mixer_kwargs(MixerType::S4D, {.s4d = config}, {.d_model = 6, .d_state = 4}));
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "no error";
  };
  const std::string at = "mixer_kwargs.S4D.";
  EXPECT_EQ(error_of({.transposed = true}),
            at + "transposed: expected false (sequences are always [B, L, H]), got true");
  EXPECT_EQ(error_of({.bottleneck = 2}), at + "bottleneck: expected null, got 2");
  EXPECT_EQ(error_of({.is_real = true}), at + "is_real: expected false, got true");
  EXPECT_EQ(error_of({.swap_channels = true}), at + "swap_channels: expected false, got true");
  EXPECT_EQ(error_of({.lr = 0.0}), at + "lr: expected null, got 0");
  EXPECT_EQ(error_of({.wd = 0.1}), at + "wd: expected 0, got 0.1");
  EXPECT_EQ(error_of({.dropout = 0.1}), at + "dropout: expected 0, got 0.1");
  EXPECT_EQ(error_of({.d_state = 5}), at + "d_state: expected a positive even number, got 5");
  EXPECT_EQ(error_of({.d_state = 2}),
            at + "d_state: expected at least 4 with init \"legs\", got 2");
  EXPECT_EQ(error_of({.init = StateSpaceInit::Legt}),
            at + "rank: expected at least 2 with init \"legt\", got 1");
  EXPECT_EQ(error_of({.channels = 0}), at + "channels: expected at least 1, got 0");
  EXPECT_EQ(error_of({.n_ssm = 4}), at + "n_ssm: expected a divisor of d_model = 6, got 4");
  EXPECT_EQ(error_of({.n_ssm = 3, .init = StateSpaceInit::Hippo}),
            at + "n_ssm: expected a multiple of 2 with init \"hippo\", got 3");
  EXPECT_EQ(error_of({.gate = 0}), at + "gate: expected at least 1 or null, got 0");
  EXPECT_EQ(error_of({.postact = FinalActivation::Gelu}),
            at + "postact: expected null unless final_act is null, got \"gelu\"");
  EXPECT_EQ(error_of({.channels = 2, .final_act = std::nullopt}),
            at + "final_act: expected a name, because without output_linear the output would be 2 "
                 "times as wide as the input, got null");
  EXPECT_EQ(error_of({.dt_min = 0.0}), at + "dt_min: expected a positive number, got 0");
  EXPECT_EQ(error_of({.dt_min = 0.1, .dt_max = 0.01}),
            at + "dt_max: expected a number of at least dt_min = 0.1, got 0.01");
  EXPECT_EQ(error_of({.dt_max = 1.0, .dt_transform = LaneTransform::Sigmoid}),
            at + "dt_max: expected less than 1 with dt_transform \"sigmoid\", got 1");
  EXPECT_EQ(error_of({.deterministic = true, .dt_tie = false}),
            at + "deterministic: expected false unless dt_tie is true and dt_transform \"exp\"");
  EXPECT_THROW(static_cast<void>(enum_value<StateSpaceInit>("init", "legz")), ConfigError);
  EXPECT_THROW(static_cast<void>(enum_value<FinalActivation>("final_act", "glue")), ConfigError);
  EXPECT_THROW(static_cast<void>(enum_value<S4dDiscretization>("disc", "dirac")), ConfigError);
  EXPECT_THROW(static_cast<void>(enum_value<LaneTransform>("dt_transform", "tanh")), ConfigError);
}

// A transform that cannot reach the initial value says which option it is.
TEST(S4dOptions, RefusesTransformsThatCannotReachTheSpectrum) {
  try {
    Made m({.imag_transform = LaneTransform::Sigmoid});
    FAIL() << "no error";
  } catch (const ConfigError& e) {
    EXPECT_EQ(std::string(e.what()).find("mixer_kwargs.S4D.imag_transform: \"sigmoid\""), 0U)
        << e.what();
  }
}

}  // namespace
}  // namespace lrnn
