/// Initial values of the mixers without a file of their own, every distribution judged on 10,000
/// draws.
#include <array>
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

constexpr std::int64_t kWidth = 24;
constexpr std::int64_t kStates = 10;
constexpr std::size_t kDraws = 10000;

std::vector<double> values(MixerType type, const MixerKwargs& kwargs, std::string_view name,
                           std::uint64_t seed = 1, double out_proj_scale = 1) {
  Context ctx = Context::cpu();
  ParameterStore store;
  const MixerBuild build{.d_model = kWidth, .d_state = kStates, .out_proj_scale = out_proj_scale};
  const auto mixer = make_mixer(type, kwargs, build, ParameterScope(store, ""));
  store.materialize(ctx, DType::float64, seed);
  return ctx.to_host_as_double(store.at(name).value);
}

// The parameter in as many models of different seeds as give 10,000 values.
std::vector<double> draw(MixerType type, const MixerKwargs& kwargs, std::string_view name,
                         double out_proj_scale = 1) {
  std::vector<double> all;
  for (std::uint64_t seed = 1; all.size() < kDraws; ++seed) {
    const auto some = values(type, kwargs, name, seed, out_proj_scale);
    all.insert(all.end(), some.begin(), some.end());
  }
  all.resize(kDraws);
  return all;
}

void expect_constant(MixerType type, const MixerKwargs& kwargs, std::string_view name,
                     double value) {
  for (const double v : values(type, kwargs, name)) ASSERT_NEAR(v, value, 1e-15) << name;
}

double root(std::int64_t n) {
  return std::sqrt(static_cast<double>(n));
}

TEST(LruInit, MultipliersAreUniformInTheRing) {
  const MixerKwargs kwargs{.lru = {.r_min = 0.4, .r_max = 0.9, .max_phase = 0.5}};
  auto square = draw(MixerType::LRU, kwargs, "nu_log");
  for (double& v : square) v = std::exp(-2 * std::exp(v));
  expect_uniform(square, 0.16, 0.81, "|lambda|^2");
  auto phase = draw(MixerType::LRU, kwargs, "theta_log");
  for (double& v : phase) v = std::exp(v);
  expect_uniform(phase, 0.0, 0.5, "arg lambda");
}

TEST(LruInit, DefaultRingIsTheDisc) {
  auto square = draw(MixerType::LRU, {}, "nu_log");
  for (double& v : square) v = std::exp(-2 * std::exp(v));
  expect_uniform(square, 0.0, 1.0, "|lambda|^2");
  auto phase = draw(MixerType::LRU, {}, "theta_log");
  for (double& v : phase) v = std::exp(v);
  expect_uniform(phase, 0.0, 2 * std::numbers::pi, "arg lambda");
}

TEST(LruInit, ProjectionsAreNormal) {
  for (const char* name : {"B_re", "B_im"})
    expect_normal(draw(MixerType::LRU, {}, name), 1 / root(2 * kWidth), name);
  for (const char* name : {"C_re", "C_im"})
    expect_normal(draw(MixerType::LRU, {}, name), 1 / root(kStates), name);
  expect_normal(draw(MixerType::LRU, {}, "D"), 1.0, "D");
}

TEST(S5Init, ReadOutAndFeedThroughAreNormal) {
  expect_normal(draw(MixerType::S5, {}, "C"), std::numbers::sqrt2 / root(kStates), "C");
  expect_normal(draw(MixerType::S5, {}, "D"), std::numbers::sqrt2 / root(kWidth), "D");
  expect_constant(MixerType::S5, {}, "B", 1 / root(kWidth));
}

TEST(MambaInit, DecaysAreThePositiveIntegers) {
  const auto A_log = values(MixerType::Mamba, {}, "A_log");
  ASSERT_EQ(A_log.size(), static_cast<std::size_t>(2 * kWidth * kStates));
  for (std::size_t i = 0; i < A_log.size(); ++i)
    ASSERT_NEAR(A_log[i], std::log(static_cast<double>(i % kStates + 1)), 1e-15);
  expect_constant(MixerType::Mamba, {}, "D", 1.0);
}

TEST(MambaInit, StepsAreLogUniformAboveTheFloor) {
  const auto log_steps = [](const MambaConfig& config) {
    auto v = draw(MixerType::Mamba, {.mamba = config}, "dt_proj.bias");
    for (double& e : v) e = std::log(std::log1p(std::exp(e)));  // softplus: delta at a zero input
    return v;
  };
  expect_uniform(log_steps({}), std::log(1e-3), std::log(0.1), "log delta");
  // Below the floor lie log 10 / log 100 of the draws: half of them, up to four standard errors.
  const auto floored = log_steps({.dt_init_floor = 0.01});
  std::size_t at_floor = 0;
  for (const double v : floored) {
    ASSERT_GE(v, std::log(0.01) - 1e-12);
    if (v < std::log(0.01) + 1e-12) ++at_floor;
  }
  EXPECT_NEAR(static_cast<double>(at_floor) / kDraws, 0.5, 4 * 0.5 / std::sqrt(kDraws));
}

TEST(MambaInit, WeightsHaveTheScaleOfTheirInputs) {
  constexpr std::int64_t kInner = 2 * kWidth;
  const MixerKwargs kwargs{.mamba = {.d_conv = 5, .dt_rank = 3, .dt_scale = 0.5, .bias = true}};
  const auto uniform = [&](const char* name, double bound) {
    expect_uniform(draw(MixerType::Mamba, kwargs, name), -bound, bound, name);
  };
  uniform("in_proj.weight", 1 / root(kWidth));
  uniform("x_proj.weight", 1 / root(kInner));
  uniform("dt_proj.weight", 0.5 / root(3));
  uniform("dtA_proj.weight", 1 / root(3));
  uniform("conv1d.weight", 1 / root(5));
  uniform("conv1d.bias", 1 / root(5));
  const double out = 0.25 / root(kInner);
  expect_uniform(draw(MixerType::Mamba, kwargs, "out_proj.weight", 0.25), -out, out, "out_proj");
  for (const char* name : {"in_proj.bias", "out_proj.bias", "dtA_proj.bias"})
    expect_constant(MixerType::Mamba, kwargs, name, 0.0);
  expect_constant(MixerType::Mamba,
                  {.mamba = {.dt_rank = 4, .dt_init = MambaDtInit::Constant, .dt_scale = 3.0}},
                  "dt_proj.weight", 1.5);
}

TEST(S7Init, StartsAsDocumented) {
  expect_constant(MixerType::S7, {}, "base_params", -0.5);
  expect_normal(draw(MixerType::S7, {}, "x_proj.weight"), 0.02, "x_proj.weight");
  const double bound = 1 / root(kWidth);
  for (const char* name : {"in_proj.weight", "gate_proj.weight"})
    expect_uniform(draw(MixerType::S7, {}, name), -bound, bound, name);
}

TEST(AttnInit, WeightsHaveTheScaleOfTheirInputs) {
  const MixerKwargs kwargs{.attn = {.num_heads = 3, .head_dim = 5, .d_conv = 4}};
  const auto uniform = [&](const char* name, double bound) {
    expect_uniform(draw(MixerType::Attn, kwargs, name), -bound, bound, name);
  };
  uniform("in_proj.weight", 1 / root(kWidth));
  uniform("conv1d.weight", 1 / root(4));
  uniform("conv1d.bias", 1 / root(4));
  const double out = 0.25 / root(15);
  expect_uniform(draw(MixerType::Attn, kwargs, "out_proj.weight", 0.25), -out, out, "out_proj");
  for (const char* name : {"in_proj.bias", "out_proj.bias"})
    expect_constant(MixerType::Attn, kwargs, name, 0.0);
}

}  // namespace
}  // namespace lrnn
