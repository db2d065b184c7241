/// Text generation: prompt, then one token at a time.
#pragma once

#include <functional>
#include <optional>
#include <span>

#include "lrnn/models/lm_head_model.hpp"

namespace lrnn {

struct GenerateOptions {
  std::int64_t max_new_tokens = 20;
  double temperature = 1.0;         ///< 0: greedy
  std::int64_t top_k = 1;           ///< 1: greedy; 0: no limit
  double top_p = 1.0;               ///< in (0, 1]
  double min_p = 0.0;               ///< in [0, 1)
  double repetition_penalty = 1.0;  ///< 1: none; counts the prompt
  std::uint64_t seed = 0;
  /// A sequence that drew it is continued with this token; all done ends the generation.
  std::optional<std::int32_t> eos_token = {};
  TensorView lengths = {};            ///< [B] int32, prompt lengths; the rest of a row is padding
  std::int64_t prefill_chunk = 2048;  ///< tokens of the prompt processed at a time, 0: all
  bool cuda_graph = true;             ///< on CUDA: record one step and replay it
  /// Called with the B tokens of every step; returning false ends the generation. Costs one
  /// synchronisation per token.
  std::function<bool(std::span<const std::int32_t> tokens)> on_tokens = {};
};

/// prompt: [B, L] int32 or int64. Returns [B, L + n] int32: the prompt as given, padding included,
/// then the n <= max_new_tokens generated tokens.
///
/// Nothing is copied to the host before the end unless eos_token or on_tokens ask for it.
/// @throws InvalidArgument, ConfigError naming the option
[[nodiscard]] Tensor generate(Context& ctx, const LRNNLMHeadModel& model, TensorView prompt,
                              const GenerateOptions& options = {});

}  // namespace lrnn
