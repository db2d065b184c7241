// Usage example "Hybrid Architecture with Attention".
#include <iostream>
#include <lrnn/lrnn.hpp>

int main() {
  lrnn::Context ctx = lrnn::Context::best();
  // [hybrid]
  using enum lrnn::MixerType;

  const lrnn::LRNNLMHeadModel model(
      ctx, {
               .d_model = 768,
               .d_state = 128,
               .n_layer = 6,
               .vocab_size = 50257,
               .mixer_types = {S5, S5, Attn, Mamba, Mamba, Attn},
               .d_intermediate = 3072,
               .mixer_kwargs = {.s5 = {.dt_min = 0.001}, .attn = {.num_heads = 12}},
           });
  // [hybrid]
  const lrnn::Tensor input_ids = ctx.zeros({1, 16}, lrnn::DType::int32);
  const auto output = model.forward(ctx, input_ids);
  std::cout << output.logits.shape() << '\n';  // [1, 16, 50257]
  return output.logits.shape() == lrnn::Shape{1, 16, 50257} ? 0 : 1;
}
