/// What RGLRU promises about its initial parameters: distributions, fixed values and their meaning
/// in the recurrence. Every distribution is judged on 10,000 draws.
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "lrnn/mixers/registry.hpp"
#include "lrnn/ops/rglru_scan.hpp"

#include "support/distribution.hpp"

namespace lrnn {
namespace {

using testing::expect_uniform;

constexpr std::int64_t kWidth = 100;
constexpr std::size_t kDraws = 10000;

struct Made {
  Context ctx = Context::cpu();
  ParameterStore store;
  std::unique_ptr<Mixer> mixer;

  explicit Made(const RglruConfig& config, std::uint64_t seed = 1, MixerBuild build = kBuild,
                DType dtype = DType::float64) {
    mixer = make_mixer(MixerType::RGLRU, {.rglru = config}, build, ParameterScope(store, ""));
    store.materialize(ctx, dtype, seed);
  }
  std::vector<double> values(std::string_view name) {
    return ctx.to_host_as_double(store.at(name).value);
  }

  static constexpr MixerBuild kBuild = {.d_model = kWidth, .d_state = 1};
};

// The parameter in as many models of different seeds as give 10,000 values.
std::vector<double> draw(const RglruConfig& config, std::string_view name) {
  std::vector<double> all;
  for (std::uint64_t seed = 1; all.size() < kDraws; ++seed) {
    const auto some = Made(config, seed).values(name);
    all.insert(all.end(), some.begin(), some.end());
  }
  all.resize(kDraws);
  return all;
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

TEST(RglruInit, MultiplierIsUniformInItsRange) {
  for (const std::array<double, 2> range : {std::array{0.9, 0.999}, std::array{0.2, 0.6}}) {
    auto a = draw({.a_init_range = range}, "a_log");
    for (double& v : a) v = sigmoid(v);
    expect_uniform(a, range[0], range[1], "sig(a_log)");
  }
}

TEST(RglruInit, AnEmptyRangeIsItsPoint) {
  for (const double a_log : Made({.a_init_range = {0.75, 0.75}}).values("a_log"))
    ASSERT_NEAR(a_log, std::log(3.0), 1e-12);
}

TEST(RglruInit, WeightsHaveTheScaleOfTheirInputs) {
  const RglruConfig config{.d_conv = 5, .bias = true};
  const double bound = 1 / std::sqrt(static_cast<double>(kWidth));
  for (const char* name : {"gate_proj.weight", "in_proj.weight", "recurrent_gate_proj.weight",
                           "input_gate_proj.weight", "out_proj.weight"})
    expect_uniform(draw(config, name), -bound, bound, name);
  const double conv_bound = 1 / std::sqrt(5.0);
  expect_uniform(draw(config, "conv1d.weight"), -conv_bound, conv_bound, "conv1d.weight");
  expect_uniform(draw(config, "conv1d.bias"), -conv_bound, conv_bound, "conv1d.bias");
}

TEST(RglruInit, WidenedLayersScaleByTheInnerWidth) {
  Made m({.expand = 2.0});
  const double inner_bound = 1 / std::sqrt(2.0 * kWidth);
  expect_uniform(m.values("recurrent_gate_proj.weight"), -inner_bound, inner_bound, "recurrent");
  expect_uniform(m.values("out_proj.weight"), -inner_bound, inner_bound, "out");
  const double bound = 1 / std::sqrt(static_cast<double>(kWidth));
  expect_uniform(m.values("in_proj.weight"), -bound, bound, "in");
}

TEST(RglruInit, OutputIsScaledByTheDepthOfTheModel) {
  Made m({}, 1, {.d_model = kWidth, .d_state = 1, .out_proj_scale = 0.25});
  const double bound = 0.25 / std::sqrt(static_cast<double>(kWidth));
  expect_uniform(m.values("out_proj.weight"), -bound, bound, "out_proj.weight");
}

TEST(RglruInit, BiasesOfDenseLayersAreZero) {
  Made m({.bias = true});
  for (const char* name : {"gate_proj.bias", "in_proj.bias", "recurrent_gate_proj.bias",
                           "input_gate_proj.bias", "out_proj.bias"})
    for (const double v : m.values(name)) ASSERT_EQ(v, 0.0) << name;
}

TEST(RglruInit, MultiplierStaysFloat32WithoutDecay) {
  Made m({}, 1, Made::kBuild, DType::bfloat16);
  EXPECT_EQ(m.store.at("a_log").value.dtype(), DType::float32);
  EXPECT_EQ(m.store.at("in_proj.weight").value.dtype(), DType::bfloat16);
  EXPECT_FALSE(m.store.at("a_log").options.weight_decay);
  EXPECT_FALSE(m.store.at("conv1d.bias").options.weight_decay);
  EXPECT_TRUE(m.store.at("conv1d.weight").options.weight_decay);
}

// At r = 1/2 and c = 8 the multiplier is a^4 with a in the range: [0.6561, 0.9960]. Read off the
// recurrence itself: without input the state after one token is the multiplier.
TEST(RglruInit, FreshModelRemembers) {
  Made m({});
  const Shape token = {1, 1, kWidth};
  const Tensor zero = m.ctx.zeros(token, DType::float64);
  const Tensor one = m.ctx.from_host_as({1, kWidth}, DType::float64,
                                        std::vector<double>(static_cast<std::size_t>(kWidth), 1.0));
  Tensor h = m.ctx.empty(token, DType::float64);
  rglru_scan_forward(m.ctx,
                     {.in = {.v = zero,
                             .pre_r = zero,
                             .pre_i = zero,
                             .a_log = TensorView(m.store.at("a_log").value).reshape({kWidth}),
                             .state_in = one},
                      .h = h});
  for (const double a : m.ctx.to_host_as_double(h)) {
    ASSERT_GE(a, std::pow(0.9, 4));
    ASSERT_LE(a, std::pow(0.999, 4));
  }
}

TEST(RglruInit, RefusesBadOptions) {
  const auto error_of = [](const RglruConfig& config) -> std::string {
    try {
      static_cast<void>(Made(config));
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(error_of({.a_init_range = {0.9, 1.0}}),
            "mixer_kwargs.RGLRU.a_init_range: expected 0 < low <= high < 1, got 0.9 and 1");
  EXPECT_EQ(error_of({.a_init_range = {0.9, 0.8}}),
            "mixer_kwargs.RGLRU.a_init_range: expected 0 < low <= high < 1, got 0.9 and 0.8");
  EXPECT_EQ(error_of({.a_init_range = {0.0, 0.8}}),
            "mixer_kwargs.RGLRU.a_init_range: expected 0 < low <= high < 1, got 0 and 0.8");
  EXPECT_EQ(error_of({.c = 0.0}), "mixer_kwargs.RGLRU.c: expected a positive number, got 0");
  EXPECT_EQ(error_of({.d_conv = 0}), "mixer_kwargs.RGLRU.d_conv: expected at least 1, got 0");
  EXPECT_EQ(error_of({.expand = 0.001}),
            "mixer_kwargs.RGLRU.expand: expected expand * d_model of at least 1, got 0.001 * 100");
}

}  // namespace
}  // namespace lrnn
