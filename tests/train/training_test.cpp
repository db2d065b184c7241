/// The trainer with language models: learning, resuming, recording, checkpoints as models.
#include <cmath>

#include <gtest/gtest.h>

#include "lrnn/models/lm_head_model.hpp"
#include "lrnn/train/checkpoint.hpp"
#include "lrnn/train/trainer.hpp"

#include "train/bigram_model.hpp"

namespace lrnn::testing {
namespace {

TextData repeated_text() {
  const std::string line = "the quick brown fox jumps over the lazy dog; ";
  std::vector<std::uint8_t> text;
  for (int i = 0; i < 60; ++i) text.insert(text.end(), line.begin(), line.end());
  return TextData::from_bytes({text});
}

LRNNLMHeadConfig small_model() {
  return {.d_model = 16,
          .d_state = 8,
          .n_layer = 2,
          .vocab_size = 256,
          .mixer_types = {MixerType::Mamba, MixerType::LRU},
          .d_intermediate = 24};
}

LRNNLMHeadConfig every_mixer() {
  LRNNLMHeadConfig config = small_model();
  const auto types = all_mixer_types();
  config.mixer_types.assign(types.begin(), types.end());
  config.n_layer = static_cast<std::int64_t>(types.size());
  return config;
}

TrainerConfig small_run() {
  return {.steps = 20,
          .batch_size = 2,
          .seqlen = 24,
          .accumulation = 2,
          .schedule = {.kind = LrScheduleKind::Linear, .lr = 0.01, .warmup_steps = 2},
          .seed = 3,
          .log_every = 4};
}

TEST(Training, LearnsARepeatedText) {
  Context ctx = Context::best();
  const TextData data = repeated_text();
  LRNNLMHeadModel model(ctx, small_model(), {.seed = 1});
  TrainerConfig config = small_run();
  config.steps = 150;
  config.batch_size = 4;
  config.seqlen = 48;
  Trainer trainer(ctx, training_model(model), data, config);
  EXPECT_NEAR(trainer.evaluate().bits_per_byte, 8.0, 0.3);  // 256 tokens, about equally likely
  trainer.run();
  EXPECT_LT(trainer.evaluate().bits_per_byte, 1.0);
}

// The same bits whether a pass is recorded or enqueued anew, and whether a run is interrupted.
void expect_same_bits(Context& ctx, DType dtype) {
  const TextData data = repeated_text();
  const auto run = [&](bool graph, const std::filesystem::path& directory,
                       const std::vector<std::int64_t>& stops) {
    TrainerConfig config = small_run();
    config.cuda_graph = graph;
    config.checkpoint_directory = directory;
    config.checkpoint_every = directory.empty() ? 0 : 10;
    std::vector<std::vector<double>> all;
    for (const std::int64_t until : stops) {
      LRNNLMHeadModel model(ctx, every_mixer(), {.dtype = dtype, .seed = 1});
      Trainer trainer(ctx, training_model(model), data, config);
      trainer.run(until);
      all = everything(ctx, model.parameters(), trainer.optimizer());
    }
    return all;
  };
  const auto want = run(false, {}, {20});
  EXPECT_EQ(run(true, {}, {20}), want);
  for (const bool graph : {false, true}) {
    const ScratchDirectory scratch("training");
    EXPECT_EQ(run(graph, scratch.path(), {10, 20}), want);
  }
}

TEST(Training, RecordingAndResumingKeepTheBits) {
  Context ctx = Context::cpu();
  expect_same_bits(ctx, DType::float32);
  expect_same_bits(ctx, DType::float64);
}

TEST(Training, CudaRecordingAndResumingKeepTheBits) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  expect_same_bits(ctx, DType::float32);
  expect_same_bits(ctx, DType::bfloat16);
}

TEST(Training, CheckpointsAreModels) {
  Context ctx = Context::best();
  const TextData data = repeated_text();
  const ScratchDirectory scratch("training");
  LRNNLMHeadModel model(ctx, small_model(), {.seed = 1});
  TrainerConfig config = small_run();
  config.checkpoint_directory = scratch.path();
  Trainer trainer(ctx, training_model(model), data, config);
  trainer.run(3);
  const auto loaded = LRNNLMHeadModel::from_pretrained(ctx, trainer.save());
  const Tensor ids =
      ctx.from_host<std::int32_t>({1, 5}, std::vector<std::int32_t>{104, 101, 108, 108, 111});
  EXPECT_EQ(ctx.to_host_as_double(loaded.forward(ctx, ids).logits),
            ctx.to_host_as_double(model.forward(ctx, ids).logits));
}

// With a fixed batch every request of memory after the first steps is met from what was freed.
TEST(Training, SteadyStateAllocatesNothing) {
  Context ctx = Context::cpu();
  const TextData data = repeated_text();
  LRNNLMHeadModel model(ctx, small_model(), {.seed = 1});
  CachingResource cache(std::make_unique<StatisticsResource>(ctx.memory()));
  const Context::MemoryScope scope(ctx, cache);
  Trainer trainer(ctx, training_model(model), data, small_run());
  trainer.run(8);
  const auto before = cache.stats().upstream_allocations;
  trainer.run(20);
  EXPECT_EQ(cache.stats().upstream_allocations, before);
}

}  // namespace
}  // namespace lrnn::testing
