/// The options that S4 and S4D share, under lrnnx's names.
#pragma once

#include "lrnn/mixers/config.hpp"
#include "lrnn/ops/discretize.hpp"

namespace lrnn {

template <>
struct EnumNames<LaneTransform> {
  static constexpr std::pair<LaneTransform, const char*> table[] = {
      {LaneTransform::Identity, "none"},     {LaneTransform::Exp, "exp"},
      {LaneTransform::Relu, "relu"},         {LaneTransform::Sigmoid, "sigmoid"},
      {LaneTransform::Softplus, "softplus"},
  };
};

enum class S4dDiscretization { Zoh, Bilinear };
template <>
struct EnumNames<S4dDiscretization> {
  static constexpr std::pair<S4dDiscretization, const char*> table[] = {
      {S4dDiscretization::Zoh, "zoh"},
      {S4dDiscretization::Bilinear, "bilinear"},
  };
};

/// Options without an effect on any number are accepted: l_max (the recurrence has infinite memory
/// for every length), verbose, tie_dropout; rank in S4D, beside a check. Options that lrnnx names
/// but that do not work there are accepted with their default only.
template <bool diagonal>
struct StateSpaceConfig {
  std::optional<std::int64_t> d_state = {};  ///< default: the model's; even
  std::int64_t channels = 1;                 ///< read-outs per input
  std::optional<std::int64_t> n_ssm = {};    ///< copies of A, B and P; divides d_model, its default
  std::int64_t rank = 1;                     ///< of the correction P
  std::string init = "legs";                 ///< of A, B and P: see src/mixers/hippo.hpp
  std::optional<double> B_clip = 2.0;        ///< bound on the initial |Im B| of HiPPO matrices
  bool deterministic = false;                ///< initial C and dt without random numbers
  double dt_min = 1e-3;                      ///< dt starts log-uniform in [dt_min, dt_max]
  double dt_max = 1e-1;
  bool dt_tie = true;    ///< one dt per input instead of one per state
  bool dt_fast = false;  ///< dt = dt_transform(sinh(inv_dt))
  LaneTransform dt_transform = LaneTransform::Exp;
  LaneTransform real_transform = LaneTransform::Exp;       ///< of A_real to -Re A
  LaneTransform imag_transform = LaneTransform::Identity;  ///< of A_imag to -Im A
  std::optional<std::int64_t> gate = {};         ///< width of the multiplicative branch, in d_model
  std::optional<std::string> final_act = "glu";  ///< null: no output_linear; else its GELU form
  std::optional<std::string> postact = {};       ///< older name of final_act
  std::optional<S4dDiscretization> disc = {};    ///< S4D alone; default zoh
  std::optional<std::int64_t> l_max = {};
  bool verbose = true;
  bool tie_dropout = false;
  double dropout = 0.0;                         ///< 0
  bool transposed = false;                      ///< false: always [B, L, H]
  std::optional<std::int64_t> bottleneck = {};  ///< null
  bool is_real = false;                         ///< false
  bool swap_channels = false;                   ///< false
  std::optional<double> lr = {};                ///< null
  double wd = 0.0;                              ///< 0

  static void visit(auto& self, auto&& v) {
    v("d_state", self.d_state);
    v("channels", self.channels);
    v("n_ssm", self.n_ssm);
    v("rank", self.rank);
    v("init", self.init);
    v("B_clip", self.B_clip);
    v("deterministic", self.deterministic);
    v("dt_min", self.dt_min);
    v("dt_max", self.dt_max);
    v("dt_tie", self.dt_tie);
    v("dt_fast", self.dt_fast);
    v("dt_transform", self.dt_transform);
    v("real_transform", self.real_transform);
    v("imag_transform", self.imag_transform);
    v("gate", self.gate);
    v("final_act", self.final_act);
    v("postact", self.postact);
    if constexpr (diagonal) v("disc", self.disc);
    v("l_max", self.l_max);
    v("verbose", self.verbose);
    v("tie_dropout", self.tie_dropout);
    v("dropout", self.dropout);
    v("transposed", self.transposed);
    v("bottleneck", self.bottleneck);
    v("is_real", self.is_real);
    v("swap_channels", self.swap_channels);
    v("lr", self.lr);
    v("wd", self.wd);
  }
};

}  // namespace lrnn
