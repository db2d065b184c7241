#include "lrnn/ops/dplr_scan.hpp"

#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

MixerVariant variant(const char* name, const S4Config& config) {
  return {.type = MixerType::S4,
          .name = name,
          .kwargs = {.s4 = config},
          .sizes = {{4, 4}, {6, 8}, {2, 6}},
          .chunk = kDplrScanChunk};
}

const RegisterMixerVariants kRegister({
    variant("defaults", {}),
    variant("channels", {.channels = 3}),
    variant("one_ssm", {.n_ssm = 1, .rank = 2}),
    variant("legt", {.rank = 2, .init = StateSpaceInit::Legt, .deterministic = true}),
    variant("dt_of_states", {.n_ssm = 2, .init = StateSpaceInit::Fourier, .dt_tie = false}),
    variant("softplus", {.init = StateSpaceInit::DiagLin,
                         .dt_transform = LaneTransform::Softplus,
                         .real_transform = LaneTransform::Softplus,
                         .imag_transform = LaneTransform::Exp}),
    variant("fast_sigmoid", {.init = StateSpaceInit::DiagInv,
                             .dt_fast = true,
                             .real_transform = LaneTransform::Sigmoid,
                             .imag_transform = LaneTransform::Relu}),
    variant("gate", {.channels = 2, .gate = 3}),
    variant("gate_of_channels", {.channels = 2, .gate = 2}),
    variant("no_final_act", {.final_act = std::nullopt}),
});

}  // namespace
}  // namespace lrnn::testing
