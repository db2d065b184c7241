/// S4D: one diagonal state-space model per input, then a position-wise map.
///
///   A = -f(A_real) - i f(A_imag),  dt = f(inv_dt),  (a, gamma) of A, dt by `disc` (zoh, bilinear)
///   x_t[h] = a[h] x_{t-1}[h] + u_t[h]                             N/2 complex states per input
///   s_t[c, h] = 2 Re sum_n (gamma B C_c)[h, n] x_t[h, n] + D[c, h] u_t[h]
///   y_t = GELU(output_linear(GELU(GELU(s_t))))
///
/// f are the transforms of the options. Input h uses copy h mod n_ssm of A and B. With `gate`, G:
///   y_t = GELU(output_linear(GELU(output_gate(GELU(s_t)) GELU(input_gate(u_t)))))
/// Without final_act there is no output_linear and no last GELU. The state is kept before gamma B.
/// A, B, C, D and inv_dt are float32 whatever the dtype of the model; the linear layers have that
/// of the model. integration_timesteps have no effect.
///
/// State dict (N2 = N/2): inv_dt [H, 1] or [H, N2]; C [channels, H, N2, 2]; B [1, n_ssm, N2, 2];
/// A_real, A_imag [n_ssm, N2]; D [channels, H]; output_linear.0.{weight,bias};
/// input_gate.0.{weight,bias}; output_gate.{weight,bias}, absent if gate == channels.
/// Paper: Gu et al., arXiv:2206.11893. Matches: lrnnx/models/lti/s4d.py.
#pragma once

#include "lrnn/mixers/mixer.hpp"
#include "lrnn/mixers/state_space_config.hpp"

namespace lrnn {

namespace detail {
class S4Head;
struct LaneRecurrenceParameters;
struct StateSpaceParameters;
}  // namespace detail

using S4dConfig = StateSpaceConfig<true>;

class S4d final : public Mixer {
 public:
  using Config = S4dConfig;
  /// @throws ConfigError
  static S4dConfig resolve(S4dConfig config, const MixerBuild& build);
  S4d(const S4dConfig& config, const MixerBuild& build, const ParameterScope& scope);
  ~S4d() override;

  [[nodiscard]] std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                       std::int64_t max_seqlen,
                                                       DType dtype) const override;

 private:
  struct Saved;

  std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                         bool keep_for_backward) const override;
  void do_backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const override;
  void do_step(Context& ctx, const MixerStep& args) const override;
  [[nodiscard]] detail::LaneRecurrenceParameters recurrence() const;

  S4dConfig config_;
  std::unique_ptr<const detail::StateSpaceParameters> p_;
  std::unique_ptr<const detail::S4Head> head_;
};

}  // namespace lrnn
