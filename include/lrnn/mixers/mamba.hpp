/// Mamba: a gated block around the selective scan.
///
///   [u0 | z] = in_proj(x),  u = silu(conv1d(u0)),  [q | B | C] = u x_proj^T,  dt = q dt_proj^T
///   y = selective_scan(u, dt, A_log, B, C, D, z)   (see ops/selective_scan.hpp)
///   out = out_proj(y)
///
/// State dict: A_log [E, N], D [E], in_proj.weight [2 E, H] (.bias), conv1d.weight [E, 1, K]
/// (.bias), x_proj.weight [R + 2 N, E], dt_proj.weight [E, R], dt_proj.bias [E],
/// dtA_proj.weight [E, R] (used nowhere; kept for checkpoints), dtA_proj.bias [E] (event mode),
/// out_proj.weight [H, E] (.bias). A_log, D and the dt biases are float32 always.
/// Paper: Gu and Dao, arXiv:2312.00752. Matches: lrnnx/models/ltv/mamba.py.
#pragma once

#include "lrnn/mixers/config.hpp"
#include "lrnn/mixers/mixer.hpp"
#include "lrnn/nn/linear.hpp"
#include "lrnn/ops/mamba_stack.hpp"
#include "lrnn/ops/selective_scan.hpp"

namespace lrnn {

template <>
struct EnumNames<SelectiveDiscretization> {
  static constexpr std::pair<SelectiveDiscretization, const char*> table[] = {
      {SelectiveDiscretization::Mamba, "mamba"},
      {SelectiveDiscretization::Zoh, "zoh"},
      {SelectiveDiscretization::Bilinear, "bilinear"},
      {SelectiveDiscretization::Dirac, "dirac"},
  };
};

enum class MambaDtInit { Random, Constant };
template <>
struct EnumNames<MambaDtInit> {
  static constexpr std::pair<MambaDtInit, const char*> table[] = {
      {MambaDtInit::Random, "random"},
      {MambaDtInit::Constant, "constant"},
  };
};

struct MambaConfig {
  std::optional<std::int64_t> d_state = {};  ///< N; default: the model's
  std::int64_t d_conv = 4;                   ///< K
  double expand = 2.0;                       ///< E = int(expand d_model)
  std::optional<std::int64_t> dt_rank = {};  ///< R; default: ceil(d_model / 16)
  double dt_min = 1e-3;                      ///< of the initial delta
  double dt_max = 0.1;
  MambaDtInit dt_init = MambaDtInit::Random;
  double dt_scale = 1.0;
  double dt_init_floor = 1e-4;
  bool conv_bias = true;
  bool bias = false;
  bool use_fast_path = true;  ///< accepted, no effect on the numbers
  SelectiveDiscretization discretization = SelectiveDiscretization::Mamba;

  static void visit(auto& self, auto&& v) {
    v("d_state", self.d_state);
    v("d_conv", self.d_conv);
    v("expand", self.expand);
    v("dt_rank", self.dt_rank);
    v("dt_min", self.dt_min);
    v("dt_max", self.dt_max);
    v("dt_init", self.dt_init);
    v("dt_scale", self.dt_scale);
    v("dt_init_floor", self.dt_init_floor);
    v("conv_bias", self.conv_bias);
    v("bias", self.bias);
    v("use_fast_path", self.use_fast_path);
    v("discretization", self.discretization);
  }
};

class Mamba final : public Mixer {
 public:
  using Config = MambaConfig;
  /// @throws ConfigError
  static MambaConfig resolve(MambaConfig config, const MixerBuild& build);
  Mamba(const MambaConfig& config, const MixerBuild& build, const ParameterScope& scope);

  [[nodiscard]] std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                       std::int64_t max_seqlen,
                                                       DType dtype) const override;
  [[nodiscard]] bool uses_integration_timesteps() const noexcept override { return true; }

  /// What mamba_stack_step() needs for a step of `state`, without the norm; nothing if the options
  /// are not those that it knows. Event mode is not.
  [[nodiscard]] std::optional<MambaStackLayer> stack_layer(MixerState& state) const;

  struct State final : MixerState {
    Tensor conv_state;  // [B, E, K]
    Tensor lrnn_state;  // [B, E, N]
    void visit(const Visitor& visitor) override {
      visitor("conv_state", conv_state);
      visitor("lrnn_state", lrnn_state);
    }
  };

 private:
  struct Saved final : MixerSaved {
    TensorView x;                      // [B, L, H]
    TensorView integration_timesteps;  // [B, L]
    const State* state_in = nullptr;
    Tensor xz;            // [B, L, 2 E]      in_proj output: u0 and z
    Tensor x_dbl;         // [B, L, R + 2 N]  q, B, C
    Tensor y;             // [B, L, E]          scan output, for the gradient of out_proj
    Tensor chunk_states;  // [B, chunks, E, N]
  };

  std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                         bool keep_for_backward) const override;
  void do_backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const override;
  void do_step(Context& ctx, const MixerStep& args) const override;
  [[nodiscard]] bool takes_norm() const noexcept override { return true; }

  /// u = silu(conv1d(u0)) from the stored projection.
  void convolve(Context& ctx, TensorView xz, TensorView lengths, const State* state_in,
                MutableTensorView u, MutableTensorView state_out) const;
  [[nodiscard]] SelectiveScanInputs scan_inputs(TensorView u, TensorView dt, TensorView xz,
                                                TensorView x_dbl, TensorView tau) const;
  [[nodiscard]] TensorView conv_weight() const;
  [[nodiscard]] TensorView conv_bias() const;

  SelectiveDiscretization discretization_;
  std::int64_t inner_, dstate_, dt_rank_, d_conv_;
  Linear in_proj_;
  Parameter& conv_weight_;
  Parameter* conv_bias_;
  Linear x_proj_;
  Parameter& dt_weight_;
  Parameter& dt_bias_;
  Parameter& dtA_bias_;
  Parameter& A_log_;
  Parameter& D_;
  Linear out_proj_;
};

}  // namespace lrnn
