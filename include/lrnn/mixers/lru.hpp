/// Linear Recurrent Unit.
///
///   lambda = exp(-exp(nu_log) + i exp(theta_log))
///   x_t = lambda x_{t-1} + exp(gamma_log) (B_re + i B_im) u_t
///   y_t = Re((C_re + i C_im) x_t) + D u_t
///
/// N complex states, no conjugate pairs, no nonlinearity. All parameters are float32 whatever the
/// dtype of the model. integration_timesteps have no effect.
/// State dict: nu_log, theta_log, gamma_log [N], B_re, B_im [N, H], C_re, C_im [H, N], D [H].
/// Paper: Orvieto et al., arXiv:2303.06349. Matches: lrnnx/models/lti/lru.py.
#pragma once

#include "lrnn/mixers/config.hpp"
#include "lrnn/mixers/mixer.hpp"

namespace lrnn {
namespace detail {
struct DiagonalTables;
}

struct LaneParameters;

struct LruConfig {
  std::optional<std::int64_t> d_state = {};  ///< default: the model's
  double r_min = 0.0;                        ///< |lambda|^2 starts uniform in [r_min^2, r_max^2]
  double r_max = 1.0;
  double max_phase = 6.283185307179586;  ///< the angle of lambda starts in (0, max_phase), radians

  static void visit(auto& self, auto&& v) {
    v("d_state", self.d_state);
    v("r_min", self.r_min);
    v("r_max", self.r_max);
    v("max_phase", self.max_phase);
  }
};

class Lru final : public Mixer {
 public:
  using Config = LruConfig;
  /// @throws ConfigError
  static LruConfig resolve(LruConfig config, const MixerBuild& build);
  Lru(const LruConfig& config, const MixerBuild& build, const ParameterScope& scope);

  [[nodiscard]] std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                       std::int64_t max_seqlen,
                                                       DType dtype) const override;

 private:
  struct Saved;

  /// `decay` carries the initial -log |lambda| from nu_log to gamma_log.
  Lru(const LruConfig& config, const MixerBuild& build, const ParameterScope& scope,
      const std::shared_ptr<std::vector<double>>& decay);

  std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                         bool keep_for_backward) const override;
  void do_backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const override;
  void do_step(Context& ctx, const MixerStep& args) const override;
  [[nodiscard]] bool takes_norm() const noexcept override { return true; }
  [[nodiscard]] LaneParameters lanes() const;
  /// What a step derives from the parameters, allocated if need be.
  void tabulate(Context& ctx, DType dtype, detail::DiagonalTables& tables) const;
  /// B and C as real matrices.
  void project_weights(Context& ctx, MutableTensorView B, MutableTensorView C) const;
  /// B u, the drive before gamma: [B, L, 2, N].
  [[nodiscard]] Tensor drive(Context& ctx, const Saved& saved) const;

  std::int64_t dstate_;
  Parameter& nu_log_;
  Parameter& theta_log_;
  Parameter& B_re_;
  Parameter& B_im_;
  Parameter& C_re_;
  Parameter& C_im_;
  Parameter& D_;
  Parameter& gamma_log_;
};

}  // namespace lrnn
