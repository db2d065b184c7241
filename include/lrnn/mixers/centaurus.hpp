/// Centaurus: lanes of M complex sub-states between two tensor contractions.
///
///   a = exp(dt A),  dt = exp(log_delta),  x_t[n, m] = a[n, m] x_{t-1}[n, m] + dt[n] v_t[n]
///   neck       v = B u, y_t = C w_t                    with w_t[n] = sum_m E[n, m] Re x_t[n, m]
///   dws        v = B * u, y_t = C * w_t                one lane per input, N = H
///   full       v[o H + i] = B[o H + i] u[i], y[o] = sum_i C[o H + i] w[o H + i],  N = H^2
///   pointwise  x_t[n, m] = a[n, m] x_{t-1}[n, m] + dt[n] (B u_t)[n M + m],  y_t = C Re x_t
///
/// The input factor is dt whatever `discretization` says. No skip, no nonlinearity. All parameters
/// are float32 whatever the dtype of the model. integration_timesteps have no effect. A is not
/// bounded: lanes with Re A > 0 grow.
///
/// State dict: A [N, M, 2], log_delta [N], E [N, M] (not in pointwise); B [N, H], C [H, N] in neck,
/// [N M, H], [H, N M] in pointwise, [H], [H] in dws, [N], [N] in full.
/// Paper: arXiv:2501.13230. Matches: lrnnx/models/lti/centaurus.py.
#pragma once

#include "lrnn/mixers/config.hpp"
#include "lrnn/mixers/mixer.hpp"

namespace lrnn {

struct LaneParameters;
namespace detail {
struct LaneRecurrenceParameters;
struct LaneRecurrenceGradients;
struct LaneState;
}  // namespace detail

enum class CentaurusMode { Neck, Pointwise, Dws, Full };
template <>
struct EnumNames<CentaurusMode> {
  static constexpr std::pair<CentaurusMode, const char*> table[] = {
      {CentaurusMode::Neck, "neck"},    {CentaurusMode::Pointwise, "pointwise"},
      {CentaurusMode::Pointwise, "pw"}, {CentaurusMode::Pointwise, "s5"},
      {CentaurusMode::Dws, "dws"},      {CentaurusMode::Full, "full"},
  };
};

/// Names that lrnnx accepts. They have no influence on the numbers.
enum class CentaurusDiscretization { Zoh, Bilinear, Dirac, Async, None };
template <>
struct EnumNames<CentaurusDiscretization> {
  static constexpr std::pair<CentaurusDiscretization, const char*> table[] = {
      {CentaurusDiscretization::Zoh, "zoh"},
      {CentaurusDiscretization::Bilinear, "bilinear"},
      {CentaurusDiscretization::Dirac, "dirac"},
      {CentaurusDiscretization::Async, "async"},
      {CentaurusDiscretization::None, "no_discretization"},
  };
};

struct CentaurusConfig {
  std::optional<std::int64_t> d_state = {};  ///< default: the model's; dws: H, full: H^2
  std::int64_t sub_state_dim = 8;            ///< M
  CentaurusMode mode = CentaurusMode::Neck;
  CentaurusDiscretization discretization = CentaurusDiscretization::Zoh;

  static void visit(auto& self, auto&& v) {
    v("d_state", self.d_state);
    v("sub_state_dim", self.sub_state_dim);
    v("mode", self.mode);
    v("discretization", self.discretization);
  }
};

class Centaurus final : public Mixer {
 public:
  using Config = CentaurusConfig;
  /// @throws ConfigError
  static CentaurusConfig resolve(CentaurusConfig config, const MixerBuild& build);
  Centaurus(const CentaurusConfig& config, const MixerBuild& build, const ParameterScope& scope);

  [[nodiscard]] std::unique_ptr<MixerState> make_state(Context& ctx, std::int64_t batch,
                                                       std::int64_t max_seqlen,
                                                       DType dtype) const override;

 private:
  struct Saved;

  std::unique_ptr<MixerSaved> do_forward(Context& ctx, const MixerForward& args,
                                         bool keep_for_backward) const override;
  void do_backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const override;
  void do_step(Context& ctx, const MixerStep& args) const override;

  /// What a step derives from the parameters, of all modes but pointwise.
  void tabulate(Context& ctx, DType dtype, detail::LaneState& state) const;
  [[nodiscard]] bool projects() const;  // whether B and C are matrices
  [[nodiscard]] LaneParameters lanes() const;
  [[nodiscard]] detail::LaneRecurrenceParameters recurrence() const;
  [[nodiscard]] detail::LaneRecurrenceGradients recurrence_gradients() const;
  /// What the lanes are driven by, before dt: B u, or u where B is part of the weights.
  [[nodiscard]] Tensor drive(Context& ctx, const Saved& saved) const;
  void scan(Context& ctx, const MixerForward& args, Saved& saved) const;
  void scan_pointwise(Context& ctx, const MixerForward& args, Saved& saved) const;
  void scan_backward(Context& ctx, const Saved& saved, const MixerBackward& args) const;
  void scan_pointwise_backward(Context& ctx, const Saved& saved, const MixerBackward& args) const;

  CentaurusMode mode_;
  std::int64_t dstate_;     // N
  std::int64_t substates_;  // M
  Parameter& A_;
  Parameter& log_delta_;
  Parameter& B_;
  Parameter& C_;
  Parameter* E_;  // null in pointwise
};

}  // namespace lrnn
