#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

MixerVariant attn(const char* name, const AttentionConfig& config,
                  std::vector<std::pair<std::int64_t, std::int64_t>> sizes = {{8, 1}, {16, 1}}) {
  return {.type = MixerType::Attn,
          .name = name,
          .kwargs = {.attn = config},
          .sizes = std::move(sizes),
          .causal = config.causal,
          .conv_width = std::max<std::int64_t>(config.d_conv, 2),
          .chunk = 32};
}

const RegisterMixerVariants kRegister({
    attn("defaults", {}, {{4, 1}, {5, 1}, {1, 1}}),
    attn("grouped", {.num_heads = 4, .num_heads_kv = 2}),
    attn("one_kv_head", {.num_heads = 4, .num_heads_kv = 1, .head_dim = 3}),
    attn("rotary", {.num_heads = 2, .rotary_emb_dim = 4}),
    attn("rotary_interleaved", {.num_heads = 2,
                                .rotary_emb_dim = 2,
                                .rotary_emb_base = 100.0,
                                .rotary_emb_interleaved = true}),
    attn("conv", {.num_heads = 2, .d_conv = 4}),
    attn("conv1", {.num_heads = 1, .d_conv = 1, .rotary_emb_dim = 2}),
    attn("not_causal", {.num_heads = 2, .num_heads_kv = 1, .causal = false, .d_conv = 3}),
    attn("everything", {.num_heads = 4,
                        .num_heads_kv = 2,
                        .head_dim = 6,
                        .mlp_dim = 10,
                        .qkv_proj_bias = false,
                        .out_proj_bias = false,
                        .softmax_scale = 0.3,
                        .d_conv = 3,
                        .rotary_emb_dim = 4}),
});

}  // namespace
}  // namespace lrnn::testing
