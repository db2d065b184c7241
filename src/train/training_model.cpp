#include "lrnn/models/lm_head_model.hpp"
#include "lrnn/train/trainer.hpp"

namespace lrnn {

// The trainer checks the token ids of its data once, so that passes need not copy them back.
TrainingModel training_model(LRNNLMHeadModel& model, std::int64_t recompute_blocks) {
  return {.parameters = &model.parameters(),
          .vocab_size = model.config().vocab_size,
          .loss_and_backward =
              [&model, recompute_blocks](Context& ctx, TensorView input_ids, TensorView targets) {
                return model.loss_and_backward(
                    ctx, input_ids, targets,
                    {.recompute_blocks = recompute_blocks, .validate = false});
              },
          .loss =
              [&model](Context& ctx, TensorView input_ids, TensorView targets) {
                return model.loss(ctx, input_ids, targets, {.validate = false});
              },
          .files = {{"config.json", config_to_json(model.config())}},
          .recordable = true};
}

}  // namespace lrnn
