/// RGLRU: the recurrent block of Griffin, a gated branch around a real-gated linear recurrent unit.
///
///   G = gelu(gate_proj(x)),  w = conv1d(in_proj(x))
///   h = rglru_scan(w; recurrent_gate_proj(w), input_gate_proj(w), a_log)   (ops/rglru_scan.hpp)
///   out = out_proj(G h)
///
/// GELU is the exact erf form; the convolution has no activation; the first token is scaled by
/// sqrt(1 - a^2) like every other. integration_timesteps have no effect.
/// State dict: a_log [E, 1] (float32 always), gate_proj.weight and in_proj.weight [E, H] (.bias),
/// conv1d.weight [E, 1, K] (.bias), recurrent_gate_proj.weight and input_gate_proj.weight [E, E]
/// with .bias [E] always, out_proj.weight [H, E] (.bias).
/// Paper: De et al., "Griffin", arXiv:2402.19427. Matches: lrnnx/models/ltv/rglru.py, except that
/// the initial sig(a_log) is a ~ U(a_init_range) as the paper has it.
#pragma once

#include <array>

#include "lrnn/mixers/config.hpp"
#include "lrnn/mixers/mixer.hpp"
#include "lrnn/nn/linear.hpp"
#include "lrnn/ops/rglru_scan.hpp"

namespace lrnn {

struct RglruConfig {
  std::optional<std::int64_t> d_state = {};  ///< accepted, no effect: one state per channel
  std::int64_t d_conv = 4;                   ///< K
  double expand = 1.0;                       ///< E = int(expand d_model)
  double c = 8.0;                            ///< exponent of the multiplier at r = 1
  std::array<double, 2> a_init_range = {0.9, 0.999};  ///< of the initial sig(a_log)
  bool conv_bias = true;
  bool bias = false;
  bool use_fast_path = true;  ///< accepted, no effect on the numbers

  static void visit(auto& self, auto&& v) {
    v("d_state", self.d_state);
    v("d_conv", self.d_conv);
    v("expand", self.expand);
    v("c", self.c);
    v("a_init_range", self.a_init_range);
    v("conv_bias", self.conv_bias);
    v("bias", self.bias);
    v("use_fast_path", self.use_fast_path);
  }
};

class Rglru final : public Mixer {
 public:
  using Config = RglruConfig;
  /// @throws ConfigError
  static RglruConfig resolve(RglruConfig config, const MixerBuild& build);
  Rglru(const RglruConfig& config, const MixerBuild& build, const ParameterScope& scope);

  [[nodiscard]] std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                       std::int64_t max_seqlen,
                                                       DType dtype) const override;

  struct State final : MixerState {
    Tensor conv_state;  // [B, E, K]
    Tensor lrnn_state;  // [B, E, 1]
    void visit(const Visitor& visitor) override {
      visitor("conv_state", conv_state);
      visitor("lrnn_state", lrnn_state);
    }
  };

 private:
  struct Saved final : MixerSaved {
    TensorView x;  // [B, L, H]
    const State* state_in = nullptr;
    Tensor pre_gate;      // [B, L, E]  gate_proj output
    Tensor u;             // [B, L, E]  in_proj output
    Tensor pre_r;         // [B, L, E]  recurrent_gate_proj output
    Tensor pre_i;         // [B, L, E]  input_gate_proj output
    Tensor h;             // [B, L, E]
    Tensor chunk_states;  // [B, chunks, E]
  };

  std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                         bool keep_for_backward) const override;
  void do_backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const override;
  void do_step(Context& ctx, const MixerStep& args) const override;
  [[nodiscard]] bool takes_norm() const noexcept override { return true; }

  /// w = conv1d(u) and, unless absent, the window after it.
  void convolve(Context& ctx, TensorView u, TensorView lengths, const State* state_in,
                MutableTensorView w, MutableTensorView state_out) const;
  [[nodiscard]] RglruScanInputs scan_inputs(TensorView w, TensorView pre_r, TensorView pre_i) const;
  [[nodiscard]] TensorView conv_weight() const;
  [[nodiscard]] TensorView conv_bias() const;
  /// [B, E, 1] as the [B, E] of the scan.
  template <class View>
  [[nodiscard]] View scan_state(View state) const {
    return state ? state.reshape({state.dim(0), inner_}) : View();
  }

  std::int64_t inner_, d_conv_;
  double c_;
  Parameter& a_log_;
  Linear gate_proj_;
  Linear in_proj_;
  Parameter& conv_weight_;
  Parameter* conv_bias_;
  Linear recurrent_gate_proj_;
  Linear input_gate_proj_;
  Linear out_proj_;
};

}  // namespace lrnn
