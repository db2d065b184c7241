/// S5: one complex diagonal state-space model with H inputs and H outputs.
///
///   A = -softplus(A[:, 0]) + i A[:, 1],  dt = exp(log_dt),  (a, gamma) of A, dt by discretization
///   x_t = a x_{t-1} + gamma B u_t,       y_t = Re((C[..., 0] + i C[..., 1]) x_t) + u_t D
///
/// With `event` and integration_timesteps tau, a is that of the step tau_t dt (gamma stays that of
/// dt). Bilinear is the stable (1 + z/2) / (1 - z/2). N complex states, no conjugate pairs, no
/// nonlinearity. All parameters are float32 whatever the dtype of the model.
/// State dict: A [N, 2], B [N, H] (real), log_dt [N], C [H, N, 2], D [H, H] (dense, [in, out]).
/// Papers: arXiv:2208.04933 (S5), arXiv:2404.18508 (event form).
/// Matches: lrnnx/models/lti/s5.py, except for the sign of its bilinear form.
#pragma once

#include "lrnn/mixers/config.hpp"
#include "lrnn/mixers/mixer.hpp"

namespace lrnn {
namespace detail {
struct DiagonalTables;
}

struct LaneParameters;

enum class S5Discretization { Zoh, Bilinear, Dirac, None };
template <>
struct EnumNames<S5Discretization> {
  static constexpr std::pair<S5Discretization, const char*> table[] = {
      {S5Discretization::Zoh, "zoh"},
      {S5Discretization::Bilinear, "bilinear"},
      {S5Discretization::Dirac, "dirac"},
      {S5Discretization::None, "no_discretization"},
  };
};

struct S5Config {
  std::optional<std::int64_t> d_state = {};  ///< default: the model's
  S5Discretization discretization = S5Discretization::Zoh;
  double dt_min = 1e-3;   ///< exp(log_dt) starts log-uniformly spaced from dt_min
  double dt_max = 1e-1;   ///< to dt_max
  bool event = false;     ///< use integration_timesteps where they are given
  bool conj_sym = false;  ///< true is an error: states come without their conjugates

  static void visit(auto& self, auto&& v) {
    v("d_state", self.d_state);
    v("discretization", self.discretization);
    v("dt_min", self.dt_min);
    v("dt_max", self.dt_max);
    v("event", self.event);
    v("conj_sym", self.conj_sym);
  }
};

class S5 final : public Mixer {
 public:
  using Config = S5Config;
  /// @throws ConfigError
  static S5Config resolve(S5Config config, const MixerBuild& build);
  S5(const S5Config& config, const MixerBuild& build, const ParameterScope& scope);

  [[nodiscard]] std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                       std::int64_t max_seqlen,
                                                       DType dtype) const override;
  [[nodiscard]] bool uses_integration_timesteps() const noexcept override { return event_; }

 private:
  struct Saved;

  std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                         bool keep_for_backward) const override;
  void do_backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const override;
  void do_step(Context& ctx, const MixerStep& args) const override;
  [[nodiscard]] bool takes_norm() const noexcept override { return !event_; }
  [[nodiscard]] LaneParameters lanes() const;
  /// What a step derives from the parameters, allocated if need be.
  void tabulate(Context& ctx, DType dtype, detail::DiagonalTables& tables) const;
  /// C as a real matrix.
  void read_out(Context& ctx, MutableTensorView C) const;
  /// B u, the drive before gamma: [B, L, N].
  [[nodiscard]] Tensor drive(Context& ctx, const Saved& saved) const;

  std::int64_t dstate_;
  S5Discretization discretization_;
  bool event_;
  Parameter& A_;
  Parameter& B_;
  Parameter& log_dt_;
  Parameter& C_;
  Parameter& D_;
};

}  // namespace lrnn
