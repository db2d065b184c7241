// Trains a small model to continue a repeating pattern of bytes, and saves it.
#include <iostream>
#include <lrnn/lrnn.hpp>

int main() {
  using enum lrnn::MixerType;
  lrnn::Context ctx = lrnn::Context::best();
  lrnn::LRNNLMHeadModel model(
      ctx,
      {.d_model = 64, .d_state = 16, .n_layer = 2, .vocab_size = 256, .mixer_types = {Mamba, LRU}},
      {.seed = 1});
  lrnn::AdamW optimizer(ctx, model.parameters(), {.lr = 3e-3, .weight_decay = 0.1});

  std::vector<std::int32_t> bytes(8 * 65);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::int32_t>(i % 7);
  const lrnn::Tensor sequence = ctx.from_host<std::int32_t>({8 * 65}, bytes);
  lrnn::Tensor input_ids = ctx.empty({8, 64}, lrnn::DType::int32);
  lrnn::Tensor targets = ctx.empty({8, 64}, lrnn::DType::int32);
  for (std::int64_t row = 0; row < 8; ++row) {
    ctx.copy(input_ids.view().slice(0, row, 1).reshape({64}),
             sequence.view().slice(0, row * 65, 64));
    ctx.copy(targets.view().slice(0, row, 1).reshape({64}),
             sequence.view().slice(0, row * 65 + 1, 64));
  }

  float last = 0;
  for (int iteration = 0; iteration < 60; ++iteration) {
    model.parameters().zero_grad(ctx);
    const lrnn::Tensor loss = model.loss_and_backward(ctx, input_ids, targets);
    optimizer.step(ctx);
    if (iteration % 10 == 9) {
      last = ctx.to_host<float>(loss).front();
      std::cout << iteration + 1 << ' ' << last << '\n';
    }
  }
  model.save_pretrained(ctx, "my_lrnn_lm");
  return last < 0.5F ? 0 : 1;
}
