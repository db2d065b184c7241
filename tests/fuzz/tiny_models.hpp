/// Configurations whose files the fuzzers start from.
#pragma once

#include <vector>

#include "lrnn/models/lm_config.hpp"

namespace lrnn::fuzz {

inline LRNNLMHeadConfig tiny(std::vector<MixerType> types, std::int64_t d_intermediate = 0) {
  return {.d_model = 2,
          .d_state = 4,  // the least that S4 takes
          .n_layer = static_cast<std::int64_t>(types.size()),
          .vocab_size = 3,
          .mixer_types = std::move(types),
          .d_intermediate = d_intermediate,
          .pad_vocab_size_multiple = 1};
}

/// Every mixer once, in files of a few kilobytes.
inline std::vector<LRNNLMHeadConfig> tiny_models() {
  using enum MixerType;
  LRNNLMHeadConfig attention = tiny({Attn}, 2);
  attention.mixer_kwargs.attn.num_heads = 1;
  LRNNLMHeadConfig untied = tiny({Mamba, RGLRU});
  untied.tie_embeddings = false;
  return {tiny({S4}), tiny({S4D}), tiny({Centaurus}), tiny({LRU, S5}),
          tiny({S7}), untied,      attention};
}

}  // namespace lrnn::fuzz
