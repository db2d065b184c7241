// Continues the pattern that train.cpp learned: token by token, and in one call.
#include <iostream>
#include <lrnn/lrnn.hpp>

int main() {
  lrnn::Context ctx = lrnn::Context::best();
  const auto model = lrnn::LRNNLMHeadModel::from_pretrained(ctx, "my_lrnn_lm");

  // One token at a time, as in lrnnx.
  const std::vector<std::int32_t> pattern{0, 1, 2, 3, 4, 5, 6, 0};
  auto cache = model.allocate_inference_cache(ctx, {.batch_size = 1, .max_seqlen = 512});
  const lrnn::Tensor prompt = ctx.from_host<std::int32_t>({1, 8}, pattern);
  const auto prefill = model.forward(ctx, prompt, {.num_last_tokens = 1, .cache = &cache});
  lrnn::Tensor token = lrnn::argmax(ctx, prefill.logits);  // [B, 1]
  std::vector<std::int32_t> drawn;
  for (int i = 0; i < 20; ++i) {
    drawn.push_back(ctx.to_host<std::int32_t>(token).front());
    std::cout << drawn.back() << ' ';
    token = lrnn::argmax(ctx, model.step(ctx, token, cache).logits);
  }

  // The same; on CUDA, recorded once as a graph and replayed.
  const lrnn::Tensor tokens = lrnn::generate(ctx, model, prompt, {.max_new_tokens = 20});
  std::cout << '\n' << tokens.shape() << '\n';  // [1, 28]

  const auto all = ctx.to_host<std::int32_t>(tokens);
  const bool same = std::equal(drawn.begin(), drawn.end(), all.begin() + 8);
  return same && drawn[0] == 1 && drawn[6] == 0 ? 0 : 1;
}
