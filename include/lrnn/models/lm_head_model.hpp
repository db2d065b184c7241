/// Embedding, a stack of residual blocks, a language-modelling head.
///
///   h = embedding[ids];  every block: see nn/block.hpp;  x = norm_f(h + r);  logits = x W_head^T
///
/// Matches: lrnnx/architectures/language_model.py (LRNNLMHeadModel).
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "lrnn/models/inference_cache.hpp"
#include "lrnn/models/lm_config.hpp"
#include "lrnn/nn/block.hpp"

namespace lrnn {

namespace detail {
class Checkpoint;  // see src/io/checkpoint.hpp
}

struct ModelOptions {
  /// float32, bfloat16, or on the CPU float64. Default: that of the configuration. bfloat16 on the
  /// CPU rounds the embedding, the head and the matrices of linear layers, once, as they are
  /// stored; all else (biases, convolutions, norms, recurrences, activations, states) is float32.
  /// Such a model serves inference: training is a DTypeError.
  std::optional<DType> dtype = {};
  std::uint64_t seed = 0;
};

struct PretrainedOptions {
  std::optional<DType> dtype = {};  ///< default: that of config.json, else float32
  /// In place of what config.json says, for checkpoints of lrnnx, which do not save them.
  std::optional<MixerKwargs> mixer_kwargs = {};
};

struct SaveOptions {
  /// Also writes the names that only lrnnx's strict loader asks for: a tied lm_head.weight and the
  /// doubled `layer.kernel.*` of S4 and S4D.
  bool lrnnx_names = false;
};

struct CacheOptions {
  std::int64_t batch_size;
  std::int64_t max_seqlen;
};

struct ForwardOptions {
  std::int64_t num_last_tokens = 0;  ///< logits of the last n positions only; 0: of all
  /// Logits of the last valid position of every sequence only, [B, 1, V]. With lengths, needs
  /// `validate`.
  bool last_valid_token = false;
  TensorView integration_timesteps = {};  ///< [B, L], any float dtype, > 0
  TensorView lengths = {};                ///< [B] int32, 1..L; the rest of a row is padding
  TensorView position_ids = {};           ///< [B, L] int32 or int64; rotary attention
  InferenceCache* cache = nullptr;  ///< prefill: read first, then left at the last valid token
  std::vector<std::int64_t> layer_outputs = {};  ///< layers whose outputs are returned as well
  /// With a backward pass: the first n blocks keep only what their first norm left and run again
  /// from there in the backward pass. Saves their memory, costs their time, changes no bit.
  std::int64_t recompute_blocks = 0;
  /// Whether to copy ids, lengths and timesteps to the host and check them. Without it the call is
  /// recordable (see Graph), needs int32 ids, and bad values are undefined behaviour.
  bool validate = true;
};

struct StepOptions {
  TensorView integration_timesteps = {};         ///< [B] or [B, 1]
  TensorView position_ids = {};                  ///< [B] or [B, 1]; default: the tokens seen before
  std::vector<std::int64_t> layer_outputs = {};  ///< as in ForwardOptions
  bool validate = true;                          ///< as in ForwardOptions
};

struct CausalLMOutput {
  Tensor logits;
  /// For every entry of ForwardOptions::layer_outputs, the residual stream that the layer leaves
  /// behind, [B, L, H] of all positions, rounded as it is stored. Values at padding mean nothing.
  std::vector<Tensor> layer_outputs = {};
};

struct EncoderOutput {
  Tensor hidden;                           ///< output of the final norm, [B, L, H]
  std::vector<Tensor> layer_outputs = {};  ///< as in CausalLMOutput
};

class LRNNLMHeadModel {
 public:
  /// @throws ConfigError naming the field
  LRNNLMHeadModel(Context& ctx, LRNNLMHeadConfig config, const ModelOptions& options = {});
  /// Reads config.json and model.safetensors (or the files named by model.safetensors.index.json)
  /// as written by save_pretrained or exported from lrnnx.
  /// @throws ConfigError, IoError naming file, tensor or field, what was expected and what came
  static LRNNLMHeadModel from_pretrained(Context& ctx, const std::filesystem::path& directory,
                                         const PretrainedOptions& options = {});
  /// A model of `config` with the tensors of one file.
  static LRNNLMHeadModel from_safetensors(Context& ctx, LRNNLMHeadConfig config,
                                          const std::filesystem::path& file);
  /// The same for a file that is open or in memory.
  static LRNNLMHeadModel from_safetensors(Context& ctx, LRNNLMHeadConfig config,
                                          SafetensorsFile file);
  /// Writes config.json and model.safetensors; each file appears when both are complete, and a
  /// write that fails leaves the folder as it was. The folder may be one that a model was loaded
  /// from.
  void save_pretrained(Context& ctx, const std::filesystem::path& directory,
                       const SaveOptions& options = {}) const;

  /// input_ids: [B, L] int32 or int64. Returns logits [B, L, V]; V is vocab_size, without padding
  /// columns.
  /// @throws ShapeError, DTypeError, InvalidArgument (token ids, lengths, timesteps, cache)
  [[nodiscard]] CausalLMOutput forward(Context& ctx, TensorView input_ids,
                                       const ForwardOptions& options = {}) const;
  /// input_ids: [B, 1]. Returns logits [B, 1, V].
  [[nodiscard]] CausalLMOutput step(Context& ctx, TensorView input_ids, InferenceCache& cache,
                                    const StepOptions& options = {}) const;
  [[nodiscard]] InferenceCache allocate_inference_cache(Context& ctx,
                                                        const CacheOptions& options) const;

  /// The model without its head, as an encoder of sequences. num_last_tokens and last_valid_token
  /// select positions of `hidden` as they do for logits; last_valid_token gives one vector per
  /// sequence, [B, 1, H].
  [[nodiscard]] EncoderOutput encode(Context& ctx, TensorView input_ids,
                                     const ForwardOptions& options = {}) const;
  class Encoding;
  /// The same at all positions, with what backward() needs. Operands in `options` must stay alive
  /// until then.
  [[nodiscard]] Encoding encode_for_backward(Context& ctx, TensorView input_ids,
                                             const ForwardOptions& options = {});
  /// dhidden: [B, L, H], the gradient of encoding.hidden(). Gradients accumulate into parameters().
  /// @throws InvalidArgument if `encoding` was used before
  void backward(Context& ctx, Encoding encoding, TensorView dhidden);

  /// Mean cross-entropy over the targets that count, [] float32 (float64).
  /// targets: [B, L] int32 or int64, each in [0, V) or kIgnoreIndex. Positions at or beyond lengths
  /// do not count.
  [[nodiscard]] Tensor loss(Context& ctx, TensorView input_ids, TensorView targets,
                            const ForwardOptions& options = {}) const;
  /// The same, and backward: gradients accumulate into parameters().
  [[nodiscard]] Tensor loss_and_backward(Context& ctx, TensorView input_ids, TensorView targets,
                                         const ForwardOptions& options = {});

  [[nodiscard]] ParameterStore& parameters() const noexcept { return *parameters_; }
  /// With every default filled in.
  [[nodiscard]] const LRNNLMHeadConfig& config() const noexcept { return config_; }
  [[nodiscard]] DType dtype() const noexcept { return *config_.dtype; }
  /// That of logits and hidden values: dtype(), but float32 for bfloat16 on the CPU.
  [[nodiscard]] DType activation_dtype() const noexcept { return activation_dtype_; }
  [[nodiscard]] bool uses_integration_timesteps() const noexcept;
  [[nodiscard]] const Mixer& mixer(std::size_t layer) const { return blocks_.at(layer).mixer(); }

 private:
  struct Inputs;
  struct Saved;

  /// Adds the parameters; materialize() is left to the caller.
  LRNNLMHeadModel(const Device& device, LRNNLMHeadConfig config);
  /// @throws ConfigError if the device does not compute in the model's dtype
  void check_dtype(const Device& device) const;
  void load(Context& ctx, detail::Checkpoint&& checkpoint);

  [[nodiscard]] Inputs prepare(Context& ctx, const char* op, TensorView input_ids,
                               const ForwardOptions& options) const;
  [[nodiscard]] Inputs prepare_with_targets(Context& ctx, const char* op, TensorView input_ids,
                                            TensorView targets,
                                            const ForwardOptions& options) const;
  void check_timesteps(Context& ctx, const char* op, TensorView tau, TensorView lengths) const;
  [[nodiscard]] Tensor embed(Context& ctx, TensorView ids) const;
  /// Returns norm_f's output [B, L, H]; fills `saved` unless null.
  [[nodiscard]] EncoderOutput hidden_states(Context& ctx, const Inputs& inputs, Saved* saved,
                                            const ForwardOptions& options) const;
  /// From the gradients of norm_f's operands to that of the embedding. Frees what `saved` holds.
  void backward_blocks(Context& ctx, Saved& saved, AddNormGradients gradients);
  /// Blocks from `begin` on that mamba_stack_step() takes together.
  [[nodiscard]] std::vector<MambaStackLayer> stack_from(std::size_t begin,
                                                        const InferenceCache& cache) const;
  /// Block::step of all of them.
  [[nodiscard]] Tensor step_stack(Context& ctx, std::span<const MambaStackLayer> layers,
                                  TensorView hidden, TensorView residual, BlockSaved& saved) const;
  [[nodiscard]] Tensor head(Context& ctx, TensorView x) const;
  /// Logits [T, V] of x [T, H] by products of aligned width.
  void aligned_head(Context& ctx, TensorView x, MutableTensorView logits) const;
  /// The mean loss of normalised hidden values. Unless dx is absent, also the gradients of x, which
  /// may be overwritten with them, and of the head.
  [[nodiscard]] Tensor head_loss(Context& ctx, TensorView x, TensorView targets, TensorView lengths,
                                 MutableTensorView dx) const;

  LRNNLMHeadConfig config_;
  DType activation_dtype_ = DType::float32;
  std::unique_ptr<ParameterStore> parameters_;
  Parameter* embedding_ = nullptr;
  std::vector<Block> blocks_;
  std::optional<AddNorm> norm_f_;
  Parameter* head_ = nullptr;  ///< the embedding when tied
};

/// Hidden values and what their backward pass needs; serves one backward pass.
class LRNNLMHeadModel::Encoding {
 public:
  [[nodiscard]] TensorView hidden() const noexcept { return hidden_; }  ///< [B, L, H]
  [[nodiscard]] const std::vector<Tensor>& layer_outputs() const noexcept { return layer_outputs_; }

 private:
  friend class LRNNLMHeadModel;

  Tensor hidden_;
  std::vector<Tensor> layer_outputs_;
  std::shared_ptr<Saved> saved_;
};

}  // namespace lrnn
