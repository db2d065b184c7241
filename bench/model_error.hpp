/// Errors of a model, against the same weights in double on the CPU.
///
/// The weights are those of the moment. A difference is max |x - exact| / max |exact| of the logits
/// unless it says otherwise.
#pragma once

#include "lrnn/models/lm_head_model.hpp"

namespace lrnn::bench {

/// Of `batch` sequences the first two, after three tokens, token by token.
double decode_error(Context& ctx, const LRNNLMHeadModel& model, std::int64_t batch);

/// ids: [B, L] int32. The last token of the first sequence, all of them having been run.
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
