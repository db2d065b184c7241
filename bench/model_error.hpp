/// Errors of a layer or a model, against the same weights in double on the CPU.
///
/// The weights are those of the moment. A difference is max |x - exact| / max |exact| unless it
/// says otherwise.
#pragma once

#include "lrnn/mixers/registry.hpp"
#include "lrnn/models/lm_head_model.hpp"

namespace lrnn::bench {

struct LayerError {
  double y, dx;
  double gradient;  ///< as TrainingError::gradient
};

/// x, dy: [B, L, H]; `build` is that of `mixer`. All of x runs, forward and backward; results at the
/// first tokens of the first sequence are compared, and what comes of a dy that is zero elsewhere:
/// mixers of the list are causal. Overwrites the gradients of `store`.
LayerError layer_error(Context& ctx, MixerType type, const MixerBuild& build, const Mixer& mixer,
                       ParameterStore& store, const Tensor& x, const Tensor& dy);

/// Logits of the first two of `batch` sequences after three tokens, token by token.
double decode_error(Context& ctx, const LRNNLMHeadModel& model, std::int64_t batch);

/// ids: [B, L] int32. Logits of the last token of the first sequence, all of them having been run.
double prefill_error(Context& ctx, const LRNNLMHeadModel& model, const Tensor& ids);

struct TrainingError {
  double loss;      ///< |loss - exact| / |exact|
  double gradient;  ///< |g - exact| / |exact|, Euclidean norms over all parameters
};

/// ids, targets: [B, L] int32. All sequences run; the targets of the first alone count, so that the
/// exact gradient is that of one sequence. Overwrites the model's gradients.
TrainingError training_error(Context& ctx, LRNNLMHeadModel& model, const Tensor& ids,
                             const Tensor& targets);

}  // namespace lrnn::bench
