/// Everything that defines a language model: the constructor arguments of lrnnx's LRNNLMHeadModel.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "lrnn/mixers/registry.hpp"

namespace lrnn {

struct InitializerConfig {
  double initializer_range = 0.02;  ///< standard deviation of the embedding
  bool rescale_prenorm_residual = true;
  std::optional<std::int64_t> n_residuals_per_layer = {};  ///< default: 2 with an MLP, else 1

  static void visit(auto& self, auto&& v) {
    v("initializer_range", self.initializer_range);
    v("rescale_prenorm_residual", self.rescale_prenorm_residual);
    v("n_residuals_per_layer", self.n_residuals_per_layer);
  }
};

struct LRNNLMHeadConfig {
  std::int64_t d_model;
  std::int64_t d_state;
  std::int64_t n_layer;
  std::int64_t vocab_size;
  std::vector<MixerType> mixer_types;  ///< one per layer
  std::int64_t d_intermediate = 0;     ///< 0 disables the MLP
  MixerKwargs mixer_kwargs = {};
  /// Empty, or one per layer: all options of that layer's mixer, in place of mixer_kwargs.
  std::vector<MixerKwargs> mixer_kwargs_per_layer = {};
  std::string mlp_cls = "GatedMLP";  ///< a name in the registry of nn/mlp.hpp
  InitializerConfig initializer_cfg = {};
  double norm_epsilon = 1e-5;
  bool rms_norm = true;  ///< false: LayerNorm
  bool fused_add_norm = true;
  bool residual_in_fp32 = false;
  bool tie_embeddings = true;
  std::int64_t pad_vocab_size_multiple = 8;
  std::optional<DType> dtype = {};  ///< of weights and activations; default float32

  static void visit(auto& self, auto&& v) {
    v("d_model", self.d_model);
    v("d_state", self.d_state);
    v("n_layer", self.n_layer);
    v("vocab_size", self.vocab_size);
    v("d_intermediate", self.d_intermediate);
    v("mlp_cls", self.mlp_cls);
    v("norm_epsilon", self.norm_epsilon);
    v("rms_norm", self.rms_norm);
    v("fused_add_norm", self.fused_add_norm);
    v("residual_in_fp32", self.residual_in_fp32);
    v("tie_embeddings", self.tie_embeddings);
    v("pad_vocab_size_multiple", self.pad_vocab_size_multiple);
  }

  /// @throws ConfigError naming the field, what was expected and what came
  void validate() const;
  /// The same with every default of the used mixers that depends on the model filled in.
  [[nodiscard]] LRNNLMHeadConfig resolve() const;

  [[nodiscard]] const MixerKwargs& layer_kwargs(std::int64_t layer) const;
  [[nodiscard]] MixerBuild mixer_build() const;
  /// vocab_size rounded up to a multiple of pad_vocab_size_multiple.
  [[nodiscard]] std::int64_t padded_vocab_size() const;
  /// Factor on the initial out_proj.weight and fc2.weight: 1 / sqrt(n_residuals n_layer).
  [[nodiscard]] double residual_scale() const;
};

struct ReadConfigOptions {
  /// Used in place of what the text says.
  std::optional<MixerKwargs> mixer_kwargs = {};
  /// Names and shapes of a checkpoint, which determine options that old files lack.
  const std::map<std::string, Shape, std::less<>>* shapes = nullptr;
  /// The text holds arguments of lrnnx's constructor, not a file that came with a checkpoint: S5
  /// with "bilinear" then means this library's system.
  bool constructor_arguments = false;
};

/// A text without this library's format version is lrnnx's: attention is not causal unless it says
/// so, and attention num_heads, S5 discretization and Centaurus sub_state_dim must be given. Also
/// reads the config.json of Mamba-1 checkpoints of mamba_ssm and of Hugging Face `mamba` models.
/// @throws ConfigError naming the field, what was expected and what came
[[nodiscard]] LRNNLMHeadConfig config_from_json(std::string_view text,
                                                const ReadConfigOptions& options = {});
/// Every constructor argument and the format version.
[[nodiscard]] std::string config_to_json(const LRNNLMHeadConfig& config);
/// The options of one mixer from one JSON object, lrnnx's defaults included.
[[nodiscard]] MixerKwargs mixer_kwargs_from_json(MixerType type, std::string_view text);
/// The value of one option as JSON, "" if the mixer has no such option.
[[nodiscard]] std::string mixer_option(MixerType type, const MixerKwargs& kwargs,
                                       const std::string& name);

}  // namespace lrnn
