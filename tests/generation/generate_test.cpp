#include "lrnn/generation/generate.hpp"

#include <algorithm>
#include <set>
#include <stdexcept>

#include <gtest/gtest.h>

#include "lrnn/ops/argmax.hpp"

namespace lrnn {
namespace {

using enum MixerType;
using Tokens = std::vector<std::int32_t>;

class Generate : public ::testing::Test {
 protected:
  Generate()
      : model_(ctx_,
               {.d_model = 16,
                .d_state = 4,
                .n_layer = 4,
                .vocab_size = 31,
                .mixer_types = {LRU, Mamba, Attn, S5},
                .initializer_cfg = {.initializer_range = 1.0},
                .tie_embeddings = false},
               {.seed = 11}) {}

  [[nodiscard]] Tensor matrix(std::int64_t batch, const Tokens& values) {
    return ctx_.from_host<std::int32_t>({batch, static_cast<std::int64_t>(values.size()) / batch},
                                        values);
  }
  [[nodiscard]] Tokens run(TensorView prompt, const GenerateOptions& options) {
    return ctx_.to_host<std::int32_t>(generate(ctx_, model_, prompt, options));
  }

  Context ctx_ = Context::best();
  LRNNLMHeadModel model_;
};

TEST_F(Generate, GreedyIsTheLoopOfStepAndArgmax) {
  const Tokens prompt{3, 1, 4, 1, 5, 9};
  const Tensor input = matrix(2, prompt);
  const Tensor out = generate(ctx_, model_, input, {.max_new_tokens = 8});
  EXPECT_EQ(out.shape(), (Shape{2, 11}));
  auto cache = model_.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 11});
  Tensor token =
      argmax(ctx_, model_.forward(ctx_, input, {.num_last_tokens = 1, .cache = &cache}).logits);
  std::vector<Tokens> rows{{3, 1, 4}, {1, 5, 9}};
  for (int i = 0; i < 8; ++i) {
    const auto drawn = ctx_.to_host<std::int32_t>(token);
    for (std::size_t b = 0; b < 2; ++b) rows[b].push_back(drawn[b]);
    if (i < 7) token = argmax(ctx_, model_.step(ctx_, token, cache).logits);
  }
  rows[0].insert(rows[0].end(), rows[1].begin(), rows[1].end());
  EXPECT_EQ(ctx_.to_host<std::int32_t>(out), rows[0]);
}

TEST_F(Generate, RecordedStepsGiveTheSameTokens) {
  if (!ctx_.device().is_cuda()) GTEST_SKIP() << "no CUDA device";
  const Tensor input = matrix(2, {3, 1, 4, 1, 5, 9});
  GenerateOptions options{.max_new_tokens = 24, .temperature = 0.9, .top_k = 8, .seed = 3};
  options.cuda_graph = false;
  const Tokens eager = run(input, options);
  options.cuda_graph = true;
  EXPECT_EQ(run(input, options), eager);
}

TEST_F(Generate, PromptsAreProcessedInChunks) {
  const Tensor input = matrix(2, {3, 1, 4, 1, 5, 9, 2, 6, 5, 3});
  const Tokens whole = run(input, {.max_new_tokens = 6});
  for (const std::int64_t chunk : {0, 1, 2, 3, 5, 7})
    EXPECT_EQ(run(input, {.max_new_tokens = 6, .prefill_chunk = chunk}), whole) << chunk;
}

TEST_F(Generate, PaddedPromptsContinueLikePromptsOnTheirOwn) {
  const Tensor input = matrix(2, {3, 1, 0, 0, 1, 5, 9, 2});
  const Tensor lengths = ctx_.from_host<std::int32_t>({2}, Tokens{2, 4});
  const Tokens padded = run(input, {.max_new_tokens = 5, .lengths = lengths});
  const Tokens first = run(matrix(1, {3, 1}), {.max_new_tokens = 5});
  const Tokens second = run(matrix(1, {1, 5, 9, 2}), {.max_new_tokens = 5});
  EXPECT_TRUE(std::equal(first.begin() + 2, first.end(), padded.begin() + 4));
  EXPECT_TRUE(std::equal(second.begin() + 4, second.end(), padded.begin() + 13));
}

TEST_F(Generate, SamplesAreThoseOfThePromptGivenSeveralTimes) {
  // Two prompts of 2 and 4 tokens, three samples of each.
  const Tensor prompts = matrix(2, {3, 1, 0, 0, 1, 5, 9, 2});
  const Tensor lengths = ctx_.from_host<std::int32_t>({2}, Tokens{2, 4});
  const Tensor repeated = matrix(6, {3, 1, 0, 0, 3, 1, 0, 0, 3, 1, 0, 0,  //
                                     1, 5, 9, 2, 1, 5, 9, 2, 1, 5, 9, 2});
  const Tensor repeated_lengths = ctx_.from_host<std::int32_t>({6}, Tokens{2, 2, 2, 4, 4, 4});
  GenerateOptions options{.max_new_tokens = 9,
                          .temperature = 1.2,
                          .top_k = 0,
                          .repetition_penalty = 1.3,
                          .seed = 5,
                          .stop_sequences = {{7}, {8}, {9}},
                          .pad_token = 30};
  std::vector<std::int64_t> expected_counts;
  options.lengths = repeated_lengths;
  options.generated_lengths = &expected_counts;
  const Tokens expected = run(repeated, options);
  std::vector<std::int64_t> counts;
  options.num_samples = 3;
  options.lengths = lengths;
  options.generated_lengths = &counts;
  EXPECT_EQ(run(prompts, options), expected);
  EXPECT_EQ(counts, expected_counts);
  const std::size_t width = expected.size() / 6;
  EXPECT_FALSE(std::equal(expected.begin() + 4, expected.begin() + static_cast<int>(width),
                          expected.begin() + static_cast<int>(width) + 4));
}

TEST_F(Generate, SamplesOfNothingAreThePrompts) {
  std::vector<std::int64_t> counts;
  EXPECT_EQ(run(matrix(2, {3, 1, 4, 1}),
                {.max_new_tokens = 0, .num_samples = 2, .generated_lengths = &counts}),
            (Tokens{3, 1, 3, 1, 4, 1, 4, 1}));
  EXPECT_EQ(counts, (std::vector<std::int64_t>{0, 0, 0, 0}));
}

TEST_F(Generate, TheSeedDeterminesWhatIsDrawn) {
  const Tensor input = matrix(1, {3, 1, 4});
  GenerateOptions options{.max_new_tokens = 30, .temperature = 1.5, .top_k = 0, .seed = 1};
  const Tokens first = run(input, options);
  EXPECT_EQ(run(input, options), first);
  options.seed = 2;
  EXPECT_NE(run(input, options), first);
}

TEST_F(Generate, EndsWhenEverySequenceHasDrawnTheEndToken) {
  const Tensor input = matrix(2, {3, 1, 4, 1, 5, 9});
  const Tokens free = run(input, {.max_new_tokens = 12});
  const std::int32_t end = free[3 + 2];  // the third token of the first sequence
  const auto row = [](const Tokens& t, std::size_t b) {
    const auto n = static_cast<std::ptrdiff_t>(t.size() / 2);
    const auto begin = t.begin() + n * static_cast<std::ptrdiff_t>(b);
    return Tokens(begin, begin + n);
  };
  const Tokens ended = run(input, {.max_new_tokens = 12, .eos_token = end});
  for (std::size_t b = 0; b < 2; ++b) {
    Tokens expected = row(free, b);
    const auto at = std::find(expected.begin() + 3, expected.end(), end);
    std::fill(at, expected.end(), end);
    const Tokens got = row(ended, b);
    ASSERT_LE(got.size(), expected.size());
    EXPECT_TRUE(std::equal(got.begin(), got.end(), expected.begin()));
  }
  const Tokens alone = run(matrix(1, {3, 1, 4}), {.max_new_tokens = 12, .eos_token = end});
  EXPECT_EQ(alone.back(), end);
  EXPECT_LE(alone.size(), 6U);
}

TEST_F(Generate, EndsAfterAStopSequence) {
  const Tensor input = matrix(2, {3, 1, 4, 1, 5, 9});
  GenerateOptions options{.max_new_tokens = 12, .temperature = 1.5, .top_k = 0, .seed = 4};
  const Tokens free = run(input, options);
  const auto drawn = [&](std::size_t b, std::size_t i) { return free[b * 15 + 3 + i]; };
  // Two tokens that the first sequence draws one after the other, and a sequence never drawn whole.
  options.stop_sequences = {{drawn(0, 4), drawn(0, 5)},
                            {drawn(0, 1), drawn(0, 2), (drawn(0, 3) + 1) % 31}};
  options.pad_token = 30;
  std::vector<std::int64_t> lengths;
  options.generated_lengths = &lengths;
  const Tokens out = run(input, options);
  const std::size_t width = out.size() / 2;
  for (std::size_t b = 0; b < 2; ++b) {
    std::size_t end = 12;
    for (std::size_t i = 11; i >= 1; --i)
      if (drawn(b, i - 1) == drawn(0, 4) && drawn(b, i) == drawn(0, 5)) end = i + 1;
    EXPECT_EQ(lengths.at(b), static_cast<std::int64_t>(end));
    for (std::size_t i = 0; i + 3 < width; ++i)
      EXPECT_EQ(out[b * width + 3 + i], i < end ? drawn(b, i) : 30) << b << ' ' << i;
  }
  EXPECT_EQ(lengths[0], 6);
  // What is in the prompt stops nothing.
  options.stop_sequences = {{1, 4, drawn(0, 0)}};
  EXPECT_EQ(run(input, options), free);
}

TEST_F(Generate, ContinuesFromACache) {
  const Tokens whole = run(matrix(1, {3, 1, 4, 1, 5}), {.max_new_tokens = 6});
  auto prefix = model_.allocate_inference_cache(ctx_, {.batch_size = 1, .max_seqlen = 11});
  (void)model_.forward(ctx_, matrix(1, {3, 1, 4}), {.cache = &prefix});
  auto cache = prefix.clone(ctx_);
  const Tokens rest = run(matrix(1, {1, 5}), {.max_new_tokens = 6, .cache = &cache});
  EXPECT_TRUE(std::equal(whole.begin() + 3, whole.end(), rest.begin(), rest.end()));
  EXPECT_EQ(cache.positions(), (std::vector<std::int64_t>{10}));
  // The last token has not been seen yet: it is the next prompt.
  const Tokens longer = run(matrix(1, {3, 1, 4, 1, 5}), {.max_new_tokens = 7});
  EXPECT_EQ(run(matrix(1, {rest.back()}), {.max_new_tokens = 1, .cache = &cache}).back(),
            longer.back());
  EXPECT_THROW((void)run(matrix(1, {1, 5}), {.max_new_tokens = 8, .cache = &prefix}),
               InvalidArgument);
  EXPECT_THROW((void)run(matrix(2, {1, 5}), {.max_new_tokens = 1, .cache = &prefix}),
               InvalidArgument);
}

TEST_F(Generate, StreamsTokensAndStopsOnRequest) {
  Tokens seen;
  const Tokens out = run(matrix(1, {3, 1, 4}),
                         {.max_new_tokens = 9, .on_tokens = [&](std::span<const std::int32_t> t) {
                            seen.push_back(t[0]);
                            return seen.size() < 4;
                          }});
  EXPECT_EQ(out.size(), 7U);
  EXPECT_TRUE(std::equal(seen.begin(), seen.end(), out.begin() + 3));
  EXPECT_EQ(run(matrix(1, {3, 1, 4}), {.max_new_tokens = 4}), out);
}

// On CUDA the step behind a token runs while the host looks at it.
TEST_F(Generate, StopsAtAnyToken) {
  constexpr std::int64_t kNew = 9;
  const Tensor input = matrix(2, {3, 1, 4, 2, 7, 1});
  const Tokens free = run(input, {.max_new_tokens = kNew});
  for (const bool graph : {false, true})
    for (std::int64_t end = 1; end <= kNew; ++end) {
      Tokens seen;
      const auto keep = [&](std::span<const std::int32_t> t) {
        seen.insert(seen.end(), t.begin(), t.end());
        return static_cast<std::int64_t>(seen.size()) < 2 * end;
      };
      const Tokens out =
          run(input, {.max_new_tokens = kNew, .cuda_graph = graph, .on_tokens = keep});
      ASSERT_EQ(out.size(), static_cast<std::size_t>(2 * (3 + end)));
      ASSERT_EQ(seen.size(), static_cast<std::size_t>(2 * end));
      for (std::int64_t b = 0; b < 2; ++b) {
        const auto row = out.begin() + b * (3 + end);
        EXPECT_TRUE(std::equal(row, row + 3 + end, free.begin() + b * (3 + kNew))) << end;
        for (std::int64_t i = 0; i < end; ++i)
          EXPECT_EQ(seen[static_cast<std::size_t>(2 * i + b)], row[3 + i]) << end;
      }
    }
}

TEST_F(Generate, WhatACallbackThrowsEndsTheGeneration) {
  const Tensor input = matrix(1, {3, 1, 4});
  const Tokens free = run(input, {.max_new_tokens = 12});
  for (const std::size_t count : {1U, 2U, 5U}) {
    Tokens seen;
    EXPECT_THROW((void)run(input, {.max_new_tokens = 12,
                                   .on_tokens =
                                       [&](std::span<const std::int32_t> t) {
                                         seen.push_back(t[0]);
                                         if (seen.size() == count) throw std::length_error("full");
                                         return true;
                                       }}),
                 std::length_error);
    EXPECT_TRUE(std::equal(seen.begin(), seen.end(), free.begin() + 3));
    EXPECT_EQ(run(input, {.max_new_tokens = 12}), free);
  }
}

TEST_F(Generate, PenaltyCountsThePrompt) {
  // An infinite penalty in effect: no token comes twice while unseen ones are likely enough.
  const Tokens out = run(matrix(1, {3, 1, 4}), {.max_new_tokens = 6, .repetition_penalty = 1e6});
  Tokens sorted = out;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_EQ(std::unique(sorted.begin(), sorted.end()), sorted.end());
}

TEST_F(Generate, RefusesBadOptions) {
  const Tensor input = matrix(1, {3, 1, 4});
  EXPECT_THROW((void)run(input, {.max_new_tokens = -1}), InvalidArgument);
  EXPECT_THROW((void)run(input, {.num_samples = 0}), InvalidArgument);
  EXPECT_THROW((void)run(input, {.num_samples = INT64_MAX}), InvalidArgument);
  auto cache = model_.allocate_inference_cache(ctx_, {.batch_size = 1, .max_seqlen = 30});
  EXPECT_THROW((void)run(input, {.num_samples = 2, .cache = &cache}), InvalidArgument);
  EXPECT_THROW((void)run(input, {.prefill_chunk = -1}), InvalidArgument);
  EXPECT_THROW((void)run(input, {.temperature = -1}), InvalidArgument);
  EXPECT_THROW((void)run(input, {.top_p = 0}), InvalidArgument);
  EXPECT_THROW((void)run(input, {.min_p = 1}), InvalidArgument);
  EXPECT_THROW((void)run(input, {.repetition_penalty = 0}), InvalidArgument);
  EXPECT_THROW((void)run(input, {.stop_sequences = {{}}}), InvalidArgument);
  EXPECT_THROW((void)run(matrix(1, {31}), {}), InvalidArgument);
  EXPECT_THROW((void)generate(ctx_, model_, ctx_.zeros({1, 2}, DType::float32)), DTypeError);
  EXPECT_EQ(run(input, {.max_new_tokens = 0}), (Tokens{3, 1, 4}));
}

// Two layers of one mixer each.
class GenerateMixer : public ::testing::TestWithParam<MixerType> {
 protected:
  static LRNNLMHeadModel model(Context& ctx) {
    return {ctx,
            {.d_model = 16,
             .d_state = 4,
             .n_layer = 2,
             .vocab_size = 31,
             .mixer_types = {GetParam(), GetParam()},
             .mixer_kwargs = {.attn = {.num_heads = 2, .d_conv = 3, .rotary_emb_dim = 4}},
             .initializer_cfg = {.initializer_range = 1.0},
             .tie_embeddings = false},
            {.seed = 13}};
  }
  static Tokens run(Context& ctx, const LRNNLMHeadModel& model, const Tokens& prompts,
                    std::int64_t batch, const GenerateOptions& options) {
    const auto width = static_cast<std::int64_t>(prompts.size()) / batch;
    const Tensor input = ctx.from_host<std::int32_t>({batch, width}, prompts);
    return ctx.to_host<std::int32_t>(generate(ctx, model, input, options));
  }

  // Lengths around the width of the convolutions; padding of ids that are not those before it.
  static void padded_equals_alone(Context& ctx) {
    const auto model = GenerateMixer::model(ctx);
    const std::vector<Tokens> prompts{
        {7}, {3, 1, 4}, {2, 7, 1, 8}, {1, 4, 1, 4, 2}, {9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3}};
    const std::size_t width = prompts.back().size();
    Tokens padded;
    Tokens lengths;
    for (const Tokens& prompt : prompts) {
      padded.insert(padded.end(), prompt.begin(), prompt.end());
      padded.insert(padded.end(), width - prompt.size(), 30);
      lengths.push_back(static_cast<std::int32_t>(prompt.size()));
    }
    constexpr std::size_t kNew = 12;
    const auto rows = static_cast<std::int64_t>(prompts.size());
    const Tensor lengths_tensor = ctx.from_host<std::int32_t>({rows}, lengths);
    const Tokens together =
        run(ctx, model, padded, rows, {.max_new_tokens = kNew, .lengths = lengths_tensor});
    std::set<Tokens> different;
    for (std::size_t b = 0; b < prompts.size(); ++b) {
      const Tokens alone = run(ctx, model, prompts[b], 1, {.max_new_tokens = kNew});
      const auto begin = together.begin() + static_cast<int>(b * (width + kNew) + width);
      const Tokens of_batch(begin, begin + kNew);
      EXPECT_EQ(of_batch, Tokens(alone.end() - kNew, alone.end())) << "prompt " << b;
      different.insert(of_batch);
    }
    EXPECT_GT(different.size(), 1U) << "the prompts make no difference";
  }
};

TEST_P(GenerateMixer, PaddedPromptsContinueLikePromptsOnTheirOwn) {
  Context ctx = Context::cpu();
  padded_equals_alone(ctx);
}

TEST_P(GenerateMixer, CudaPaddedPromptsContinueLikePromptsOnTheirOwn) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  padded_equals_alone(ctx);
}

TEST_P(GenerateMixer, CudaRecordedStepsGiveTheSameTokens) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  const auto model = GenerateMixer::model(ctx);
  const Tensor lengths = ctx.from_host<std::int32_t>({3}, Tokens{1, 3, 4});
  GenerateOptions options{.max_new_tokens = 24,
                          .num_samples = 2,
                          .temperature = 0.9,
                          .top_k = 8,
                          .repetition_penalty = 1.1,
                          .seed = 3,
                          .lengths = lengths,
                          .cuda_graph = false};
  const Tokens prompts{3, 0, 0, 0, 1, 5, 9, 0, 2, 6, 5, 3};
  const Tokens eager = run(ctx, model, prompts, 3, options);
  options.cuda_graph = true;
  EXPECT_EQ(run(ctx, model, prompts, 3, options), eager);
}

std::string type_name(const ::testing::TestParamInfo<MixerType>& info) {
  return std::string(mixer_name(info.param));
}
INSTANTIATE_TEST_SUITE_P(All, GenerateMixer, ::testing::ValuesIn(all_mixer_types()), type_name);

}  // namespace
}  // namespace lrnn
