#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

using Disc = SelectiveDiscretization;

MixerVariant mamba(const char* name, const MambaConfig& config, bool event = false) {
  return {.type = MixerType::Mamba,
          .name = name,
          .kwargs = {.mamba = config},
          .event = event,
          .conv_width = config.d_conv,
          .chunk = kSelectiveScanChunk};
}

const RegisterMixerVariants kRegister({
    mamba("mamba", {}),
    mamba("zoh", {.discretization = Disc::Zoh}),
    mamba("bilinear", {.discretization = Disc::Bilinear}),
    mamba("dirac", {.discretization = Disc::Dirac}),
    mamba("mamba_event", {}, true),
    mamba("zoh_event", {.discretization = Disc::Zoh}, true),
    mamba("bilinear_event", {.discretization = Disc::Bilinear}, true),
    mamba("dirac_event", {.discretization = Disc::Dirac}, true),
    mamba("biases", {.d_conv = 3, .expand = 1.5, .dt_rank = 2, .conv_bias = false, .bias = true}),
    mamba("d_conv1", {.d_state = 5, .d_conv = 1, .dt_init = MambaDtInit::Constant}),
    mamba("d_conv5", {.d_conv = 5, .expand = 3.0, .bias = true}),
});

}  // namespace
}  // namespace lrnn::testing
