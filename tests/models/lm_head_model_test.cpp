#include "lrnn/models/lm_head_model.hpp"

#include <algorithm>
#include <cmath>
#include <unistd.h>

#include <gtest/gtest.h>

#include "lrnn/core/graph.hpp"
#include "lrnn/core/random.hpp"

namespace lrnn {
namespace {

using enum MixerType;
using Doubles = std::vector<double>;

LRNNLMHeadConfig small_config(std::vector<MixerType> types = {LRU, Mamba}) {
  return {.d_model = 8,
          .d_state = 4,
          .n_layer = static_cast<std::int64_t>(types.size()),
          .vocab_size = 19,
          .mixer_types = std::move(types),
          .d_intermediate = 12,
          // Difference quotients need an embedding whose norm is large against their step.
          .initializer_cfg = {.initializer_range = 0.3}};
}

class Model : public ::testing::Test {
 protected:
  [[nodiscard]] LRNNLMHeadModel make(const LRNNLMHeadConfig& config, DType dtype = DType::float64) {
    return {ctx_, config, {.dtype = dtype, .seed = 7}};
  }
  [[nodiscard]] Tensor ids(std::int64_t batch, std::int64_t seqlen, std::uint64_t seed = 1) {
    Rng rng(seed);
    std::vector<std::int32_t> values(static_cast<std::size_t>(batch * seqlen));
    for (auto& v : values) v = static_cast<std::int32_t>(rng.below(19));
    return ctx_.from_host<std::int32_t>({batch, seqlen}, values);
  }
  [[nodiscard]] Tensor lengths(std::vector<std::int32_t> values) {
    return ctx_.from_host<std::int32_t>({static_cast<std::int64_t>(values.size())}, values);
  }
  [[nodiscard]] Tensor columns(TensorView matrix, std::int64_t begin, std::int64_t length) {
    const auto values = ctx_.to_host<std::int32_t>(matrix);
    std::vector<std::int32_t> out;
    for (std::int64_t b = 0; b < matrix.dim(0); ++b)
      for (std::int64_t t = 0; t < length; ++t)
        out.push_back(values[static_cast<std::size_t>(b * matrix.dim(1) + begin + t)]);
    return ctx_.from_host<std::int32_t>({matrix.dim(0), length}, out);
  }
  [[nodiscard]] Doubles logits(const LRNNLMHeadModel& model, TensorView input,
                               const ForwardOptions& options = {}) {
    return ctx_.to_host_as_double(model.forward(ctx_, input, options).logits);
  }
  template <class F>
  [[nodiscard]] static std::string error_of(F&& f) {
    try {
      f();
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "accepted";
  }

  Context ctx_ = Context::cpu();
};

double max_difference(const Doubles& a, const Doubles& b) {
  EXPECT_EQ(a.size(), b.size());
  double m = a.size() == b.size() ? 0 : INFINITY;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    m = std::max(m, std::abs(a[i] - b[i]));
  return m;
}

// Rows [begin, begin + count) of a [B, L, W] buffer, per sequence.
Doubles positions(const Doubles& all, std::int64_t batch, std::int64_t seqlen, std::int64_t begin,
                  std::int64_t count) {
  const auto width = static_cast<std::int64_t>(all.size()) / (batch * seqlen);
  Doubles out;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t i = (b * seqlen + begin) * width; i < (b * seqlen + begin + count) * width;
         ++i)
      out.push_back(all[static_cast<std::size_t>(i)]);
  return out;
}

// The loss's derivative along a random direction in all parameters, against difference quotients.
void check_directional_derivatives(Context& ctx, LRNNLMHeadModel& model, TensorView input,
                                   TensorView targets, const ForwardOptions& options) {
  model.parameters().enable_grad(ctx);
  model.parameters().zero_grad(ctx);
  (void)model.loss_and_backward(ctx, input, targets, options);
  for (Parameter& p : model.parameters()) {
    Rng rng(3, p.name);
    const Doubles start = ctx.to_host_as_double(p.value);
    const Doubles grad = ctx.to_host_as_double(p.grad);
    Doubles direction(start.size());
    for (double& d : direction) d = rng.normal();
    double analytic = 0;
    for (std::size_t i = 0; i < grad.size(); ++i) analytic += grad[i] * direction[i];
    const auto at = [&](double h) {
      Doubles moved = start;
      for (std::size_t i = 0; i < moved.size(); ++i) moved[i] += h * direction[i];
      ctx.write_from_host(p.value, moved);
      return ctx.to_host_as_double(model.loss(ctx, input, targets, options)).front();
    };
    constexpr double h = 1e-4;
    const double numeric = (at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h);
    ctx.write_from_host(p.value, start);
    EXPECT_NEAR(analytic, numeric, 1e-9 * (1 + std::abs(numeric))) << p.name;
  }
}

TEST_F(Model, GradientsMatchDifferenceQuotients) {
  for (const char* mlp : {"GatedMLP", "MLP"})
    for (const bool rms : {true, false})
      for (const bool tied : {true, false}) {
        LRNNLMHeadConfig config = small_config();
        config.mlp_cls = mlp;
        config.rms_norm = rms;
        config.tie_embeddings = tied;
        auto model = make(config);
        const Tensor valid = lengths({5, 3});
        check_directional_derivatives(ctx_, model, ids(2, 5), ids(2, 5, 2), {.lengths = valid});
      }
}

TEST_F(Model, GradientsWithTimestepsMatchDifferenceQuotients) {
  LRNNLMHeadConfig config = small_config({S5, Mamba});
  config.mixer_kwargs.s5.event = true;
  auto model = make(config);
  const Tensor tau = ctx_.from_host_as({2, 4}, DType::float64, Doubles{1, .5, 2, 3, .1, 1, 1, 4});
  check_directional_derivatives(ctx_, model, ids(2, 4), ids(2, 4, 2),
                                {.integration_timesteps = tau});
}

// Whatever blocks run again: the same loss, the same bits of every gradient, and less memory.
void expect_recomputing_changes_no_bit(Context& ctx, const LRNNLMHeadConfig& config, DType dtype) {
  LRNNLMHeadModel model(ctx, config, {.dtype = dtype, .seed = 7});
  std::vector<std::int32_t> tokens;
  for (std::int32_t i = 0; i < 600; ++i) tokens.push_back(i * i % 19);
  const Tensor input = ctx.from_host<std::int32_t>({2, 300}, tokens);
  const Tensor valid = ctx.from_host<std::int32_t>({2}, std::vector<std::int32_t>{300, 141});
  const auto run = [&](std::int64_t blocks, std::size_t& peak) {
    StatisticsResource memory(ctx.memory());
    const Context::MemoryScope scope(ctx, memory);
    model.parameters().enable_grad(ctx);
    model.parameters().zero_grad(ctx);
    memory.reset_peak();
    std::vector<Doubles> all = {ctx.to_host_as_double(model.loss_and_backward(
        ctx, input, input, {.lengths = valid, .recompute_blocks = blocks}))};
    peak = memory.stats().peak_bytes_in_use;
    for (const Parameter& p : model.parameters()) all.push_back(ctx.to_host_as_double(p.grad));
    return all;
  };
  std::size_t all_kept = 0;
  const auto want = run(0, all_kept);
  for (const std::int64_t blocks : {1, 2, 4}) {
    std::size_t peak = 0;
    EXPECT_EQ(run(blocks, peak), want) << blocks;
    EXPECT_LT(peak, all_kept) << blocks;
  }
}

TEST_F(Model, RecomputingBlocksChangesNoBit) {
  for (const bool rms : {true, false}) {
    LRNNLMHeadConfig config = small_config({Mamba, LRU, Attn, S4});
    config.rms_norm = rms;
    expect_recomputing_changes_no_bit(ctx_, config, DType::float32);
  }
}

TEST_F(Model, CudaRecomputingBlocksChangesNoBit) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context cuda = Context::cuda();
  for (const DType dtype : {DType::float32, DType::bfloat16})
    expect_recomputing_changes_no_bit(cuda, small_config({Mamba, LRU, Attn, S4}), dtype);
}

TEST_F(Model, GradientsAccumulate) {
  auto model = make(small_config());
  (void)model.loss_and_backward(ctx_, ids(2, 5), ids(2, 5, 2));
  const Doubles once =
      ctx_.to_host_as_double(model.parameters().at("backbone.embedding.weight").grad);
  (void)model.loss_and_backward(ctx_, ids(2, 5), ids(2, 5, 2));
  Doubles twice = ctx_.to_host_as_double(model.parameters().at("backbone.embedding.weight").grad);
  for (double& v : twice) v /= 2;
  EXPECT_LT(max_difference(once, twice), 1e-15);
}

TEST_F(Model, LossOfManyRowsIsTheMeanOfItsParts) {
  auto model = make(small_config());
  const Tensor input = ids(2, 1100);
  const Tensor targets = ids(2, 1100, 2);
  const double whole = ctx_.to_host_as_double(model.loss_and_backward(ctx_, input, targets))[0];
  const Doubles grad = ctx_.to_host_as_double(model.parameters().at("backbone.norm_f.weight").grad);
  EXPECT_EQ(ctx_.to_host_as_double(model.loss(ctx_, input, targets))[0], whole);
  model.parameters().zero_grad(ctx_);
  double sum = 0;
  for (std::int64_t b = 0; b < 2; ++b) {
    const Tensor one = ctx_.clone(input.view().slice(0, b, 1));
    const Tensor target = ctx_.clone(targets.view().slice(0, b, 1));
    sum += ctx_.to_host_as_double(model.loss_and_backward(ctx_, one, target))[0];
  }
  EXPECT_NEAR(whole, sum / 2, 1e-13);
  Doubles parts = ctx_.to_host_as_double(model.parameters().at("backbone.norm_f.weight").grad);
  for (double& v : parts) v /= 2;
  EXPECT_LT(max_difference(grad, parts), 1e-14);
}

TEST_F(Model, IgnoredTargetsDoNotCount) {
  auto model = make(small_config());
  const Tensor input = ids(1, 4);
  auto targets = ctx_.to_host<std::int32_t>(ids(1, 4, 2));
  const Tensor counted = ctx_.from_host<std::int32_t>({1, 4}, targets);
  targets[2] = -100;
  targets[3] = -100;
  const Tensor ignored = ctx_.from_host<std::int32_t>({1, 4}, targets);
  const Tensor two = lengths({2});
  EXPECT_EQ(ctx_.to_host_as_double(model.loss(ctx_, input, ignored)),
            ctx_.to_host_as_double(model.loss(ctx_, input, counted, {.lengths = two})));
  const Tensor none = ctx_.from_host<std::int32_t>({1, 4}, std::vector<std::int32_t>(4, -100));
  EXPECT_EQ(ctx_.to_host_as_double(model.loss_and_backward(ctx_, input, none))[0], 0.0);
  for (const Parameter& p : model.parameters())
    for (const double g : ctx_.to_host_as_double(p.grad)) EXPECT_EQ(g, 0.0) << p.name;
}

TEST_F(Model, ChunkedPrefillAndStepsEqualForward) {
  for (const auto& types :
       {std::vector{LRU, Mamba}, std::vector{S5, S7}, std::vector{Attn, Mamba}}) {
    const auto model = make(small_config(types));
    const Tensor input = ids(2, 9);
    const Doubles whole = logits(model, input);
    auto cache = model.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 9});
    const Doubles first = logits(model, columns(input, 0, 4), {.cache = &cache});
    EXPECT_LT(max_difference(first, positions(whole, 2, 9, 0, 4)), 1e-13);
    const Doubles second = logits(model, columns(input, 4, 3), {.cache = &cache});
    EXPECT_LT(max_difference(second, positions(whole, 2, 9, 4, 3)), 1e-13);
    for (std::int64_t t = 7; t < 9; ++t) {
      const auto out = model.step(ctx_, columns(input, t, 1), cache);
      EXPECT_EQ(out.logits.shape(), (Shape{2, 1, 19}));
      EXPECT_LT(max_difference(ctx_.to_host_as_double(out.logits), positions(whole, 2, 9, t, 1)),
                1e-13);
    }
    EXPECT_EQ(cache.positions(), (std::vector<std::int64_t>{9, 9}));
    EXPECT_NE(error_of([&] {
                (void)model.step(ctx_, columns(input, 0, 1), cache);
              }).find("max_seqlen = 9"),
              std::string::npos);
  }
}

// Runs of plain Mamba blocks, which a step takes together.
LRNNLMHeadConfig stacked_config(std::int64_t d_model, std::vector<MixerType> types) {
  LRNNLMHeadConfig config = small_config(std::move(types));
  config.d_model = d_model;
  config.d_state = 16;
  config.d_intermediate = 0;
  return config;
}

// Logits of steps through `input`, behind each other.
Doubles stepped(Context& ctx, const LRNNLMHeadModel& model, TensorView input, bool recorded) {
  const std::int64_t batch = input.dim(0);
  const auto tokens = ctx.to_host<std::int32_t>(input);
  auto cache = model.allocate_inference_cache(ctx, {.batch_size = batch, .max_seqlen = 64});
  Tensor token = ctx.zeros({batch, 1}, DType::int32);
  ArenaResource arena(ctx.memory(), std::size_t{1} << 24, ctx.stream());
  const Context::MemoryScope scope(ctx, arena);
  Tensor out;
  const auto step = [&] { out = model.step(ctx, token, cache, {.validate = false}).logits; };
  step();
  std::optional<Graph> graph;
  if (recorded) graph = Graph::capture(ctx, step);
  cache.reset(ctx);
  Doubles all(static_cast<std::size_t>(input.numel() * 19));
  for (std::int64_t t = 0; t < input.dim(1); ++t) {
    std::vector<double> column;
    for (std::int64_t b = 0; b < batch; ++b)
      column.push_back(tokens[static_cast<std::size_t>(b * input.dim(1) + t)]);
    ctx.write_from_host(token, column);
    if (graph)
      graph->launch();
    else
      step();
    const Doubles logits = ctx.to_host_as_double(out);
    for (std::int64_t b = 0; b < batch; ++b)
      std::copy_n(logits.begin() + b * 19, 19, all.begin() + (b * input.dim(1) + t) * 19);
  }
  return all;
}

TEST_F(Model, RunsOfMambaBlocksStepAsTheyGoForward) {
  const auto model = make(stacked_config(8, {Mamba, Mamba, LRU, Mamba}));
  const Tensor input = ids(3, 5);
  EXPECT_LT(max_difference(stepped(ctx_, model, input, false), logits(model, input)), 1e-13);
}

TEST_F(Model, CudaRunsOfMambaBlocksStepAsTheyGoForward) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  ctx_ = Context::cuda();
  const auto model = make(stacked_config(256, {Mamba, Mamba, LRU, Mamba}), DType::bfloat16);
  const Tensor input = ids(2, 5);
  const Doubles steps = stepped(ctx_, model, input, false);
  const Doubles whole = logits(model, input);
  double largest = 0;
  for (const double v : whole) largest = std::max(largest, std::abs(v));
  EXPECT_LT(max_difference(steps, whole), 0.03 * largest);  // values are rounded on the way
  EXPECT_EQ(stepped(ctx_, model, input, true), steps);
  for (std::int64_t b = 0; b < 2; ++b) {
    const Tensor row = ctx_.clone(input.view().slice(0, b, 1));
    const auto begin = steps.begin() + b * 5 * 19;
    EXPECT_EQ(stepped(ctx_, model, row, false), Doubles(begin, begin + 5 * 19)) << "row " << b;
  }
}

// Three sequences and more take another kernel; a sequence has the same bits beside any others.
TEST_F(Model, CudaRunsOfMambaBlocksStepManySequences) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  ctx_ = Context::cuda();
  const auto model = make(stacked_config(256, {Mamba, Mamba, Mamba}), DType::bfloat16);
  const Tensor input = ids(16, 6);
  const Doubles whole = logits(model, input);
  double largest = 0;
  for (const double v : whole) largest = std::max(largest, std::abs(v));
  const Doubles steps = stepped(ctx_, model, input, false);
  EXPECT_LT(max_difference(steps, whole), 0.03 * largest);  // values are rounded on the way
  for (const std::int64_t count : {3, 4, 8, 13, 16}) {
    const Tensor rows = ctx_.clone(input.view().slice(0, 0, count));
    const Doubles expected(steps.begin(), steps.begin() + count * 6 * 19);
    EXPECT_EQ(stepped(ctx_, model, rows, true), expected) << count << " sequences";
  }
}

TEST_F(Model, PaddedRowsEqualRowsOnTheirOwn) {
  const auto model = make(small_config({LRU, Mamba, S5, Attn, S7}));
  const Tensor input = ids(2, 6);
  const Tensor valid = lengths({3, 6});
  auto cache = model.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 8});
  const Doubles padded = logits(model, input, {.lengths = valid, .cache = &cache});
  EXPECT_EQ(cache.positions(), (std::vector<std::int64_t>{3, 6}));

  const Tensor row = ctx_.clone(columns(input, 0, 3).view().slice(0, 0, 1));
  auto alone = model.allocate_inference_cache(ctx_, {.batch_size = 1, .max_seqlen = 8});
  const Doubles own = logits(model, row, {.cache = &alone});
  EXPECT_LT(max_difference(own, Doubles(padded.begin(), padded.begin() + 3 * 19)), 1e-14);

  // The padding does not reach what follows either.
  const Tensor next = ids(2, 1, 5);
  const Doubles after = ctx_.to_host_as_double(model.step(ctx_, next, cache).logits);
  const Tensor next_row = ctx_.clone(next.view().slice(0, 0, 1));
  const Doubles after_own = ctx_.to_host_as_double(model.step(ctx_, next_row, alone).logits);
  EXPECT_LT(max_difference(after_own, Doubles(after.begin(), after.begin() + 19)), 1e-14);
}

TEST_F(Model, SelectedPositionsAreThoseOfAllLogits) {
  const auto model = make(small_config());
  const Tensor input = ids(2, 6);
  const Doubles all = logits(model, input);
  const auto expect = [&](const ForwardOptions& options, const Doubles& expected) {
    // Products of other sizes may add up in another order.
    EXPECT_LT(max_difference(logits(model, input, options), expected), 1e-15);
  };
  expect({.num_last_tokens = 2}, positions(all, 2, 6, 4, 2));
  expect({.num_last_tokens = 6}, all);
  expect({.last_valid_token = true}, positions(all, 2, 6, 5, 1));
  const Tensor valid = lengths({2, 5});
  const Doubles masked = logits(model, input, {.lengths = valid});
  Doubles last = positions(Doubles(masked.begin(), masked.begin() + 6 * 19), 1, 6, 1, 1);
  const Doubles second = positions(Doubles(masked.begin() + 6 * 19, masked.end()), 1, 6, 4, 1);
  last.insert(last.end(), second.begin(), second.end());
  expect({.last_valid_token = true, .lengths = valid}, last);
}

TEST_F(Model, PaddedRowsOfTheVocabularyTakeNoPart) {
  for (const bool tied : {true, false})
    for (const std::int64_t multiple : {1, 8, 16}) {
      LRNNLMHeadConfig config = small_config();
      config.tie_embeddings = tied;
      config.pad_vocab_size_multiple = multiple;
      auto model = make(config);
      Parameter& head =
          model.parameters().at(tied ? "backbone.embedding.weight" : "lm_head.weight");
      EXPECT_EQ(head.shape, (Shape{multiple == 1 ? 19 : multiple == 8 ? 24 : 32, 8}));
      const Doubles expected = logits(model, ids(2, 5));
      EXPECT_EQ(model.forward(ctx_, ids(2, 5)).logits.shape(), (Shape{2, 5, 19}));
      Doubles weight = ctx_.to_host_as_double(head.value);
      std::fill(weight.begin() + 19 * 8, weight.end(), NAN);
      ctx_.write_from_host(head.value, weight);
      EXPECT_EQ(logits(model, ids(2, 5)), expected);
      const Tensor loss = model.loss_and_backward(ctx_, ids(2, 5), ids(2, 5, 2));
      EXPECT_TRUE(std::isfinite(ctx_.to_host_as_double(loss).front()));
      const Doubles grad = ctx_.to_host_as_double(head.grad);
      EXPECT_NE(std::count(grad.begin(), grad.begin() + 19 * 8, 0.0), 19 * 8);
      EXPECT_EQ(std::count(grad.begin() + 19 * 8, grad.end(), 0.0),
                grad.end() - grad.begin() - 19 * 8);
      // Nor does what they hold reach the layers through the head.
      for (const Parameter& p : model.parameters())
        for (const double g : ctx_.to_host_as_double(p.grad))
          EXPECT_TRUE(std::isfinite(g)) << p.name;
    }
}

TEST_F(Model, SeparateAddAndNormGiveTheSameNumbers) {
  for (const DType dtype : {DType::float32, DType::float64}) {
    LRNNLMHeadConfig config = small_config();
    auto fused = make(config, dtype);
    config.fused_add_norm = false;
    auto separate = make(config, dtype);
    EXPECT_EQ(logits(fused, ids(2, 5)), logits(separate, ids(2, 5)));
    (void)fused.loss_and_backward(ctx_, ids(2, 5), ids(2, 5, 2));
    (void)separate.loss_and_backward(ctx_, ids(2, 5), ids(2, 5, 2));
    for (const Parameter& p : fused.parameters())
      EXPECT_EQ(ctx_.to_host_as_double(p.grad),
                ctx_.to_host_as_double(separate.parameters().at(p.name).grad));
  }
}

TEST_F(Model, ZeroLayersNormaliseTheEmbedding) {
  LRNNLMHeadConfig config = small_config({});
  auto model = make(config);
  const Tensor input = ids(1, 3);
  EXPECT_EQ(model.forward(ctx_, input).logits.shape(), (Shape{1, 3, 19}));
  check_directional_derivatives(ctx_, model, input, ids(1, 3, 2), {});
}

TEST_F(Model, LayersMayHaveOptionsOfTheirOwn) {
  LRNNLMHeadConfig config = small_config({LRU, LRU});
  config.mixer_kwargs_per_layer.resize(2);
  config.mixer_kwargs_per_layer[1].lru.d_state = 6;
  const auto model = make(config);
  EXPECT_EQ(model.parameters().at("backbone.layers.0.mixer.nu_log").shape, Shape{4});
  EXPECT_EQ(model.parameters().at("backbone.layers.1.mixer.nu_log").shape, Shape{6});
}

TEST_F(Model, TheSameSeedGivesTheSameParameters) {
  const auto a = make(small_config());
  const auto b = make(small_config());
  const LRNNLMHeadModel c(ctx_, small_config(), {.dtype = DType::float64, .seed = 8});
  const char* const name = "backbone.layers.0.mlp.fc1.weight";
  const auto values = [&](const LRNNLMHeadModel& m) {
    return ctx_.to_host_as_double(m.parameters().at(name).value);
  };
  EXPECT_EQ(values(a), values(b));
  EXPECT_NE(values(a), values(c));
}

TEST_F(Model, InitialValuesHaveTheStatedSpread) {
  LRNNLMHeadConfig config = small_config({LRU, LRU, LRU, LRU});
  config.d_model = 64;
  config.vocab_size = 512;
  config.tie_embeddings = false;
  config.initializer_cfg.initializer_range = 0.02;
  const auto model = make(config);
  const auto largest = [&](const char* name) {
    double m = 0;
    for (const double v : ctx_.to_host_as_double(model.parameters().at(name).value))
      m = std::max(m, std::abs(v));
    return m;
  };
  // fc2: U(+-1/sqrt(128)) / sqrt(2 * 4); fc1 and the head: U(+-1/sqrt(64)).
  EXPECT_NEAR(largest("backbone.layers.0.mlp.fc2.weight"), 1 / std::sqrt(128.0 * 8), 1e-4);
  EXPECT_NEAR(largest("backbone.layers.0.mlp.fc1.weight"), 0.125, 1e-4);
  EXPECT_NEAR(largest("lm_head.weight"), 0.125, 1e-4);
  const auto embedding =
      ctx_.to_host_as_double(model.parameters().at("backbone.embedding.weight").value);
  double square = 0;
  for (const double v : embedding) square += v * v;
  EXPECT_NEAR(std::sqrt(square / static_cast<double>(embedding.size())), 0.02, 2e-4);
}

TEST_F(Model, CachesAreClonedResetSavedAndLoaded) {
  const auto model = make(small_config({LRU, Mamba, Attn}));
  const Tensor input = ids(2, 4);
  auto cache = model.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 8});
  (void)model.forward(ctx_, input, {.cache = &cache});
  auto copy = cache.clone(ctx_);
  const auto path = std::filesystem::temp_directory_path() /
                    ("lrnn_cache_" + std::to_string(::getpid()) + ".safetensors");
  cache.save(ctx_, path);
  const Tensor next = ids(2, 1, 9);
  const Doubles after = ctx_.to_host_as_double(model.step(ctx_, next, cache).logits);
  EXPECT_EQ(ctx_.to_host_as_double(model.step(ctx_, next, copy).logits), after);

  auto loaded = model.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 8});
  loaded.load(ctx_, path);
  EXPECT_EQ(loaded.positions(), (std::vector<std::int64_t>{4, 4}));
  EXPECT_EQ(ctx_.to_host_as_double(model.step(ctx_, next, loaded).logits), after);
  auto other = model.allocate_inference_cache(ctx_, {.batch_size = 3, .max_seqlen = 8});
  EXPECT_THROW(other.load(ctx_, path), IoError);
  EXPECT_THROW(other.copy_from(ctx_, loaded), InvalidArgument);
  std::filesystem::remove(path);

  cache.reset(ctx_);
  EXPECT_EQ(cache.positions(), (std::vector<std::int64_t>{0, 0}));
  EXPECT_EQ(logits(model, input, {.cache = &cache}), logits(model, input));
}

// Every tensor of the states of a model of all mixers.
void expect_wide_states(Context& ctx, DType dtype, DType wide) {
  LRNNLMHeadConfig config = small_config(all_mixer_types());
  config.mixer_kwargs.attn.d_conv = 3;
  const LRNNLMHeadModel model(ctx, config, {.dtype = dtype});
  const auto cache = model.allocate_inference_cache(ctx, {.batch_size = 2, .max_seqlen = 5});
  for (std::size_t i = 0; i < config.mixer_types.size(); ++i) {
    int count = 0;
    cache.state(i).visit([&](std::string_view name, MutableTensorView tensor) {
      ++count;
      DType expected = wide;
      if (name == "keys" || name == "values") expected = dtype;
      if (name == "positions") expected = DType::int32;
      EXPECT_EQ(tensor.dtype(), expected) << mixer_name(config.mixer_types[i]) << ' ' << name;
    });
    EXPECT_GT(count, 0);
  }
}

TEST_F(Model, StatesAreNeverNarrowerThanFloat32) {
  expect_wide_states(ctx_, DType::float32, DType::float32);
  expect_wide_states(ctx_, DType::float64, DType::float64);
}

TEST_F(Model, CudaStatesAreNeverNarrowerThanFloat32) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  expect_wide_states(ctx, DType::float32, DType::float32);
  expect_wide_states(ctx, DType::bfloat16, DType::float32);
}

TEST_F(Model, OnePrefixServesManyContinuations) {
  const auto model = make(small_config(all_mixer_types()));
  auto prefix = model.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 8});
  const Tensor valid = lengths({4, 3});
  (void)model.forward(ctx_, ids(2, 4), {.lengths = valid, .cache = &prefix});
  auto branches = model.allocate_inference_cache(ctx_, {.batch_size = 3, .max_seqlen = 8});
  const std::vector<std::int64_t> sources{1, 0, 1};
  for (std::int64_t b = 0; b < 3; ++b)
    branches.copy_sequence(ctx_, b, prefix, sources[static_cast<std::size_t>(b)]);
  EXPECT_EQ(branches.positions(), (std::vector<std::int64_t>{3, 4, 3}));
  const Tensor next = ids(3, 2, 5);
  const Doubles together = logits(model, next, {.cache = &branches});
  for (std::int64_t b = 0; b < 3; ++b) {
    auto one = model.allocate_inference_cache(ctx_, {.batch_size = 1, .max_seqlen = 8});
    one.copy_sequence(ctx_, 0, prefix, sources[static_cast<std::size_t>(b)]);
    const Doubles alone = logits(model, ctx_.clone(next.view().slice(0, b, 1)), {.cache = &one});
    EXPECT_LT(max_difference(alone, positions(together, 1, 3, b, 1)), 1e-13) << b;
  }
  auto longer = model.allocate_inference_cache(ctx_, {.batch_size = 1, .max_seqlen = 9});
  EXPECT_THROW(longer.copy_sequence(ctx_, 0, prefix, 0), InvalidArgument);
  EXPECT_THROW(branches.copy_sequence(ctx_, 3, prefix, 0), InvalidArgument);
  EXPECT_THROW(branches.copy_sequence(ctx_, 0, prefix, 2), InvalidArgument);
}

TEST_F(Model, ARefusedFileLeavesTheCacheAsItWas) {
  const auto model = make(small_config({LRU, Mamba}));
  const auto other = make(small_config({LRU, LRU}));  // its first layer has the same state
  const auto path = std::filesystem::temp_directory_path() /
                    ("lrnn_refused_" + std::to_string(::getpid()) + ".safetensors");
  auto foreign = other.allocate_inference_cache(ctx_, {.batch_size = 1, .max_seqlen = 8});
  (void)other.forward(ctx_, ids(1, 3), {.cache = &foreign});
  foreign.save(ctx_, path);
  auto cache = model.allocate_inference_cache(ctx_, {.batch_size = 1, .max_seqlen = 8});
  (void)model.forward(ctx_, ids(1, 4), {.cache = &cache});
  const auto before = cache.clone(ctx_);
  EXPECT_THROW(cache.load(ctx_, path), IoError);
  std::filesystem::remove(path);
  EXPECT_EQ(cache.positions(), before.positions());
  auto untouched = before.clone(ctx_);
  EXPECT_EQ(logits(model, ids(1, 1, 9), {.cache = &cache}),
            logits(model, ids(1, 1, 9), {.cache = &untouched}));
}

TEST_F(Model, EncodingsAreWhatTheHeadReads) {
  const auto model = make(small_config({LRU, Mamba, Attn}));
  const Tensor input = ids(2, 5);
  const Tensor valid = lengths({3, 5});
  const Doubles expected = logits(model, input, {.lengths = valid});
  const auto out = model.encode(ctx_, input, {.lengths = valid});
  EXPECT_EQ(out.hidden.shape(), (Shape{2, 5, 8}));
  const Doubles hidden = ctx_.to_host_as_double(out.hidden);
  const Doubles weight =
      ctx_.to_host_as_double(model.parameters().at("backbone.embedding.weight").value);
  Doubles product(std::size_t{2 * 5 * 19});
  for (std::size_t row = 0; row < 10; ++row)
    for (std::size_t v = 0; v < 19; ++v)
      for (std::size_t i = 0; i < 8; ++i)
        product[row * 19 + v] += hidden[row * 8 + i] * weight[v * 8 + i];
  EXPECT_LT(max_difference(product, expected), 1e-14);

  const auto last = model.encode(ctx_, input, {.last_valid_token = true, .lengths = valid});
  EXPECT_EQ(last.hidden.shape(), (Shape{2, 1, 8}));
  Doubles chosen(hidden.begin() + 2 * 8, hidden.begin() + 3 * 8);
  chosen.insert(chosen.end(), hidden.end() - 8, hidden.end());
  EXPECT_LT(max_difference(ctx_.to_host_as_double(last.hidden), chosen), 1e-15);
}

TEST_F(Model, OutputsOfInnerLayersEndShorterModels) {
  for (const std::int64_t d_intermediate : {0, 12}) {
    LRNNLMHeadConfig config = small_config({LRU, Mamba, S5});
    config.d_intermediate = d_intermediate;
    const auto model = make(config);
    const Tensor input = ids(2, 5);
    const auto out = model.forward(ctx_, input, {.layer_outputs = {2, 0}});
    EXPECT_EQ(ctx_.to_host_as_double(out.logits), logits(model, input));
    ASSERT_EQ(out.layer_outputs.size(), 2U);
    for (const std::size_t i : {0U, 1U}) {
      // A model that ends after the layer: its encoding is the normalised output of the layer.
      LRNNLMHeadConfig head = config;
      head.n_layer = i == 0 ? 3 : 1;
      head.mixer_types.resize(static_cast<std::size_t>(head.n_layer));
      const auto shorter = make(head);
      for (const Parameter& p : shorter.parameters())
        ctx_.copy(shorter.parameters().at(p.name).value, model.parameters().at(p.name).value);
      Doubles normalised = ctx_.to_host_as_double(out.layer_outputs[i]);
      ASSERT_EQ(normalised.size(), 2U * 5 * 8);
      for (std::size_t row = 0; row < 10; ++row) {
        double square = 0;
        for (std::size_t c = 0; c < 8; ++c) square += std::pow(normalised[row * 8 + c], 2);
        for (std::size_t c = 0; c < 8; ++c)
          normalised[row * 8 + c] /= std::sqrt(square / 8 + config.norm_epsilon);
      }
      EXPECT_LT(
          max_difference(ctx_.to_host_as_double(shorter.encode(ctx_, input).hidden), normalised),
          1e-14);
    }
    // The same from a step.
    auto cache = model.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 5});
    (void)model.forward(ctx_, columns(input, 0, 4), {.cache = &cache});
    const auto step = model.step(ctx_, columns(input, 4, 1), cache, {.layer_outputs = {1, 2}});
    EXPECT_LT(max_difference(ctx_.to_host_as_double(step.layer_outputs.at(1)),
                             positions(ctx_.to_host_as_double(out.layer_outputs[0]), 2, 5, 4, 1)),
              1e-14);
    EXPECT_THROW((void)model.forward(ctx_, input, {.layer_outputs = {3}}), InvalidArgument);
    EXPECT_THROW((void)model.forward(ctx_, input, {.layer_outputs = {-1}}), InvalidArgument);
  }
}

TEST_F(Model, GradientsOfAnEncoderMatchDifferenceQuotients) {
  auto model = make(small_config({LRU, Mamba}));
  const Tensor valid = lengths({4, 2});
  const ForwardOptions options{.lengths = valid};
  Rng rng(5);
  Doubles weights(std::size_t{2 * 4 * 8});
  for (double& w : weights) w = rng.normal();
  const Tensor cotangent = ctx_.from_host_as({2, 4, 8}, DType::float64, weights);
  auto encoding = model.encode_for_backward(ctx_, ids(2, 4), options);
  EXPECT_EQ(ctx_.to_host_as_double(encoding.hidden()),
            ctx_.to_host_as_double(model.encode(ctx_, ids(2, 4), options).hidden));
  model.backward(ctx_, std::move(encoding), cotangent);
  for (Parameter& p : model.parameters()) {
    const Doubles start = ctx_.to_host_as_double(p.value);
    const Doubles grad = ctx_.to_host_as_double(p.grad);
    Rng directions(3, p.name);
    Doubles direction(start.size());
    for (double& d : direction) d = directions.normal();
    double analytic = 0;
    for (std::size_t i = 0; i < grad.size(); ++i) analytic += grad[i] * direction[i];
    const auto at = [&](double h) {
      Doubles moved = start;
      for (std::size_t i = 0; i < moved.size(); ++i) moved[i] += h * direction[i];
      ctx_.write_from_host(p.value, moved);
      const Doubles hidden = ctx_.to_host_as_double(model.encode(ctx_, ids(2, 4), options).hidden);
      double sum = 0;
      for (std::size_t i = 0; i < hidden.size(); ++i) sum += hidden[i] * weights[i];
      return sum;
    };
    constexpr double h = 1e-4;
    const double numeric = (at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h);
    ctx_.write_from_host(p.value, start);
    EXPECT_NEAR(analytic, numeric, 1e-8 * (1 + std::abs(numeric))) << p.name;
  }
  EXPECT_THROW(model.backward(ctx_, std::move(encoding), cotangent), InvalidArgument);
  EXPECT_THROW(model.backward(ctx_, model.encode_for_backward(ctx_, ids(2, 5)), cotangent),
               ShapeError);
}

TEST_F(Model, AcceptsInt64AndTimestepsOfAnyFloatType) {
  const auto model = make(small_config());
  const Tensor input = ids(2, 4);
  const auto narrow = ctx_.to_host<std::int32_t>(input);
  const Tensor wide =
      ctx_.from_host<std::int64_t>({2, 4}, std::vector<std::int64_t>(narrow.begin(), narrow.end()));
  EXPECT_EQ(logits(model, wide), logits(model, input));
  const Tensor tau32 = ctx_.from_host_as({2, 4}, DType::float32, Doubles(8, 0.5));
  const Tensor tau64 = ctx_.from_host_as({2, 4}, DType::float64, Doubles(8, 0.5));
  const Doubles with_tau = logits(model, input, {.integration_timesteps = tau64});
  EXPECT_EQ(logits(model, input, {.integration_timesteps = tau32}), with_tau);
  EXPECT_NE(logits(model, input), with_tau);
  // A step takes one per sequence, with or without the dimension of time.
  auto cache = model.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 4});
  for (std::int64_t t = 0; t < 4; ++t) {
    const Tensor tau =
        ctx_.from_host_as(t % 2 == 0 ? Shape{2} : Shape{2, 1}, DType::float64, Doubles(2, 0.5));
    const auto out = model.step(ctx_, columns(input, t, 1), cache, {.integration_timesteps = tau});
    EXPECT_LT(max_difference(ctx_.to_host_as_double(out.logits), positions(with_tau, 2, 4, t, 1)),
              1e-13);
  }
  // Timesteps at padding are never read.
  const Tensor nan = ctx_.from_host_as({2, 4}, DType::float64, Doubles{1, 1, 1, NAN, 1, 1, 0, -1});
  const Tensor valid = lengths({3, 2});
  EXPECT_NO_THROW((void)logits(model, input, {.integration_timesteps = nan, .lengths = valid}));
}

TEST_F(Model, RefusesBadOperands) {
  const auto model = make(small_config());
  const auto lru_only = make(small_config({LRU}));
  auto trainable = make(small_config());
  const Tensor input = ids(2, 4);
  const auto tau = [&](double last) {
    return ctx_.from_host_as({2, 4}, DType::float64, Doubles{1, 1, 1, 1, 1, 1, 1, last});
  };
  const auto matrix = [&](std::int32_t value) {
    return ctx_.from_host<std::int32_t>({1, 2}, std::vector<std::int32_t>{0, value});
  };
  const auto forward = [&](TensorView t, const ForwardOptions& options = {}) {
    return error_of([&] { (void)model.forward(ctx_, t, options); });
  };
  const auto expect = [](const std::string& message, std::vector<const char*> parts) {
    for (const char* part : parts) EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect(forward(matrix(19)), {"input_ids", "0..18", "19", "element 1"});
  for (const std::int64_t blocks : {-1, 3})
    expect(error_of([&] {
             (void)trainable.loss_and_backward(ctx_, input, input, {.recompute_blocks = blocks});
           }),
           {"recompute_blocks", "0..2", std::to_string(blocks).c_str()});
  expect(forward(matrix(-1)), {"input_ids", "-1"});
  expect(forward(lengths({1})), {"input_ids", "rank"});
  expect(forward(ctx_.empty({1, 0}, DType::int32)), {"input_ids"});
  expect(forward(ctx_.zeros({1, 2}, DType::float32)), {"input_ids", "int32", "float32"});
  expect(forward(input, {.num_last_tokens = 5}), {"num_last_tokens", "0..4", "5"});
  expect(forward(input, {.lengths = lengths({0, 4})}), {"lengths", "1..4", "0"});
  expect(forward(input, {.lengths = lengths({5, 4})}), {"lengths", "5"});
  expect(forward(input, {.lengths = lengths({4})}), {"lengths", "[2]"});
  for (const double bad : {0.0, -1.0, static_cast<double>(NAN), static_cast<double>(INFINITY)})
    expect(forward(input, {.integration_timesteps = tau(bad)}),
           {"integration_timesteps", "positive and finite", "[1, 3]"});
  expect(forward(input, {.integration_timesteps = ctx_.zeros({2, 3}, DType::float64)}),
         {"integration_timesteps", "[2, 4]"});
  expect(error_of([&] { (void)lru_only.forward(ctx_, input, {.integration_timesteps = tau(1)}); }),
         {"no layer of this model uses them"});
  auto cache = model.allocate_inference_cache(ctx_, {.batch_size = 1, .max_seqlen = 8});
  expect(forward(input, {.cache = &cache}), {"cache", "batch 1"});
  auto short_cache = model.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 3});
  expect(forward(input, {.cache = &short_cache}), {"4 tokens", "max_seqlen = 3"});
  expect(error_of([&] { (void)model.step(ctx_, input, short_cache); }), {"[B, 1]"});
  expect(error_of([&] {
           (void)model.allocate_inference_cache(ctx_, {.batch_size = 0, .max_seqlen = 3});
         }),
         {"batch_size"});
  expect(error_of([&] { (void)trainable.loss_and_backward(ctx_, input, ids(2, 3)); }),
         {"targets", "[2, 4]"});
  expect(error_of([&] { (void)trainable.loss_and_backward(ctx_, matrix(0), matrix(-1)); }),
         {"targets", "-1"});
  expect(error_of([&] {
           (void)trainable.loss_and_backward(ctx_, input, input, {.cache = &short_cache});
         }),
         {"cache"});
}

// Weights of a float32 model, rounded as the bfloat16 model stores them.
void round_matrices(Context& ctx, LRNNLMHeadModel& model, const LRNNLMHeadModel& narrow) {
  for (const Parameter& p : narrow.parameters())
    ctx.write_from_host(model.parameters().at(p.name).value, ctx.to_host_as_double(p.value));
}

// Long enough for both products of a linear layer: that of few rows and that of many.
TEST_F(Model, BFloat16OnTheCpuIsFloat32WithRoundedMatrices) {
  for (const MixerType type : all_mixer_types()) {
    LRNNLMHeadConfig config = small_config({type, Mamba});
    config.mixer_kwargs.attn.num_heads = 2;
    const auto narrow = make(config, DType::bfloat16);
    auto wide = make(config, DType::float32);
    EXPECT_EQ(narrow.dtype(), DType::bfloat16);
    EXPECT_EQ(narrow.activation_dtype(), DType::float32);
    const Tensor input = ids(2, 11);
    const Doubles unrounded = logits(wide, input);
    round_matrices(ctx_, wide, narrow);
    const Doubles want = logits(wide, input);
    const double scale = 1 + std::abs(*std::max_element(want.begin(), want.end()));
    EXPECT_GT(max_difference(unrounded, want), 1e-4) << mixer_name(type);
    EXPECT_LT(max_difference(logits(narrow, input), want), 2e-6 * scale) << mixer_name(type);
    auto cache = narrow.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 11});
    const auto prefix =
        narrow.forward(ctx_, columns(input, 0, 9), {.num_last_tokens = 1, .cache = &cache}).logits;
    EXPECT_EQ(prefix.dtype(), DType::float32);
    EXPECT_LT(max_difference(ctx_.to_host_as_double(prefix), positions(want, 2, 11, 8, 1)),
              2e-6 * scale)
        << mixer_name(type);
    for (std::int64_t t = 9; t < 11; ++t) {
      const auto step = narrow.step(ctx_, columns(input, t, 1), cache).logits;
      EXPECT_LT(max_difference(ctx_.to_host_as_double(step), positions(want, 2, 11, t, 1)),
                2e-6 * scale)
          << mixer_name(type);
    }
  }
}

TEST_F(Model, BFloat16OnTheCpuRoundsMatricesAlone) {
  for (const bool tied : {true, false}) {
    LRNNLMHeadConfig config = small_config({Mamba, Attn});
    config.mixer_kwargs.attn.num_heads = 2;
    config.tie_embeddings = tied;
    const auto model = make(config, DType::bfloat16);
    std::vector<std::string> narrow;
    for (const Parameter& p : model.parameters())
      if (p.value.dtype() == DType::bfloat16) narrow.push_back(p.name);
    std::vector<std::string> want = {"backbone.embedding.weight"};
    for (const char* name :
         {"0.mixer.in_proj", "0.mixer.x_proj", "0.mixer.dt_proj", "0.mixer.out_proj", "0.mlp.fc1",
          "0.mlp.fc2", "1.mixer.in_proj", "1.mixer.out_proj", "1.mlp.fc1", "1.mlp.fc2"})
      want.push_back(detail::concat("backbone.layers.", name, ".weight"));
    if (!tied) want.push_back("lm_head.weight");
    EXPECT_EQ(narrow, want);
  }
}

TEST_F(Model, BFloat16OnTheCpuIsNotTrained) {
  auto model = make(small_config(), DType::bfloat16);
  const Tensor input = ids(2, 4);
  EXPECT_GT(ctx_.to_host_as_double(model.loss(ctx_, input, input)).front(), 0);
  EXPECT_THROW((void)model.loss_and_backward(ctx_, input, input), DTypeError);
  EXPECT_THROW((void)model.encode_for_backward(ctx_, input), DTypeError);
  try {
    model.parameters().enable_grad(ctx_);
    ADD_FAILURE() << "accepted";
  } catch (const DTypeError& e) {
    for (const char* part : {"training", "dtype", "float32", "bfloat16"})
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST_F(Model, RotaryAttentionTakesPositions) {
  LRNNLMHeadConfig config = small_config({Attn});
  config.mixer_kwargs.attn.num_heads = 2;
  config.mixer_kwargs.attn.rotary_emb_dim = 4;
  const auto model = make(config);
  const Tensor input = ids(1, 4);
  const auto at = [&](std::vector<std::int64_t> values) {
    return ctx_.from_host<std::int64_t>({1, 4}, values);
  };
  const Doubles plain = logits(model, input);
  EXPECT_EQ(logits(model, input, {.position_ids = at({0, 1, 2, 3})}), plain);
  // Rotations depend on distances alone.
  EXPECT_LT(max_difference(logits(model, input, {.position_ids = at({5, 6, 7, 8})}), plain), 1e-13);
  EXPECT_GT(max_difference(logits(model, input, {.position_ids = at({0, 2, 4, 9})}), plain), 1e-6);
}

TEST_F(Model, AttentionThatSeesTheFutureHasNoCache) {
  LRNNLMHeadConfig config = small_config({Attn});
  config.mixer_kwargs.attn.causal = false;
  const auto model = make(config);
  EXPECT_NO_THROW((void)model.forward(ctx_, ids(1, 4)));
  EXPECT_THROW((void)model.allocate_inference_cache(ctx_, {.batch_size = 1, .max_seqlen = 8}),
               InvalidArgument);
}

TEST_F(Model, ChangingTheLastTokenChangesNoEarlierBit) {
  const auto model = make(small_config({LRU, Mamba, S5, Attn, S7}));
  auto values = ctx_.to_host<std::int32_t>(ids(1, 6));
  const Doubles before = logits(model, ctx_.from_host<std::int32_t>({1, 6}, values));
  values.back() = (values.back() + 1) % 19;
  const Doubles after = logits(model, ctx_.from_host<std::int32_t>({1, 6}, values));
  EXPECT_EQ(positions(before, 1, 6, 0, 5), positions(after, 1, 6, 0, 5));
  EXPECT_NE(positions(before, 1, 6, 5, 1), positions(after, 1, 6, 5, 1));
}

}  // namespace
}  // namespace lrnn
