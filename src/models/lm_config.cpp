#include "lrnn/models/lm_config.hpp"

#include <algorithm>
#include <cmath>

#include "lrnn/nn/mlp.hpp"

namespace lrnn {
namespace {

// Keeps the product of any three sizes, and with it every shape, within 64 bits.
constexpr std::int64_t kMaxSize = std::int64_t{1} << 20;
// As many as a file may have tensors: a model of more could not be saved.
constexpr std::int64_t kMaxLayers = 65'536;
constexpr std::int64_t kMaxVocabulary = (std::int64_t{1} << 31) - 1;

void check_range(const char* field, std::int64_t value, std::int64_t low, std::int64_t high) {
  LRNN_CHECK(value >= low && value <= high, ConfigError, field, ": expected ", low, "..", high,
             ", got ", value);
}

}  // namespace

void LRNNLMHeadConfig::validate() const {
  check_range("d_model", d_model, 1, kMaxSize);
  check_range("d_state", d_state, 1, kMaxSize);
  check_range("n_layer", n_layer, 0, kMaxLayers);
  check_range("vocab_size", vocab_size, 1, kMaxVocabulary);
  check_range("d_intermediate", d_intermediate, 0, kMaxSize);
  check_range("pad_vocab_size_multiple", pad_vocab_size_multiple, 1, kMaxSize);
  LRNN_CHECK(padded_vocab_size() <= kMaxVocabulary, ConfigError,
             "pad_vocab_size_multiple: pads vocab_size to ", padded_vocab_size(),
             ", expected at most ", kMaxVocabulary);
  LRNN_CHECK(static_cast<std::int64_t>(mixer_types.size()) == n_layer, ConfigError,
             "mixer_types: expected ", n_layer, " names (n_layer), got ", mixer_types.size());
  LRNN_CHECK(mixer_kwargs_per_layer.empty() ||
                 static_cast<std::int64_t>(mixer_kwargs_per_layer.size()) == n_layer,
             ConfigError, "mixer_kwargs_per_layer: expected none or ", n_layer,
             " entries (n_layer), got ", mixer_kwargs_per_layer.size());
  LRNN_CHECK(std::isfinite(norm_epsilon) && norm_epsilon >= 0, ConfigError,
             "norm_epsilon: expected a number >= 0, got ", norm_epsilon);
  LRNN_CHECK(
      std::isfinite(initializer_cfg.initializer_range) && initializer_cfg.initializer_range >= 0,
      ConfigError, "initializer_cfg.initializer_range: expected a number >= 0, got ",
      initializer_cfg.initializer_range);
  if (initializer_cfg.n_residuals_per_layer)
    check_range("initializer_cfg.n_residuals_per_layer", *initializer_cfg.n_residuals_per_layer, 1,
                kMaxSize);
  LRNN_CHECK(
      !dtype || *dtype == DType::float32 || *dtype == DType::float64 || *dtype == DType::bfloat16,
      ConfigError, "dtype: expected float32, float64 or bfloat16, got ", *dtype);
  check_mlp_name(mlp_cls);
}

LRNNLMHeadConfig LRNNLMHeadConfig::resolve() const {
  validate();
  LRNNLMHeadConfig out = *this;
  const MixerBuild build = mixer_build();
  if (mixer_kwargs_per_layer.empty()) {
    for (const MixerType type : all_mixer_types())
      if (std::find(mixer_types.begin(), mixer_types.end(), type) != mixer_types.end())
        out.mixer_kwargs = resolve_mixer_kwargs(type, out.mixer_kwargs, build);
  } else {
    for (std::size_t i = 0; i < mixer_types.size(); ++i) {
      MixerKwargs& kwargs = out.mixer_kwargs_per_layer[i];
      kwargs = resolve_mixer_kwargs(mixer_types[i], kwargs, build);
    }
  }
  return out;
}

const MixerKwargs& LRNNLMHeadConfig::layer_kwargs(std::int64_t layer) const {
  return mixer_kwargs_per_layer.empty()
             ? mixer_kwargs
             : mixer_kwargs_per_layer.at(static_cast<std::size_t>(layer));
}

MixerBuild LRNNLMHeadConfig::mixer_build() const {
  return {.d_model = d_model,
          .d_state = d_state,
          .out_proj_scale = initializer_cfg.rescale_prenorm_residual ? residual_scale() : 1.0};
}

std::int64_t LRNNLMHeadConfig::padded_vocab_size() const {
  return (vocab_size + pad_vocab_size_multiple - 1) / pad_vocab_size_multiple *
         pad_vocab_size_multiple;
}

double LRNNLMHeadConfig::residual_scale() const {
  const std::int64_t n_residuals =
      initializer_cfg.n_residuals_per_layer.value_or(d_intermediate > 0 ? 2 : 1);
  return 1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(1, n_residuals * n_layer)));
}

}  // namespace lrnn
