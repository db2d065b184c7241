#include "models/foreign_config.hpp"

#include <algorithm>

#include "io/json.hpp"

namespace lrnn::detail {
namespace {

using Json = nlohmann::ordered_json;

[[noreturn]] void refuse(const std::string& field, const Json& value, const char* why) {
  throw ConfigError(concat(field, ": ", shown(value), ": ", why));
}

// `target` gets the value of `key` under another name, if there is one.
void take(const Json& from, const char* key, Json& target, const char* name) {
  if (const auto it = from.find(key); it != from.end() && !it->is_null()) target[name] = *it;
}
void require(const Json& from, const char* key, Json& target, const char* name) {
  LRNN_CHECK(from.contains(key), ConfigError, key, ": missing");
  take(from, key, target, name);
}
std::int64_t layer_count(const Json& json, const char* key) {
  LRNN_CHECK(json.contains(key) && json[key].is_number_unsigned(), ConfigError, key,
             ": expected a number of layers");
  constexpr std::uint64_t kMaxLayers = 65'536;  // as in LRNNLMHeadConfig::validate
  const auto count = json[key].get<std::uint64_t>();
  LRNN_CHECK(count <= kMaxLayers, ConfigError, key, ": expected at most ", kMaxLayers, ", got ",
             count);
  return static_cast<std::int64_t>(count);
}
Json object_or_empty(const Json& json, const char* key) {
  const auto it = json.find(key);
  if (it == json.end() || it->is_null()) return Json::object();
  LRNN_CHECK(it->is_object(), ConfigError, key, ": expected an object, got ", shown(*it));
  return *it;
}

Json from_mamba_ssm(const Json& in) {
  static constexpr const char* kKnown[] = {"d_model",
                                           "d_intermediate",
                                           "n_layer",
                                           "vocab_size",
                                           "ssm_cfg",
                                           "attn_layer_idx",
                                           "attn_cfg",
                                           "rms_norm",
                                           "residual_in_fp32",
                                           "fused_add_norm",
                                           "pad_vocab_size_multiple",
                                           "tie_embeddings"};
  for (const auto& [key, value] : in.items())
    LRNN_CHECK(std::find(std::begin(kKnown), std::end(kKnown), key) != std::end(kKnown),
               ConfigError, key, ": unknown field of a mamba_ssm configuration");
  Json ssm = object_or_empty(in, "ssm_cfg");
  if (const auto it = ssm.find("layer"); it != ssm.end()) {
    if (*it != "Mamba1") refuse("ssm_cfg.layer", *it, "only Mamba1 layers are implemented");
    ssm.erase("layer");
  }
  Json out = Json::object();
  for (const char* key : {"d_model", "n_layer", "vocab_size"}) require(in, key, out, key);
  for (const char* key : {"d_intermediate", "rms_norm", "fused_add_norm", "pad_vocab_size_multiple",
                          "tie_embeddings"})
    take(in, key, out, key);
  out["residual_in_fp32"] = in.value("residual_in_fp32", Json(true));
  out["d_state"] = ssm.value("d_state", Json(16));

  const std::int64_t n_layer = layer_count(in, "n_layer");
  out["mixer_types"] = Json::array();
  for (std::int64_t i = 0; i < n_layer; ++i) out["mixer_types"].push_back("Mamba");
  const Json attention = in.value("attn_layer_idx", Json::array());
  for (const Json& index : attention) {
    if (!index.is_number_unsigned() ||
        index.get<std::uint64_t>() >= static_cast<std::uint64_t>(n_layer))
      refuse("attn_layer_idx", index, "expected the index of a layer");
    out["mixer_types"][index.get<std::size_t>()] = "attn";
  }
  out["mixer_kwargs"] = {{"Mamba", ssm}};
  if (!attention.empty()) out["mixer_kwargs"]["attn"] = object_or_empty(in, "attn_cfg");
  return out;
}

Json from_hugging_face(const Json& in) {
  if (in["model_type"] != "mamba")
    refuse("model_type", in["model_type"], "only \"mamba\" is implemented");
  if (const Json act = in.value("hidden_act", Json("silu")); act != "silu")
    refuse("hidden_act", act, "expected \"silu\"");
  Json out = Json::object();
  require(in, "hidden_size", out, "d_model");
  require(in, "state_size", out, "d_state");
  require(in, "num_hidden_layers", out, "n_layer");
  require(in, "vocab_size", out, "vocab_size");
  take(in, "layer_norm_epsilon", out, "norm_epsilon");
  out["residual_in_fp32"] = in.value("residual_in_fp32", Json(true));
  out["tie_embeddings"] = in.value("tie_word_embeddings", Json(true));
  out["pad_vocab_size_multiple"] = 1;  // vocab_size is that of the table
  // float16 weights are converted on loading.
  for (const char* key : {"torch_dtype", "dtype"})
    if (const Json dtype = in.value(key, Json()); dtype == "bfloat16" || dtype == "float32")
      out["dtype"] = dtype;
  const std::int64_t n_layer = layer_count(in, "num_hidden_layers");
  out["mixer_types"] = Json::array();
  for (std::int64_t i = 0; i < n_layer; ++i) out["mixer_types"].push_back("Mamba");

  Json mamba = Json::object();
  take(in, "expand", mamba, "expand");
  take(in, "conv_kernel", mamba, "d_conv");
  take(in, "time_step_rank", mamba, "dt_rank");
  take(in, "use_bias", mamba, "bias");
  take(in, "use_conv_bias", mamba, "conv_bias");
  out["mixer_kwargs"] = {{"Mamba", mamba}};
  return out;
}

}  // namespace

Json translate_foreign_config(Json config) {
  if (config.contains("mixer_types")) return config;
  if (config.contains("model_type")) return from_hugging_face(config);
  if (config.contains("ssm_cfg")) return from_mamba_ssm(config);
  return config;
}

}  // namespace lrnn::detail
