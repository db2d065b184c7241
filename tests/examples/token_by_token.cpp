// Usage example "Autoregressive Generation", checked against generate().
#include <algorithm>
#include <iostream>
#include <lrnn/lrnn.hpp>

int main() {
  using enum lrnn::MixerType;
  lrnn::Context ctx = lrnn::Context::best();
  const lrnn::LRNNLMHeadModel model(ctx, {.d_model = 64,
                                          .d_state = 16,
                                          .n_layer = 4,
                                          .vocab_size = 50257,
                                          .mixer_types = {S5, S5, Mamba, Mamba}});
  std::vector<std::int32_t> drawn;
  // [generation]
  // A cache for efficient generation.
  auto caches = model.allocate_inference_cache(ctx, {.batch_size = 1, .max_seqlen = 512});

  // One token at a time.
  lrnn::Tensor input_ids =
      ctx.from_host<std::int32_t>({1, 1}, std::vector<std::int32_t>{50256});  // Start token
  for (int i = 0; i < 20; ++i) {
    const auto output = model.step(ctx, input_ids, caches);  // logits [1, 1, 50257]
    input_ids = lrnn::argmax(ctx, output.logits);            // [1, 1]
    drawn.push_back(ctx.to_host<std::int32_t>(input_ids).front());
  }
  // [generation]
  const lrnn::Tensor start = ctx.from_host<std::int32_t>({1, 1}, std::vector<std::int32_t>{50256});
  const auto all = ctx.to_host<std::int32_t>(
      lrnn::generate(ctx, model, start, {.max_new_tokens = 20}));  // the same in one call
  std::cout << "generated " << drawn.size() << " tokens\n";
  return drawn.size() == 20 && std::equal(drawn.begin(), drawn.end(), all.begin() + 1, all.end())
             ? 0
             : 1;
}
