#include <iostream>
#include <lrnn/lrnn.hpp>

int main() {
  using enum lrnn::MixerType;
  lrnn::Context ctx = lrnn::Context::best();  // CUDA device 0, else the CPU
  const lrnn::LRNNLMHeadConfig config{.d_model = 128,
                                      .d_state = 16,
                                      .n_layer = 4,
                                      .vocab_size = 256,
                                      .mixer_types = {S5, Mamba, Attn, LRU}};
  lrnn::LRNNLMHeadModel model(ctx, config, {.seed = 1});
  lrnn::AdamW optimizer(ctx, model.parameters(), {.lr = 1e-3});
  const std::vector<std::int32_t> bytes{'h', 'e', 'l', 'l', 'o', ' ', 'h', 'e'};
  const lrnn::Tensor input_ids = ctx.from_host<std::int32_t>({1, 7}, {bytes.data(), 7});
  const lrnn::Tensor targets = ctx.from_host<std::int32_t>({1, 7}, {bytes.data() + 1, 7});
  for (int i = 0; i < 10; ++i) {
    model.parameters().zero_grad(ctx);
    const lrnn::Tensor loss = model.loss_and_backward(ctx, input_ids, targets);
    optimizer.step(ctx);
    std::cout << ctx.to_host<float>(loss).front() << '\n';
  }
  const auto logits = model.forward(ctx, input_ids).logits;
  const auto text = lrnn::generate(ctx, model, input_ids, {.max_new_tokens = 20});
  std::cout << logits.shape() << ' ' << text.shape() << '\n';  // [1, 7, 256] [1, 27]
  model.save_pretrained(ctx, "hello_lrnn");
}
