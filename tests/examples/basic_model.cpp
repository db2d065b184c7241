// Usage example "Basic Language Model".
#include <iostream>
#include <lrnn/lrnn.hpp>

int main() {
  lrnn::Context ctx = lrnn::Context::best();
  // [basic]
  using enum lrnn::MixerType;

  // A 4-layer hybrid model of S5 and Mamba layers.
  const lrnn::LRNNLMHeadConfig config{
      .d_model = 512,
      .d_state = 64,
      .n_layer = 4,
      .vocab_size = 50257,  // GPT-2 vocabulary
      .mixer_types = {S5, S5, Mamba, Mamba},
      .d_intermediate = 2048,  // 4 * d_model
      .rms_norm = true,
      .tie_embeddings = true,
  };
  const lrnn::LRNNLMHeadModel model(ctx, config);

  // Forward pass
  std::vector<std::int32_t> tokens(2 * 128);
  lrnn::Rng rng(0);
  for (auto& token : tokens) token = static_cast<std::int32_t>(rng.below(50257));
  const lrnn::Tensor input_ids = ctx.from_host<std::int32_t>({2, 128}, tokens);  // [B, L]
  const auto output = model.forward(ctx, input_ids);
  const lrnn::Tensor& logits = output.logits;  // [2, 128, 50257]
  // [basic]
  std::cout << logits.shape() << '\n';
  return logits.shape() == lrnn::Shape{2, 128, 50257} ? 0 : 1;
}
