/// Text generation: prompt, then one token at a time.
#pragma once

#include <functional>
#include <optional>
#include <span>

#include "lrnn/models/lm_head_model.hpp"

namespace lrnn {

struct GenerateOptions {
  std::int64_t max_new_tokens = 20;
  /// N continuations of every prompt, which is processed once. A sequence is then a continuation:
  /// number s of prompt b is row b N + s of the result, of generated_lengths and of on_tokens.
  std::int64_t num_samples = 1;
  double temperature = 1.0;         ///< 0: greedy
  std::int64_t top_k = 1;           ///< 1: greedy; 0: no limit
  double top_p = 1.0;               ///< in (0, 1]
  double min_p = 0.0;               ///< in [0, 1)
  double repetition_penalty = 1.0;  ///< 1: none; counts the prompt
  std::uint64_t seed = 0;
  /// A sequence ends with this token, or with any of the stop sequences among the tokens it drew
  /// (of a byte-level model: strings). What ended it is part of the result; pad_token fills its row
  /// while others go on. The generation ends with the last sequence.
  std::optional<std::int32_t> eos_token = {};
  std::vector<std::vector<std::int32_t>> stop_sequences = {};
  std::optional<std::int32_t> pad_token = {};  ///< default: eos_token, or 0 without one
  /// Set to the number of tokens that each sequence drew until it ended.
  std::vector<std::int64_t>* generated_lengths = nullptr;
  /// States of what came before the prompt; with one sample only. Left at the last token that the
  /// model has seen, which is the last but one of the result.
  InferenceCache* cache = nullptr;
  TensorView lengths = {};            ///< [B] int32, prompt lengths; the rest of a row is padding
  std::int64_t prefill_chunk = 2048;  ///< tokens of the prompt processed at a time, 0: all
  bool cuda_graph = true;             ///< on CUDA: record one step and replay it
  /// Called with the B N tokens of every step; returning false ends the generation. On CUDA the
  /// step behind them runs meanwhile, one in vain at the end, unless `cache` shows its states.
  std::function<bool(std::span<const std::int32_t> tokens)> on_tokens = {};
};

/// prompt: [B, L] int32 or int64. Returns [B N, L + n] int32: the prompt as given, padding
/// included, then the n <= max_new_tokens generated tokens.
///
/// Nothing is copied to the host before the end unless eos_token, stop_sequences or on_tokens ask
/// for it.
/// @throws InvalidArgument, ConfigError naming the option
[[nodiscard]] Tensor generate(Context& ctx, const LRNNLMHeadModel& model, TensorView prompt,
                              const GenerateOptions& options = {});

}  // namespace lrnn
