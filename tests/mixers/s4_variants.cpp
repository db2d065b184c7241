#include "lrnn/ops/dplr_scan.hpp"

#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

using Sizes = std::vector<std::pair<std::int64_t, std::int64_t>>;

MixerVariant variant(const char* name, const S4Config& config,
                     const Sizes& sizes = {{4, 4}, {6, 8}, {2, 6}}) {
  return {.type = MixerType::S4,
          .name = name,
          .kwargs = {.s4 = config},
          .sizes = sizes,
          .chunk = kDplrScanChunk};
}
MixerVariant initialised(const char* name, StateSpaceInit init) {
  return variant(name, {.rank = 2, .init = init});
}

const RegisterMixerVariants kRegister({
    variant("defaults", {}),
    variant("channels", {.channels = 3}),
    variant("one_ssm", {.n_ssm = 1, .rank = 2}),
    variant("legt", {.rank = 2, .init = StateSpaceInit::Legt, .deterministic = true}),
    variant("dt_of_states", {.n_ssm = 2, .init = StateSpaceInit::Fourier, .dt_tie = false}),
    initialised("hippo", StateSpaceInit::Hippo),
    initialised("diag", StateSpaceInit::Diag),
    initialised("diag_inv2", StateSpaceInit::DiagInv2),
    initialised("diag_quad", StateSpaceInit::DiagQuad),
    initialised("diag_legs", StateSpaceInit::DiagLegs),
    initialised("dplr_lin", StateSpaceInit::DplrLin),
    initialised("dplr_inv", StateSpaceInit::DplrInv),
    initialised("dplr_inv2", StateSpaceInit::DplrInv2),
    initialised("dplr_quad", StateSpaceInit::DplrQuad),
    initialised("dplr_legs", StateSpaceInit::DplrLegs),
    variant("all_inits", {.init = StateSpaceInit::All}, {{4, 4}, {8, 6}}),
    variant("softplus", {.init = StateSpaceInit::DiagLin,
                         .dt_transform = LaneTransform::Softplus,
                         .real_transform = LaneTransform::Softplus,
                         .imag_transform = LaneTransform::Exp}),
    variant("fast_sigmoid", {.init = StateSpaceInit::DiagInv,
                             .dt_fast = true,
                             .real_transform = LaneTransform::Sigmoid,
                             .imag_transform = LaneTransform::Relu}),
    variant("plain", {.B_clip = std::nullopt,
                      .real_transform = LaneTransform::Relu,
                      .imag_transform = LaneTransform::Softplus,
                      .l_max = 3}),
    variant("sigmoid_dt", {.init = StateSpaceInit::DiagLin,
                           .dt_transform = LaneTransform::Sigmoid,
                           .real_transform = LaneTransform::Identity}),
    variant("relu_dt", {.dt_min = 0.1, .dt_max = 0.9, .dt_transform = LaneTransform::Relu}),
    variant("plain_dt", {.dt_min = 0.1, .dt_max = 0.9, .dt_transform = LaneTransform::Identity}),
    variant("gate", {.channels = 2, .gate = 3}),
    variant("gate_of_channels", {.channels = 2, .gate = 2}),
    variant("no_final_act", {.final_act = std::nullopt}),
});

}  // namespace
}  // namespace lrnn::testing
