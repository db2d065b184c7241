/// S7: an input-dependent recurrence with one state vector shared by all channels.
///
///   x = in_proj(hid),  y = s7_scan(x; x_proj.weight, base_params)   (see ops/s7_scan.hpp)
///   out = sig(gate_proj(gelu(y))) y + hid
///
/// The internal residual "+ hid" on the normed input is part of the mixer. GELU is the exact erf
/// form in both passes. integration_timesteps have no effect.
/// State dict: in_proj.weight [H, H], base_params [N], x_proj.weight [2 H N + H + 2 N, H],
/// gate_proj.weight [H, H].
/// Paper: Soydan et al., arXiv:2410.03464. Matches: lrnnx/models/ltv/s7.py.
#pragma once

#include "lrnn/mixers/config.hpp"
#include "lrnn/mixers/mixer.hpp"
#include "lrnn/nn/linear.hpp"

namespace lrnn {

struct S7Config {
  std::optional<std::int64_t> d_state = {};  ///< default: the model's
  std::int64_t J = 1;                        ///< must divide d_state; no effect on the values
  bool use_fast_path = true;                 ///< accepted, no effect on the numbers

  static void visit(auto& self, auto&& v) {
    v("d_state", self.d_state);
    v("J", self.J);
    v("use_fast_path", self.use_fast_path);
  }
};

class S7 final : public Mixer {
 public:
  using Config = S7Config;
  /// @throws ConfigError
  static S7Config resolve(S7Config config, const MixerBuild& build);
  S7(const S7Config& config, const MixerBuild& build, const ParameterScope& scope);

  [[nodiscard]] std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                       std::int64_t max_seqlen,
                                                       DType dtype) const override;

  struct State final : MixerState {
    Tensor lrnn_state;  // [B, N]
    void visit(const Visitor& visitor) override { visitor("lrnn_state", lrnn_state); }
  };

 private:
  struct Saved final : MixerSaved {
    TensorView hid;       // [B, L, H]  input
    Tensor x;             // [B, L, H]  in_proj output
    Tensor A;             // [B, L, N]
    Tensor s;             // [B, L, N]
    Tensor y;             // [B, L, H]  scan output
    Tensor pre_gate;      // [B, L, H]  gate_proj output
    TensorView state_in;  // [B, N]     if any
  };

  std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                         bool keep_for_backward) const override;
  void do_backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const override;
  void do_step(Context& ctx, const MixerStep& args) const override;
  /// pre_gate = gate_proj(gelu(y)); out = sig(pre_gate) y + hid.
  void gate(Context& ctx, TensorView y, TensorView hid, MutableTensorView pre_gate,
            MutableTensorView out) const;

  std::int64_t dstate_;
  Linear in_proj_;
  Parameter& base_params_;
  Parameter& x_proj_;
  Linear gate_proj_;
};

}  // namespace lrnn
