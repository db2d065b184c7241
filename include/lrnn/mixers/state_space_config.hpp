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

/// Initial values of A, B and P: HiPPO matrices, diagonal matrices with spectra like theirs, the
/// same with a random P, and unions that share the copies in equal parts. See src/mixers/hippo.hpp.
enum class StateSpaceInit {
  Legs,
  Legt,
  Fourier,
  DiagLin,
  DiagInv,
  DiagInv2,
  DiagQuad,
  DiagLegs,
  DplrLin,
  DplrInv,
  DplrInv2,
  DplrQuad,
  DplrLegs,
  Hippo,  ///< Legs, Fourier
  Diag,   ///< DiagInv, DiagLin
  All     ///< Legs, Fourier, DiagInv, DiagLin
};
template <>
struct EnumNames<StateSpaceInit> {
  static constexpr std::pair<StateSpaceInit, const char*> table[] = {
      {StateSpaceInit::Legs, "legs"},          {StateSpaceInit::Legt, "legt"},
      {StateSpaceInit::Fourier, "fourier"},    {StateSpaceInit::Fourier, "fout"},
      {StateSpaceInit::DiagLin, "diag-lin"},   {StateSpaceInit::DiagLin, "diag-linear"},
      {StateSpaceInit::DiagInv, "diag-inv"},   {StateSpaceInit::DiagInv, "diag-inverse"},
      {StateSpaceInit::DiagInv2, "diag-inv2"}, {StateSpaceInit::DiagInv2, "diag-inverse2"},
      {StateSpaceInit::DiagQuad, "diag-quad"}, {StateSpaceInit::DiagQuad, "diag-quadratic"},
      {StateSpaceInit::DiagLegs, "diag-legs"}, {StateSpaceInit::DiagLegs, "diag-hippo"},
      {StateSpaceInit::DplrLin, "dplr-lin"},   {StateSpaceInit::DplrLin, "dplr-linear"},
      {StateSpaceInit::DplrInv, "dplr-inv"},   {StateSpaceInit::DplrInv, "dplr-inverse"},
      {StateSpaceInit::DplrInv2, "dplr-inv2"}, {StateSpaceInit::DplrInv2, "dplr-inverse2"},
      {StateSpaceInit::DplrQuad, "dplr-quad"}, {StateSpaceInit::DplrQuad, "dplr-quadratic"},
      {StateSpaceInit::DplrLegs, "dplr-legs"}, {StateSpaceInit::DplrLegs, "dplr-hippo"},
      {StateSpaceInit::DplrLegs, "dplr"},      {StateSpaceInit::Hippo, "hippo"},
      {StateSpaceInit::Diag, "diag"},          {StateSpaceInit::All, "all"},
  };
};

/// Names that lrnnx takes for `final_act`. Each of them means output_linear and GELU there and
/// here.
enum class FinalActivation {
  Glu,
  Gelu,
  Relu,
  Tanh,
  Sigmoid,
  Silu,
  Swish,
  Elu,
  Softplus,
  Sqrelu,
  Modrelu,
  Ln,
  Id,
  Identity,
  Linear
};
template <>
struct EnumNames<FinalActivation> {
  static constexpr std::pair<FinalActivation, const char*> table[] = {
      {FinalActivation::Glu, "glu"},
      {FinalActivation::Gelu, "gelu"},
      {FinalActivation::Relu, "relu"},
      {FinalActivation::Tanh, "tanh"},
      {FinalActivation::Sigmoid, "sigmoid"},
      {FinalActivation::Silu, "silu"},
      {FinalActivation::Swish, "swish"},
      {FinalActivation::Elu, "elu"},
      {FinalActivation::Softplus, "softplus"},
      {FinalActivation::Sqrelu, "sqrelu"},
      {FinalActivation::Modrelu, "modrelu"},
      {FinalActivation::Ln, "ln"},
      {FinalActivation::Id, "id"},
      {FinalActivation::Identity, "identity"},
      {FinalActivation::Linear, "linear"},
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
  StateSpaceInit init = StateSpaceInit::Legs;  ///< of A, B and P
  std::optional<double> B_clip = 2.0;          ///< bound on the initial |Im B| of HiPPO matrices
  bool deterministic = false;                  ///< initial C and dt without random numbers
  double dt_min = 1e-3;                        ///< dt starts log-uniform in [dt_min, dt_max]
  double dt_max = 1e-1;
  bool dt_tie = true;    ///< one dt per input instead of one per state
  bool dt_fast = false;  ///< dt = dt_transform(sinh(inv_dt))
  LaneTransform dt_transform = LaneTransform::Exp;
  LaneTransform real_transform = LaneTransform::Exp;       ///< of A_real to -Re A
  LaneTransform imag_transform = LaneTransform::Identity;  ///< of A_imag to -Im A
  std::optional<std::int64_t> gate = {};  ///< width of the multiplicative branch, in d_model
  std::optional<FinalActivation> final_act = FinalActivation::Glu;  ///< null: no output_linear
  std::optional<FinalActivation> postact = {};                      ///< older name of final_act
  std::optional<S4dDiscretization> disc = {};                       ///< S4D alone; default zoh
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
