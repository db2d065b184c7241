#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

MixerVariant rglru(const char* name, const RglruConfig& config) {
  return {.type = MixerType::RGLRU,
          .name = name,
          .kwargs = {.rglru = config},
          .conv_width = config.d_conv,
          .chunk = kRglruScanChunk};
}

const RegisterMixerVariants kRegister({
    rglru("rglru", {}),
    rglru("biases", {.d_conv = 3, .expand = 1.5, .conv_bias = false, .bias = true}),
    rglru("d_conv1", {.d_state = 5, .d_conv = 1, .c = 2.0}),
    rglru("d_conv5", {.d_conv = 5, .expand = 3.0, .a_init_range = {0.2, 0.6}, .bias = true}),
});

}  // namespace
}  // namespace lrnn::testing
