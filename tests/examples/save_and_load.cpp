// Usage example "Save and Load": the loaded model computes the same bits.
#include <iostream>
#include <lrnn/lrnn.hpp>

int main() {
  using enum lrnn::MixerType;
  const lrnn::LRNNLMHeadConfig config{.d_model = 64,
                                      .d_state = 16,
                                      .n_layer = 4,
                                      .vocab_size = 1000,
                                      .mixer_types = {S5, S5, Mamba, Mamba}};
  // [save]
  lrnn::Context ctx = lrnn::Context::best();  // Context::cuda() for the CUDA device, or throws
  const lrnn::LRNNLMHeadModel model(ctx, config);

  // Save model
  model.save_pretrained(ctx, "my_lrnn_lm_saved");

  // Load model, to the device of the context
  const auto loaded_model = lrnn::LRNNLMHeadModel::from_pretrained(ctx, "my_lrnn_lm_saved");
  // [save]
  const lrnn::Tensor ids = ctx.from_host<std::int32_t>({1, 3}, std::vector<std::int32_t>{3, 1, 4});
  const bool same = ctx.to_host<float>(model.forward(ctx, ids).logits) ==
                    ctx.to_host<float>(loaded_model.forward(ctx, ids).logits);
  std::cout << (same ? "same bits\n" : "different\n");
  return same ? 0 : 1;
}
