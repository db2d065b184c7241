// Logits of a hybrid model.
#include <iostream>
#include <lrnn/lrnn.hpp>

int main() {
  using enum lrnn::MixerType;
  lrnn::Context ctx = lrnn::Context::best();

  const lrnn::LRNNLMHeadModel model(
      ctx, {
               .d_model = 256,
               .d_state = 64,
               .n_layer = 4,
               .vocab_size = 5000,
               .mixer_types = {S5, Mamba, Attn, LRU},
               .d_intermediate = 1024,
               .mixer_kwargs = {.s5 = {.dt_min = 0.01}, .attn = {.num_heads = 8}},
           });

  const std::vector<std::int32_t> tokens(2 * 128, 1);
  const lrnn::Tensor input_ids = ctx.from_host<std::int32_t>({2, 128}, tokens);  // [B, L]
  const auto output = model.forward(ctx, input_ids);
  std::cout << output.logits.shape() << '\n';  // [2, 128, 5000]
}
