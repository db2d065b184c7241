#include "lrnn/ops/lane_scan.hpp"

#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

using Sizes = std::vector<std::pair<std::int64_t, std::int64_t>>;

MixerVariant variant(const char* name, const S4dConfig& config,
                     const Sizes& sizes = {{4, 4}, {5, 6}, {6, 8}, {1, 10}}) {
  return {.type = MixerType::S4D,
          .name = name,
          .kwargs = {.s4d = config},
          .sizes = sizes,
          .chunk = kLaneScanChunk};
}
MixerVariant initialised(const char* name, StateSpaceInit init) {
  return variant(name, {.init = init}, {{4, 4}, {6, 8}});
}

const RegisterMixerVariants kRegister({
    variant("defaults", {}),
    variant("bilinear", {.disc = S4dDiscretization::Bilinear}),
    variant("channels", {.channels = 3}),
    variant("shared_models", {.n_ssm = 2, .init = StateSpaceInit::Hippo}, {{4, 4}, {6, 8}}),
    variant("one_model", {.n_ssm = 1, .init = StateSpaceInit::Fourier}),
    variant("all_inits", {.init = StateSpaceInit::All, .dt_fast = true}, {{4, 4}, {8, 6}}),
    variant("diag_inv", {.init = StateSpaceInit::DiagInv, .deterministic = true}, {{3, 2}, {4, 6}}),
    initialised("diag", StateSpaceInit::Diag),
    initialised("diag_inv2", StateSpaceInit::DiagInv2),
    initialised("diag_legs", StateSpaceInit::DiagLegs),
    variant("legt", {.rank = 2, .init = StateSpaceInit::Legt}),
    variant("untied_dt", {.init = StateSpaceInit::DiagLin,
                          .dt_tie = false,
                          .dt_transform = LaneTransform::Softplus,
                          .real_transform = LaneTransform::Softplus}),
    variant("transforms", {.init = StateSpaceInit::DiagQuad,
                           .dt_min = 0.05,
                           .dt_max = 0.5,
                           .dt_transform = LaneTransform::Sigmoid,
                           .real_transform = LaneTransform::Sigmoid,
                           .imag_transform = LaneTransform::Exp}),
    variant("plain", {.B_clip = std::nullopt,
                      .real_transform = LaneTransform::Relu,
                      .imag_transform = LaneTransform::Relu,
                      .l_max = 3}),
    variant("plain_real",
            {.real_transform = LaneTransform::Identity, .imag_transform = LaneTransform::Softplus}),
    variant("relu_dt", {.dt_min = 0.1, .dt_max = 0.9, .dt_transform = LaneTransform::Relu}),
    variant("plain_dt", {.dt_min = 0.1, .dt_max = 0.9, .dt_transform = LaneTransform::Identity}),
    variant("gate", {.channels = 2, .gate = 3}),
    variant("gate_of_channels", {.channels = 2, .gate = 2}),
    variant("no_final", {.final_act = std::nullopt}),
    variant("gate_no_final", {.gate = 1, .final_act = std::nullopt}),
});

}  // namespace
}  // namespace lrnn::testing
