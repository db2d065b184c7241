#include "lrnn/train/trainer.hpp"

#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include <gtest/gtest.h>

#include "lrnn/train/checkpoint.hpp"

#include "train/bigram_model.hpp"

namespace lrnn::testing {
namespace {

/// A walk over 6 tokens: mostly the next one, sometimes two further.
TextData walk(std::size_t train = 3000, std::size_t held_out = 200) {
  Rng rng(5);
  std::vector<std::int32_t> all;
  std::int32_t at = 0;
  for (std::size_t i = 0; i < train + held_out; ++i) {
    all.push_back(at);
    at = (at + (rng.uniform() < 0.9 ? 1 : 2)) % 6;
  }
  const auto cut = all.begin() + static_cast<std::int64_t>(train);
  return TextData::from_tokens({all.begin(), cut}, {cut, all.end()}, 1.0);
}

TrainerConfig small_config() {
  return {.steps = 20,
          .batch_size = 4,
          .seqlen = 16,
          .adamw = {.weight_decay = 0.01},
          .schedule = {.kind = LrScheduleKind::Cosine, .lr = 0.1, .warmup_steps = 3},
          .seed = 17,
          .log_every = 4};
}

// The best loss of a table is the entropy of the walk, 0.325 nats.
TEST(Trainer, LearnsTheWalk) {
  Context ctx = Context::cpu();
  const TextData data = walk();
  BigramModel model(ctx, 6);
  TrainerConfig config = small_config();
  config.steps = 300;
  Trainer trainer(ctx, model.training_model(), data, config);
  const double before = trainer.evaluate().loss;
  trainer.run();
  const EvaluationMetrics after = trainer.evaluate();
  EXPECT_GT(before, 1.5);
  EXPECT_LT(after.loss, 0.45);
  EXPECT_NEAR(after.bits_per_byte, after.loss / std::log(2.0), 1e-12);
  EXPECT_EQ(after.tokens, 199);
  EXPECT_EQ(after.step, 300);
}

// With an untrained table of equal logits the loss is log V wherever it is measured, also over the
// padded last window.
TEST(Trainer, EvaluationWeighsTargetsEqually) {
  Context ctx = Context::cpu();
  const TextData data = walk();
  BigramModel model(ctx, 6, DType::float64);
  Trainer trainer(ctx, model.training_model(), data, small_config());
  auto& table = model.parameters().at("table");
  std::vector<double> values(36, 0.0);
  ctx.write_from_host(table.value, values);
  EXPECT_NEAR(trainer.evaluate().loss, std::log(6.0), 1e-14);
  // Logits that give probability 1/2 to a token's successor: the mean over all targets by hand.
  for (std::size_t i = 0; i < 6; ++i) values[6 * i + (i + 1) % 6] = std::log(5.0);
  ctx.write_from_host(table.value, values);
  Rng rng(5);
  double sum = 0;
  for (int i = 0; i < 3199; ++i) {
    const bool next = rng.uniform() < 0.9;
    if (i >= 3000) sum += next ? std::log(2.0) : std::log(10.0);
  }
  EXPECT_NEAR(trainer.evaluate().loss, sum / 199, 1e-13);
  TrainerConfig few = small_config();
  few.eval_sequences = 3;
  Trainer limited(ctx, model.training_model(), data, few);
  EXPECT_EQ(limited.evaluate().tokens, 48);
}

// Four passes of two sequences are one pass of eight.
TEST(Trainer, AccumulationIsALargerBatch) {
  Context ctx = Context::cpu();
  const TextData data = walk();
  const auto run = [&](std::int64_t batch_size, std::int64_t accumulation) {
    BigramModel model(ctx, 6, DType::float64);
    TrainerConfig config = small_config();
    config.batch_size = batch_size;
    config.accumulation = accumulation;
    std::vector<TrainingMetrics> metrics;
    Trainer trainer(ctx, model.training_model(), data, config,
                    {.on_metrics = [&](const TrainingMetrics& m) { metrics.push_back(m); }});
    trainer.run();
    auto all = ctx.to_host_as_double(model.parameters().at("table").value);
    for (const auto& m : metrics) all.insert(all.end(), {m.loss, m.grad_norm, m.lr});
    return all;
  };
  const auto whole = run(8, 1);
  const auto parts = run(2, 4);
  ASSERT_EQ(whole.size(), parts.size());
  for (std::size_t i = 0; i < whole.size(); ++i) EXPECT_NEAR(whole[i], parts[i], 1e-12) << i;
}

// What a step does, written out: the data of the step, the gradient, AdamW, the schedule.
TEST(Trainer, StepsAreThoseOfItsParts) {
  Context ctx = Context::cpu();
  const TextData data = walk();
  BigramModel model(ctx, 6);
  Trainer trainer(ctx, model.training_model(), data, small_config());
  trainer.run(5);
  BigramModel other(ctx, 6);
  AdamW optimizer(ctx, other.parameters(), small_config().adamw);
  LrSchedule schedule = small_config().schedule;
  schedule.total_steps = 20;
  for (int step = 0; step < 5; ++step) {
    std::vector<std::int32_t> ids(64);
    std::vector<std::int32_t> targets(64);
    data.fill_train(17, 4 * step, 16, {ids, targets});
    other.parameters().zero_grad(ctx);
    static_cast<void>(other.training_model().loss_and_backward(
        ctx, ctx.from_host<std::int32_t>({4, 16}, std::span<const std::int32_t>(ids)),
        ctx.from_host<std::int32_t>({4, 16}, std::span<const std::int32_t>(targets))));
    optimizer.set_lr(ctx, schedule.at(step));
    optimizer.step(ctx);
  }
  EXPECT_EQ(everything(ctx, model.parameters(), trainer.optimizer()),
            everything(ctx, other.parameters(), optimizer));
}

void expect_resumes_bitwise(Context& ctx, DType dtype, std::int64_t log_every) {
  const TextData data = walk();
  TrainerConfig config = small_config();
  config.accumulation = 2;
  config.log_every = log_every;
  BigramModel whole(ctx, 6, dtype);
  Trainer straight(ctx, whole.training_model(), data, config);
  straight.run();
  const ScratchDirectory scratch("trainer");
  config.checkpoint_directory = scratch.path();
  config.checkpoint_every = 5;
  {
    BigramModel model(ctx, 6, dtype);
    Trainer first(ctx, model.training_model(), data, config);
    first.run(12);  // two steps beyond the last checkpoint, which are lost
  }
  BigramModel model(ctx, 6, dtype);
  std::vector<std::string> records;
  Trainer second(ctx, model.training_model(), data, config,
                 {.on_record = [&](const std::string& r) { records.push_back(r); }});
  EXPECT_EQ(second.step(), 10);
  EXPECT_NE(records.at(0).find("\"event\":\"resume\",\"step\":10"), std::string::npos);
  second.run();
  EXPECT_EQ(second.step(), 20);
  EXPECT_EQ(everything(ctx, model.parameters(), second.optimizer()),
            everything(ctx, whole.parameters(), straight.optimizer()));
}

TEST(Trainer, ResumesBitwise) {
  Context ctx = Context::cpu();
  expect_resumes_bitwise(ctx, DType::float32, 3);
  expect_resumes_bitwise(ctx, DType::float64, 100);
  if (Context::cuda_device_count() == 0) return;
  Context cuda = Context::cuda();
  expect_resumes_bitwise(cuda, DType::float32, 3);
  expect_resumes_bitwise(cuda, DType::bfloat16, 3);
}

TEST(Trainer, DamagedCheckpointsArePassedOverAndReported) {
  Context ctx = Context::cpu();
  const TextData data = walk();
  const ScratchDirectory scratch("trainer");
  TrainerConfig config = small_config();
  config.checkpoint_directory = scratch.path();
  config.checkpoint_every = 5;
  BigramModel model(ctx, 6);
  Trainer(ctx, model.training_model(), data, config).run(10);
  std::filesystem::resize_file(scratch.path() / "step-00000010" / "manifest.json", 7);
  std::vector<std::string> records;
  config.schedule.lr = 0.2;
  Trainer second(ctx, model.training_model(), data, config,
                 {.on_record = [&](const std::string& r) { records.push_back(r); }});
  EXPECT_EQ(second.step(), 5);
  ASSERT_EQ(records.size(), 3U);
  EXPECT_NE(records[0].find("\"event\":\"rejected\""), std::string::npos);
  EXPECT_NE(records[0].find("step-00000010"), std::string::npos);
  EXPECT_NE(records[1].find("\"event\":\"resume\",\"step\":5"), std::string::npos);
  EXPECT_NE(records[2].find("\"name\":\"lr\",\"checkpoint\":\"0.1\",\"run\":\"0.2\""),
            std::string::npos);
  config.resume = false;
  EXPECT_THROW(Trainer(ctx, model.training_model(), data, config), ConfigError);
}

TEST(Trainer, ReportsAndRecords) {
  Context ctx = Context::cpu();
  const TextData data = walk();
  BigramModel model(ctx, 6);
  TrainerConfig config = small_config();
  config.eval_every = 10;
  config.steps = 18;
  std::vector<TrainingMetrics> metrics;
  std::vector<nlohmann::json> records;
  int evaluations = 0;
  model.bad_passes = 2;
  Trainer trainer(
      ctx, model.training_model(), data, config,
      {.on_metrics = [&](const TrainingMetrics& m) { metrics.push_back(m); },
       .on_evaluation = [&](const EvaluationMetrics&) { ++evaluations; },
       .on_record = [&](const std::string& r) { records.push_back(nlohmann::json::parse(r)); }});
  trainer.run();
  std::vector<std::int64_t> steps;
  for (const auto& m : metrics) steps.push_back(m.step);
  EXPECT_EQ(steps, (std::vector<std::int64_t>{4, 8, 12, 16, 18}));
  EXPECT_EQ(evaluations, 1);
  EXPECT_EQ(records.size(), 6U);
  EXPECT_TRUE(records[0]["loss"].is_null());  // bad passes have no loss
  EXPECT_EQ(metrics[0].skipped_steps, 2);
  EXPECT_EQ(records[1]["skipped_steps"], 2);
  EXPECT_EQ(records[1]["tokens"], 8 * 4 * 16);
  LrSchedule schedule = config.schedule;
  schedule.total_steps = 18;
  EXPECT_NEAR(metrics[1].lr, schedule.at(7), 1e-8);
  EXPECT_GT(metrics[1].grad_norm, 0.0);
  EXPECT_GT(metrics[1].tokens_per_second, 0.0);
  EXPECT_NEAR(metrics[1].bits_per_byte, metrics[1].loss / std::numbers::ln2, 1e-12);
  EXPECT_EQ(records[3]["event"], "train");
}

TEST(Trainer, StopsWhenAsked) {
  Context ctx = Context::cpu();
  const TextData data = walk();
  BigramModel model(ctx, 6);
  const ScratchDirectory scratch("trainer");
  TrainerConfig config = small_config();
  config.checkpoint_directory = scratch.path();
  config.checkpoint_every = 100;
  Trainer trainer(ctx, model.training_model(), data, config, {.should_stop = [] { return true; }});
  trainer.run();
  EXPECT_EQ(trainer.step(), 4);
  EXPECT_EQ(find_checkpoint(scratch.path()).found->step, 4);
}

TEST(Trainer, RefusesBadOptions) {
  Context ctx = Context::cpu();
  const TextData data = walk();
  BigramModel model(ctx, 6);
  const auto expect_refused = [&](auto change) {
    TrainerConfig config = small_config();
    change(config);
    EXPECT_THROW(Trainer(ctx, model.training_model(), data, config), InvalidArgument);
  };
  expect_refused([](TrainerConfig& c) { c.batch_size = 0; });
  expect_refused([](TrainerConfig& c) { c.seqlen = 0; });
  expect_refused([](TrainerConfig& c) { c.seqlen = 3000; });
  expect_refused([](TrainerConfig& c) { c.accumulation = 0; });
  expect_refused([](TrainerConfig& c) { c.log_every = 0; });
  expect_refused([](TrainerConfig& c) { c.checkpoint_every = 5; });
  expect_refused([](TrainerConfig& c) { c.schedule.warmup_steps = 20; });
  BigramModel narrow(ctx, 5);
  EXPECT_THROW(Trainer(ctx, narrow.training_model(), data, small_config()), InvalidArgument);
  const TextData without = walk(3000, 0);
  Trainer trainer(ctx, model.training_model(), without, small_config());
  EXPECT_THROW(trainer.evaluate(), InvalidArgument);
  EXPECT_THROW(trainer.save(), ConfigError);
}

}  // namespace
}  // namespace lrnn::testing
