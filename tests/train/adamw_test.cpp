#include "lrnn/train/adamw.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>

#include <gtest/gtest.h>

#include "lrnn/core/graph.hpp"

namespace lrnn {
namespace {

/// The update of one scalar weight, written out.
struct Scalar {
  double w;
  double m = 0;
  double v = 0;
  void step(double g, double lr, double decay, const AdamWConfig& c, int t) {
    m = c.beta1 * m + (1 - c.beta1) * g;
    v = c.beta2 * v + (1 - c.beta2) * g * g;
    const double m_hat = m / (1 - std::pow(c.beta1, t));
    const double v_hat = v / (1 - std::pow(c.beta2, t));
    w = w - lr * decay * w - lr * m_hat / (std::sqrt(v_hat) + c.eps);
  }
};

void add_parameters(ParameterStore& store) {
  store.add("weight", {3, 50}, init::normal(1.0));
  store.add("bias", {5}, init::normal(1.0), {.weight_decay = false});
  store.add("A_log", {130}, init::normal(1.0),
            {.weight_decay = false, .keep_float32 = true, .lr_scale = 0.25F});
  store.add("head", {7, 20}, init::normal(1.0));
}

double decay_of(const Parameter& p, const AdamWConfig& c) {
  return p.options.weight_decay ? c.weight_decay : 0.0;
}

/// Gradient values that are exact in float32.
std::vector<double> gradient(const Parameter& p, int step, double size) {
  Rng rng(static_cast<std::uint64_t>(step), p.name);
  std::vector<double> g(static_cast<std::size_t>(p.shape.numel()));
  for (double& e : g) e = static_cast<double>(static_cast<float>(size * rng.normal()));
  return g;
}

constexpr AdamWConfig kConfig{.lr = 0.01, .beta1 = 0.8, .beta2 = 0.9, .weight_decay = 0.2};

/// Runs some steps on `ctx` beside the scalars, with gradients below and above the clipping norm.
void expect_matches_formula(Context& ctx, DType dtype, double tolerance) {
  ParameterStore store;
  add_parameters(store);
  store.materialize(ctx, dtype, 3);
  AdamW optimizer(ctx, store, kConfig);
  std::map<std::string, std::vector<Scalar>> want;
  for (const Parameter& p : store)
    for (const double w : ctx.to_host_as_double(p.value)) want[p.name].push_back({.w = w});
  for (int step = 1; step <= 6; ++step) {
    const double scale = step % 3 == 0 ? 0.5 : 1.0;
    double sum = 0;
    std::map<std::string, std::vector<double>> grads;
    for (Parameter& p : store) {
      grads[p.name] = gradient(p, step, step % 2 == 0 ? 1.0 : 0.01);
      ctx.write_from_host(p.grad, grads[p.name]);
      for (const double g : grads[p.name]) sum += scale * g * scale * g;
    }
    const double norm = std::sqrt(sum);
    const double clip = std::min(1.0, kConfig.max_grad_norm / (norm + 1e-6));
    EXPECT_EQ(clip < 1.0, step % 2 == 0);  // both cases occur
    const double lr = 0.01 / step;
    optimizer.set_lr(ctx, lr);
    optimizer.step(ctx, scale);
    EXPECT_NEAR(ctx.to_host_as_double(optimizer.grad_norm())[0], norm, 1e-6 * norm);
    for (const Parameter& p : store)
      for (std::size_t i = 0; i < want[p.name].size(); ++i)
        want[p.name][i].step(clip * scale * grads[p.name][i],
                             lr * static_cast<double>(p.options.lr_scale), decay_of(p, kConfig),
                             kConfig, step);
  }
  for (const auto& [name, tensor] : optimizer.state()) {
    const auto dot = name.find('.');
    const auto& scalars = want.at(name.substr(dot + 1));
    const auto got = ctx.to_host_as_double(tensor);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const Scalar& s = scalars[i];
      const double expected = name[0] == 'v' ? s.v : name.substr(0, dot) == "m" ? s.m : s.w;
      ASSERT_NEAR(got[i], expected, tolerance) << name << '[' << i << ']';
    }
  }
  for (const Parameter& p : store) {
    // A bfloat16 value is the rounded master: half a unit in the last of 8 bits.
    const double rounding = p.value.dtype() == DType::bfloat16 ? 0x1p-8 : 0.0;
    const auto got = ctx.to_host_as_double(p.value);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double w = want[p.name][i].w;
      ASSERT_NEAR(got[i], w, tolerance + rounding * std::abs(w)) << p.name << '[' << i << ']';
    }
  }
}

TEST(AdamW, MatchesTheFormula) {
  Context ctx = Context::cpu();
  expect_matches_formula(ctx, DType::float64, 1e-14);
  expect_matches_formula(ctx, DType::float32, 2e-6);
}

TEST(AdamW, CudaMatchesTheFormula) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  expect_matches_formula(ctx, DType::float32, 2e-6);
  expect_matches_formula(ctx, DType::bfloat16, 2e-6);
}

// One weight of 2 and a gradient of 3: the first step moves by lr whatever the gradient, then
// decay alone, worked out by hand.
TEST(AdamW, FirstStepByHand) {
  Context ctx = Context::cpu();
  ParameterStore store;
  Parameter& p = store.add("w", {1}, init::constant(2.0));
  store.materialize(ctx, DType::float64, 0);
  AdamW optimizer(ctx, store, {.lr = 0.5, .eps = 1e-300, .weight_decay = 0.1, .max_grad_norm = 0});
  ctx.write_from_host(p.grad, std::vector<double>{3.0});
  optimizer.step(ctx);
  EXPECT_NEAR(ctx.to_host<double>(p.value)[0], 2.0 - 0.5 * 0.1 * 2.0 - 0.5, 1e-15);
}

std::vector<std::vector<double>> everything(Context& ctx, ParameterStore& store, AdamW& optimizer) {
  std::vector<std::vector<double>> all;
  for (const Parameter& p : store) all.push_back(ctx.to_host_as_double(p.value));
  for (const auto& s : optimizer.state()) all.push_back(ctx.to_host_as_double(s.tensor));
  return all;
}

void expect_skips_bad_gradients(Context& ctx, DType dtype) {
  for (const double bad :
       {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
        std::numeric_limits<double>::quiet_NaN()}) {
    ParameterStore one;
    ParameterStore two;
    for (ParameterStore* store : {&one, &two}) {
      add_parameters(*store);
      store->materialize(ctx, dtype, 3);
    }
    AdamW interrupted(ctx, one, kConfig);
    AdamW plain(ctx, two, kConfig);
    const auto step = [&](ParameterStore& store, AdamW& optimizer, int index) {
      for (Parameter& p : store) ctx.write_from_host(p.grad, gradient(p, index, 1.0));
      optimizer.step(ctx);
    };
    step(one, interrupted, 1);
    const auto before = everything(ctx, one, interrupted);
    auto values = gradient(one.at("bias"), 2, 1.0);
    values[3] = bad;
    ctx.write_from_host(one.at("bias").grad, values);
    interrupted.step(ctx);
    EXPECT_FALSE(std::isfinite(ctx.to_host_as_double(interrupted.grad_norm())[0]));
    EXPECT_EQ(everything(ctx, one, interrupted), before);
    EXPECT_EQ(ctx.to_host<std::int64_t>(interrupted.counters()), (std::vector<std::int64_t>{1, 1}));
    // The step did not happen: the next one is the second.
    step(one, interrupted, 3);
    step(two, plain, 1);
    step(two, plain, 3);
    EXPECT_EQ(everything(ctx, one, interrupted), everything(ctx, two, plain));
  }
}

TEST(AdamW, SkipsStepsWithBadGradients) {
  Context ctx = Context::cpu();
  expect_skips_bad_gradients(ctx, DType::float32);
  expect_skips_bad_gradients(ctx, DType::float64);
  if (Context::cuda_device_count() == 0) return;
  Context cuda = Context::cuda();
  expect_skips_bad_gradients(cuda, DType::bfloat16);
}

// A recorded step reads the counters and the learning rate from memory: replays equal eager steps.
void expect_replays(Context& ctx) {
  const auto run = [&](bool recorded) {
    ParameterStore store;
    add_parameters(store);
    store.materialize(ctx, DType::float32, 3);
    AdamW optimizer(ctx, store, kConfig);
    for (Parameter& p : store) ctx.write_from_host(p.grad, gradient(p, 1, 1.0));
    ArenaResource arena(ctx.memory(), std::size_t{1} << 20, ctx.stream());
    {
      const Context::MemoryScope scope(ctx, arena);
      optimizer.step(ctx);
      std::optional<Graph> graph;
      if (recorded) graph.emplace(Graph::capture(ctx, [&] { optimizer.step(ctx); }));
      for (int i = 0; i < 4; ++i) {
        optimizer.set_lr(ctx, 0.1 / (i + 1));
        if (recorded)
          graph->launch();
        else
          optimizer.step(ctx);
      }
      ctx.synchronize();
    }
    return everything(ctx, store, optimizer);
  };
  EXPECT_EQ(run(true), run(false));
}

TEST(AdamW, RecordsAndReplays) {
  Context ctx = Context::cpu();
  expect_replays(ctx);
  if (Context::cuda_device_count() == 0) return;
  Context cuda = Context::cuda();
  expect_replays(cuda);
}

TEST(AdamW, RefusesBadOptions) {
  Context ctx = Context::cpu();
  ParameterStore store;
  store.add("w", {1}, init::constant(2.0));
  store.materialize(ctx, DType::float64, 0);
  for (const AdamWConfig& c :
       {AdamWConfig{.lr = -1}, AdamWConfig{.beta1 = 1}, AdamWConfig{.beta2 = -0.1},
        AdamWConfig{.eps = 0}, AdamWConfig{.weight_decay = -1}, AdamWConfig{.max_grad_norm = -1}})
    EXPECT_THROW(AdamW(ctx, store, c), ConfigError);
}

}  // namespace
}  // namespace lrnn
