/// S4: one state-space model per input whose transition is diagonal plus rank R, then a
/// position-wise map.
///
///   Lambda = -f(A_real) - i f(A_imag),  A = diag(Lambda) - sum_r P_r P_r^*,  tau = 2 / f(inv_dt)
///   (tau - A) x_t[h] = (tau + A) x_{t-1}[h] + 2 B u_t[h]           N/2 complex states per input
///   s_t[c, h] = 2 Re sum_n C_c[h, n] x_t[h, n] + D[c, h] u_t[h]
///   y_t = GELU(output_linear(GELU(GELU(s_t))))
///
/// f are the transforms of the options. Input h uses copy h mod n_ssm of A, P and B. With `gate`:
///   y_t = GELU(output_linear(GELU(output_gate(GELU(s_t)) GELU(input_gate(u_t)))))
/// Without final_act there is no output_linear and no last GELU. A, B, C, D, P and inv_dt are
/// float32 whatever the dtype of the model; the linear layers have that of the model.
/// integration_timesteps have no effect.
///
/// C is the read-out of the states at every length. lrnnx stores C (I - M^K) instead once it has
/// run, with the transition M and K = l_kernel; such a C is converted on load.
///
/// State dict (N2 = N/2): inv_dt [H, 1] or [H, N2]; C [channels, H, N2, 2]; B [1, n_ssm, N2, 2];
/// P [rank, n_ssm, N2, 2]; A_real, A_imag [n_ssm, N2]; D [channels, H];
/// output_linear.0.{weight,bias}; input_gate.0.{weight,bias}; output_gate.{weight,bias}, absent if
/// gate == channels.
/// Paper: Gu et al., arXiv:2111.00396. Matches: lrnnx/models/lti/s4.py.
#pragma once

#include "lrnn/mixers/mixer.hpp"
#include "lrnn/mixers/state_space_config.hpp"

namespace lrnn {

struct DplrParameters;
namespace detail {
class S4Head;
struct StateSpaceParameters;
}  // namespace detail

using S4Config = StateSpaceConfig<false>;

class S4 final : public Mixer {
 public:
  using Config = S4Config;
  /// @throws ConfigError
  static S4Config resolve(S4Config config, const MixerBuild& build);
  S4(const S4Config& config, const MixerBuild& build, const ParameterScope& scope);
  ~S4() override;

  [[nodiscard]] std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                       std::int64_t max_seqlen,
                                                       DType dtype) const override;
  void import_tensors(HostTensors& tensors) const override;

 private:
  struct Saved;
  struct Values {
    TensorView A_real;
    TensorView A_imag;
    TensorView inv_dt;
    TensorView P;
    TensorView B;
  };

  std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                         bool keep_for_backward) const override;
  void do_backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const override;
  void do_step(Context& ctx, const MixerStep& args) const override;
  [[nodiscard]] DplrParameters transition(const Values& values) const;
  [[nodiscard]] DplrParameters transition() const;

  S4Config config_;
  std::unique_ptr<const detail::StateSpaceParameters> p_;
  std::unique_ptr<const detail::S4Head> head_;
};

}  // namespace lrnn
