/// The sequence-mixing half of a residual block.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lrnn/nn/parameter.hpp"
#include "lrnn/ops/add_norm.hpp"

namespace lrnn {

/// What a mixer remembers of the past of B sequences: recurrent states, convolution windows, KV.
/// The gradient of a state is another state of the same mixer.
class MixerState {
 public:
  using Visitor = std::function<void(std::string_view name, MutableTensorView tensor)>;

  MixerState() = default;
  MixerState(const MixerState&) = delete;
  MixerState& operator=(const MixerState&) = delete;
  virtual ~MixerState() = default;
  /// Calls `visitor` with every tensor, batch first: used to clear, copy, save and compare states.
  virtual void visit(const Visitor& visitor) = 0;
};

/// What forward() keeps for backward(). Each mixer derives its own struct of named tensors.
struct MixerSaved {
  MixerSaved() = default;
  MixerSaved(const MixerSaved&) = delete;
  MixerSaved& operator=(const MixerSaved&) = delete;
  virtual ~MixerSaved() = default;

  TensorView lengths;  ///< MixerForward::lengths
};

/// Operands of forward(). With keep_for_backward, x, integration_timesteps, position_ids, lengths
/// and state_in must stay alive and unchanged until backward(): mixers keep views of them.
struct MixerForward {
  TensorView x;                           ///< [B, L, H]
  TensorView integration_timesteps = {};  ///< [B, L], float32 (float64), > 0; event mode
  TensorView position_ids = {};           ///< [B, L] int32; rotary attention
  TensorView lengths = {};                ///< [B] int32, 1..L; the rest of a row is padding
  const MixerState* state_in = nullptr;   ///< null: sequences start here
  MutableTensorView y;                    ///< [B, L, H]; zero at padding
  MixerState* state_out = nullptr;        ///< state after the last valid position; may be state_in
                                          ///< when nothing is kept for backward
};

struct MixerBackward {
  TensorView dy;                                  ///< [B, L, H]
  const MixerState* dstate_out = nullptr;         ///< null: zero
  MutableTensorView dx;                           ///< [B, L, H], overwritten
  MutableTensorView dintegration_timesteps = {};  ///< [B, L], accumulated into
  MixerState* dstate_in = nullptr;                ///< overwritten
};

struct MixerStep {
  TensorView x;                           ///< [B, 1, H]
  TensorView integration_timesteps = {};  ///< [B, 1]
  TensorView position_ids = {};           ///< [B, 1] int32
  MutableTensorView y;                    ///< [B, 1, H]
  MixerState& state;                      ///< updated in place
  /// Makes x, if given: its y is x, which may stay unwritten. See ops/add_norm.hpp.
  const AddNormForward* norm = nullptr;
};

/// What a model tells a mixer at construction beside its options.
struct MixerBuild {
  std::int64_t d_model;
  std::int64_t d_state;  ///< the model's; options may override it
  double out_proj_scale =
      1.0;  ///< factor on the initial out_proj.weight: 1/sqrt(n_residuals n_layer)
};

/// A tensor of a checkpoint, in host memory.
struct HostTensor {
  Shape shape;
  std::vector<double> values;
};
/// By state-dict name without the mixer's prefix.
using HostTensors = std::map<std::string, HostTensor, std::less<>>;

/// Stateless apart from its parameters: everything a pass needs to remember is in MixerSaved or
/// MixerState, so that passes on different Contexts may run concurrently.
///
/// The public functions check their operands, and apply the rules of `lengths` that are the same
/// for all mixers: the output is zero and no gradient enters at t >= lengths[b]. What is left to a
/// mixer is to freeze its state there.
class Mixer {
 public:
  explicit Mixer(std::int64_t d_model) : d_model_(d_model) {}
  Mixer(const Mixer&) = delete;
  Mixer& operator=(const Mixer&) = delete;
  virtual ~Mixer() = default;

  /// Returns null unless `keep_for_backward`. @throws ShapeError, DTypeError, DeviceError
  std::unique_ptr<MixerSaved> forward(Context& ctx, const MixerForward& args,
                                      bool keep_for_backward) const;
  /// Accumulates the gradients of the parameters. Frees what `saved` holds as soon as nothing reads
  /// it any more: a saved pass goes backwards once.
  void backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const;
  /// forward() for L = 1 with the state updated in place. Recordable: see Graph.
  void step(Context& ctx, const MixerStep& args) const;

  /// A cleared state for `batch` sequences of activations of `dtype`. `max_seqlen` bounds the KV
  /// cache of attention. A state may hold what step() derives from the parameters, as they are now
  /// or were when forward() last left its state there: make a new one, or run forward(), after they
  /// change.
  [[nodiscard]] virtual std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                               std::int64_t max_seqlen,
                                                               DType dtype) const = 0;
  /// Rewrites tensors of another library's checkpoint into this library's parameters. Called on
  /// loading when the checkpoint has names this mixer has no parameter for (S4's l_kernel); names
  /// that are still unknown afterwards are an error. @throws ConfigError
  virtual void import_tensors(HostTensors& tensors) const { static_cast<void>(tensors); }
  /// Whether integration_timesteps change anything.
  [[nodiscard]] virtual bool uses_integration_timesteps() const noexcept { return false; }
  [[nodiscard]] std::int64_t d_model() const noexcept { return d_model_; }

 private:
  virtual std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                                 bool keep_for_backward) const = 0;
  /// `saved.lengths` holds the lengths of the forward pass, if any.
  virtual void do_backward(Context& ctx, MixerSaved& saved,
                           const MixerBackward& args) const = 0;
  virtual void do_step(Context& ctx, const MixerStep& args) const = 0;
  /// Whether do_step() takes a norm, to hand it to its first op. Otherwise step() runs it before.
  [[nodiscard]] virtual bool takes_norm() const noexcept { return false; }

  std::int64_t d_model_;
};

/// Checked downcasts of what a mixer gets back. @throws InternalError
template <class Saved>
Saved& saved_as(MixerSaved& saved) {
  auto* const s = dynamic_cast<Saved*>(&saved);
  LRNN_CHECK(s != nullptr, InternalError, "activations saved by another kind of mixer");
  return *s;
}
template <class State>
State& state_as(MixerState& state) {
  auto* const s = dynamic_cast<State*>(&state);
  LRNN_CHECK(s != nullptr, InvalidArgument, "state of another kind of mixer");
  return *s;
}
template <class State>
const State& state_as(const MixerState& state) {
  const auto* const s = dynamic_cast<const State*>(&state);
  LRNN_CHECK(s != nullptr, InvalidArgument, "state of another kind of mixer");
  return *s;
}

}  // namespace lrnn
