/// A residual block: Add -> Norm -> Mixer [-> Add -> Norm -> MLP].
///
///   (r, x) = addnorm(h, r);  h = mixer(x);  with an MLP: (r, x) = addnorm2(h, r);  h = mlp(x)
///
/// The last addition is left to the norm of the next block, or to the final norm.
/// Matches: lrnnx/layers/block.py.
#pragma once

#include <memory>

#include "lrnn/mixers/registry.hpp"
#include "lrnn/nn/mlp.hpp"
#include "lrnn/nn/norm.hpp"
#include "lrnn/ops/mamba_stack.hpp"

namespace lrnn {

struct BlockOptions {
  MixerType mixer_type;
  MixerKwargs mixer_kwargs;
  MixerBuild mixer_build;
  AddNorm::Options norm;
  DType residual_dtype = DType::float32;
  std::string mlp_cls = "GatedMLP";
  std::int64_t d_intermediate = 0;  ///< 0: no MLP
};

/// What forward() keeps for backward(). Without keep_for_backward only the residual remains.
struct BlockSaved {
  AddNormOutput norm;
  std::unique_ptr<MixerSaved> mixer;
  AddNormOutput norm2;
  MlpSaved mlp;

  /// The sum that the block leaves to its successor.
  [[nodiscard]] TensorView residual() const {
    return norm2.residual ? norm2.residual.view() : norm.residual.view();
  }
  /// Drops what Block::run_again() makes anew: all but the first norm. Returns the residual that
  /// the block leaves to its successor if it is among what was dropped.
  Tensor keep_first_norm();
};

/// What reaches a block beside the hidden values. Absent operands as in MixerForward.
struct BlockInputs {
  TensorView residual = {};  ///< absent in the first block
  TensorView integration_timesteps = {};
  TensorView position_ids = {};
  TensorView lengths = {};
  MixerState* state = nullptr;  ///< read, then left at the last valid position
};

class Block {
 public:
  Block(const BlockOptions& options, const ParameterScope& scope);

  /// Returns the output of the last layer, [B, L, H]. With keep_for_backward, `inputs` must stay
  /// alive until backward().
  [[nodiscard]] Tensor forward(Context& ctx, Tensor hidden, const BlockInputs& inputs,
                               BlockSaved& saved, bool keep_for_backward) const;
  /// The forward pass once more from saved.norm on, after keep_first_norm().
  void run_again(Context& ctx, const BlockInputs& inputs, BlockSaved& saved) const;
  /// The same for one token, hidden [B, 1, H], with the state updated in place. Recordable.
  [[nodiscard]] Tensor step(Context& ctx, Tensor hidden, const BlockInputs& inputs,
                            BlockSaved& saved) const;
  /// What mamba_stack_step() needs to do this step, if it can.
  [[nodiscard]] std::optional<MambaStackLayer> stack_layer(MixerState& state) const;
  /// `dhidden` and `dresidual` are the gradients of the output and of saved.residual(). Frees what
  /// `saved` holds as it goes.
  [[nodiscard]] AddNormGradients backward(Context& ctx, BlockSaved saved, TensorView dhidden,
                                          TensorView dresidual) const;

  [[nodiscard]] const Mixer& mixer() const noexcept { return *mixer_; }

 private:
  /// From the first norm's output on.
  [[nodiscard]] Tensor mix(Context& ctx, const BlockInputs& inputs, BlockSaved& saved,
                           bool keep_for_backward) const;
  [[nodiscard]] Tensor feed_forward(Context& ctx, Tensor hidden, BlockSaved& saved,
                                    bool keep_for_backward) const;

  AddNorm norm_;
  std::unique_ptr<Mixer> mixer_;
  std::unique_ptr<AddNorm> norm2_;
  std::unique_ptr<Mlp> mlp_;
  DType residual_dtype_;
};

}  // namespace lrnn
