#include "lrnn/generation/generate.hpp"

#include <algorithm>

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

}  // namespace
}  // namespace lrnn
