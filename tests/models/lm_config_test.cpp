#include "lrnn/models/lm_config.hpp"

#include <cmath>

#include <gtest/gtest.h>

namespace lrnn {
namespace {

using enum MixerType;

std::string minimal(const std::string& more = "") {
  return R"({"d_model":16,"d_state":8,"n_layer":2,"vocab_size":61,"mixer_types":["LRU","Mamba"])" +
         more + "}";
}
std::string own(const std::string& more = "") {
  return minimal(R"(,"lrnn_format_version":1)" + more);
}
std::string error_of(const std::string& text) {
  try {
    (void)config_from_json(text).resolve();
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(LmConfig, DefaultsAreLrnnxs) {
  const auto config = config_from_json(minimal());
  EXPECT_EQ(config.d_intermediate, 0);
  EXPECT_EQ(config.mlp_cls, "GatedMLP");
  EXPECT_EQ(config.norm_epsilon, 1e-5);
  EXPECT_TRUE(config.rms_norm);
  EXPECT_TRUE(config.fused_add_norm);
  EXPECT_FALSE(config.residual_in_fp32);
  EXPECT_TRUE(config.tie_embeddings);
  EXPECT_EQ(config.pad_vocab_size_multiple, 8);
  EXPECT_EQ(config.padded_vocab_size(), 64);
  EXPECT_FALSE(config.dtype.has_value());
}

TEST(LmConfig, ReadsEveryArgument) {
  const auto config = config_from_json(
      minimal(R"(,"d_intermediate":24,"mlp_cls":"MLP","norm_epsilon":0.01,"rms_norm":false,)"
              R"("fused_add_norm":false,"residual_in_fp32":true,"tie_embeddings":false,)"
              R"("pad_vocab_size_multiple":16,"dtype":"bfloat16",)"
              R"("initializer_cfg":{"initializer_range":2,"rescale_prenorm_residual":false,)"
              R"("n_residuals_per_layer":3})"));
  EXPECT_EQ(config.d_intermediate, 24);
  EXPECT_EQ(config.mlp_cls, "MLP");
  EXPECT_EQ(config.norm_epsilon, 0.01);
  EXPECT_FALSE(config.rms_norm);
  EXPECT_FALSE(config.fused_add_norm);
  EXPECT_TRUE(config.residual_in_fp32);
  EXPECT_FALSE(config.tie_embeddings);
  EXPECT_EQ(config.pad_vocab_size_multiple, 16);
  EXPECT_EQ(config.dtype, DType::bfloat16);
  EXPECT_EQ(config.initializer_cfg.initializer_range, 2.0);
  EXPECT_FALSE(config.initializer_cfg.rescale_prenorm_residual);
  EXPECT_EQ(config.initializer_cfg.n_residuals_per_layer, 3);
}

TEST(LmConfig, WritesWhatItReads) {
  LRNNLMHeadConfig config{.d_model = 16,
                          .d_state = 8,
                          .n_layer = 3,
                          .vocab_size = 61,
                          .mixer_types = {LRU, Mamba, S5},
                          .d_intermediate = 24,
                          .mlp_cls = "MLP",
                          .norm_epsilon = 0.25,
                          .rms_norm = false,
                          .dtype = DType::bfloat16};
  config.mixer_kwargs.lru.r_min = 0.5;
  config.mixer_kwargs.s7.J = 2;  // not used by this model
  config.initializer_cfg.n_residuals_per_layer = 3;
  const auto resolved = config.resolve();
  const std::string text = config_to_json(resolved);
  const auto again = config_from_json(text);
  EXPECT_EQ(config_to_json(again), text);
  EXPECT_EQ(again.mixer_kwargs.lru.r_min, 0.5);
  EXPECT_EQ(again.mixer_kwargs.lru.d_state, 8);  // resolved
  EXPECT_EQ(again.mixer_kwargs.s7.J, 2);
  EXPECT_EQ(again.norm_epsilon, 0.25);
  EXPECT_EQ(again.dtype, DType::bfloat16);
  EXPECT_EQ(again.initializer_cfg.n_residuals_per_layer, 3);
}

TEST(LmConfig, MixerKwargsPerTypeAndFlat) {
  const auto per_type =
      config_from_json(own(R"(,"mixer_kwargs":{"LRU":{"r_min":0.5,"d_state":4},"S7":{"J":2}})"));
  EXPECT_EQ(per_type.mixer_kwargs.lru.r_min, 0.5);
  EXPECT_EQ(per_type.mixer_kwargs.lru.d_state, 4);
  EXPECT_EQ(per_type.mixer_kwargs.mamba.d_state, std::nullopt);
  EXPECT_EQ(per_type.mixer_kwargs.s7.J, 2);

  const auto flat = config_from_json(own(R"(,"mixer_kwargs":{"d_state":4,"r_max":1})"));
  EXPECT_EQ(flat.mixer_kwargs.lru.d_state, 4);
  EXPECT_EQ(flat.mixer_kwargs.mamba.d_state, 4);
  EXPECT_EQ(flat.mixer_kwargs.lru.r_max, 1.0);            // an integer stands for the number
  EXPECT_EQ(flat.mixer_kwargs.s7.d_state, std::nullopt);  // not in the model
}

TEST(LmConfig, PerLayerKwargsOverride) {
  const auto config = config_from_json(own(R"(,"mixer_kwargs":{"LRU":{"r_min":0.25,"r_max":0.75}},)"
                                           R"("mixer_kwargs_per_layer":[{"r_min":0.5},null])"));
  EXPECT_EQ(config.layer_kwargs(0).lru.r_min, 0.5);
  EXPECT_EQ(config.layer_kwargs(0).lru.r_max, 0.75);
  EXPECT_EQ(config.layer_kwargs(1).lru.r_min, 0.25);
  const std::string text = config_to_json(config.resolve());
  EXPECT_EQ(config_to_json(config_from_json(text)), text);
  EXPECT_EQ(config_from_json(text).layer_kwargs(0).lru.r_min, 0.5);
}

TEST(LmConfig, AutoAndNullMeanTheDefault) {
  const auto config =
      config_from_json(own(R"(,"mixer_kwargs":{"Mamba":{"dt_rank":"auto","d_state":null}})"));
  EXPECT_EQ(config.resolve().mixer_kwargs.mamba.dt_rank, 1);  // ceil(16 / 16)
  EXPECT_EQ(config.resolve().mixer_kwargs.mamba.d_state, 8);
}

TEST(LmConfig, ErrorsNameTheFieldWhatWasExpectedAndWhatCame) {
  struct Bad {
    std::string text;
    std::vector<const char*> parts;
  };
  const Bad bad[] = {
      {"", {"malformed JSON"}},
      {"[]", {"expected an object"}},
      {minimal().substr(1), {"malformed JSON"}},
      {R"({"d_model":16})", {"d_state", "missing"}},
      {minimal(R"(,"d_model":32)"), {"duplicate", "d_model"}},
      {minimal(R"(,"hidden_size":32)"), {"hidden_size", "unknown option"}},
      {minimal(R"(,"d_intermediate":1.5)"), {"d_intermediate", "an integer", "1.5"}},
      {minimal(R"(,"d_intermediate":8.0)"), {"d_intermediate", "an integer", "8.0"}},
      {minimal(R"(,"d_intermediate":-1)"), {"d_intermediate", "-1"}},
      {minimal(R"(,"d_intermediate":99999999999999999999)"), {"d_intermediate", "an integer"}},
      {minimal(R"(,"rms_norm":1)"), {"rms_norm", "true or false", "1"}},
      {minimal(R"(,"norm_epsilon":"small")"), {"norm_epsilon", "a number", "small"}},
      {minimal(R"(,"norm_epsilon":-1)"), {"norm_epsilon", ">= 0", "-1"}},
      {minimal(R"(,"norm_epsilon":1e999)"), {"malformed JSON"}},
      {minimal(R"(,"pad_vocab_size_multiple":0)"), {"pad_vocab_size_multiple", "got 0"}},
      {minimal(R"(,"mlp_cls":"SwiGLU")"), {"mlp_cls", "SwiGLU", "GatedMLP"}},
      {minimal(R"(,"dtype":"float16")"), {"dtype", "float16", "bfloat16"}},
      {minimal(R"(,"initializer_cfg":{"range":1})"), {"initializer_cfg.range", "unknown"}},
      {minimal(R"(,"initializer_cfg":7)"), {"initializer_cfg", "an object", "7"}},
      {minimal(R"(,"mixer_kwargs":7)"), {"mixer_kwargs", "an object", "7"}},
      {minimal(R"(,"mixer_kwargs":{"LRU":7})"), {"mixer_kwargs.LRU", "an object", "7"}},
      {minimal(R"(,"mixer_kwargs":{"LRU":{},"r_min":0})"), {"mixer_kwargs", "a mixture"}},
      {minimal(R"(,"mixer_kwargs":{"LRU":{"rmin":0}})"), {"mixer_kwargs.LRU.rmin", "unknown"}},
      {minimal(R"(,"mixer_kwargs":{"S7":{"rmin":0}})"), {"mixer_kwargs.S7.rmin", "unknown"}},
      {minimal(R"(,"mixer_kwargs":{"J":2})"), {"mixer_kwargs.J", "unknown"}},  // S7 is not used
      {minimal(R"(,"mixer_kwargs":{"LRU":{"r_min":"a"}})"),
       {"mixer_kwargs.LRU.r_min", "a number", "\"a\""}},
      {minimal(R"(,"mixer_kwargs":{"LRU":{"d_state":4.0}})"),
       {"mixer_kwargs.LRU.d_state", "an integer", "4.0"}},
      {minimal(R"(,"mixer_kwargs":{"LRU":{"d_state":true}})"),
       {"mixer_kwargs.LRU.d_state", "an integer", "true"}},
      {minimal(R"(,"mixer_kwargs":{"Mamba":{"discretization":"euler"}})"),
       {"mixer_kwargs.Mamba.discretization", "euler", "zoh"}},
      {minimal(R"(,"mixer_kwargs_per_layer":[{}])"), {"mixer_kwargs_per_layer", "per layer"}},
      {minimal(R"(,"mixer_kwargs_per_layer":[{},{"r_min":0}])"),
       {"mixer_kwargs_per_layer[1].r_min", "unknown"}},
      {own(R"(,"n_layer":2)"), {"duplicate"}},
      {minimal(R"(,"lrnn_format_version":2)"), {"lrnn_format_version", "expected 1", "2"}},
      {minimal(R"(,"mixer_kwargs":)" + std::string(100, '[') + std::string(100, ']')), {"nested"}},
      {R"({"d_model":16,"d_state":8,"n_layer":2,"vocab_size":61,"mixer_types":["LRU"]})",
       {"mixer_types", "expected 2", "got 1"}},
      {R"({"d_model":16,"d_state":8,"n_layer":1,"vocab_size":61,"mixer_types":["lru"]})",
       {"mixer_types", "lru", "LRU"}},
      {R"({"d_model":16,"d_state":8,"n_layer":1,"vocab_size":61,"mixer_types":"LRU"})",
       {"mixer_types", "a list"}},
      {R"({"d_model":0,"d_state":8,"n_layer":1,"vocab_size":61,"mixer_types":["LRU"]})",
       {"d_model", "got 0"}},
      {R"({"d_model":1152921504606846976,"d_state":8,"n_layer":1,"vocab_size":61,)"
       R"("mixer_types":["LRU"]})",
       {"d_model", "1152921504606846976"}},
  };
  for (const Bad& b : bad) {
    const std::string message = error_of(b.text);
    for (const char* part : b.parts)
      EXPECT_NE(message.find(part), std::string::npos) << b.text << "\n  " << message;
  }
}

TEST(LmConfig, TextsOfLrnnxNeedWhatLrnnxDoesNotSave) {
  const auto text = [](const char* type, const char* more) {
    return std::string(
               R"({"d_model":16,"d_state":8,"n_layer":1,"vocab_size":61,"mixer_types":[")") +
           type + "\"]" + more + "}";
  };
  EXPECT_NE(error_of(text("attn", "")).find("mixer_kwargs.attn.num_heads"), std::string::npos);
  const std::string heads = text("attn", R"(,"mixer_kwargs":{"num_heads":2})");
  EXPECT_FALSE(config_from_json(heads).mixer_kwargs.attn.causal);
  const std::string causal = text("attn", R"(,"mixer_kwargs":{"num_heads":2,"causal":true})");
  EXPECT_TRUE(config_from_json(causal).mixer_kwargs.attn.causal);
  const std::string own_attn = text("attn", R"(,"lrnn_format_version":1)");
  EXPECT_TRUE(config_from_json(own_attn).mixer_kwargs.attn.causal);
  EXPECT_NE(error_of(text("S5", "")).find("mixer_kwargs.S5.discretization"), std::string::npos);
  EXPECT_EQ(error_of(text("S5", R"(,"mixer_kwargs":{"discretization":"zoh"})")), "accepted");
  EXPECT_EQ(error_of(text("S5", R"(,"lrnn_format_version":1)")), "accepted");
  const std::string bilinear = text("S5", R"(,"mixer_kwargs":{"discretization":"bilinear"})");
  EXPECT_NE(error_of(bilinear).find("sign-flipped"), std::string::npos);
  EXPECT_NO_THROW((void)config_from_json(bilinear, {.constructor_arguments = true}));
  EXPECT_NO_THROW((void)config_from_json(text("S5", ""), {.mixer_kwargs = MixerKwargs{}}));
}

TEST(LmConfig, ResidualScaleCountsResiduals) {
  LRNNLMHeadConfig config{
      .d_model = 8, .d_state = 4, .n_layer = 4, .vocab_size = 16, .mixer_types = {}};
  EXPECT_DOUBLE_EQ(config.residual_scale(), 0.5);
  config.d_intermediate = 8;
  EXPECT_DOUBLE_EQ(config.residual_scale(), 1 / std::sqrt(8.0));
  config.initializer_cfg.n_residuals_per_layer = 4;
  EXPECT_DOUBLE_EQ(config.residual_scale(), 0.25);
  config.initializer_cfg.rescale_prenorm_residual = false;
  EXPECT_DOUBLE_EQ(config.mixer_build().out_proj_scale, 1.0);
}

}  // namespace
}  // namespace lrnn
