#include "lrnn/ops/lane_scan.hpp"

#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

MixerVariant variant(const char* name, const CentaurusConfig& config) {
  return {.type = MixerType::Centaurus,
          .name = name,
          .kwargs = {.centaurus = config},
          .chunk = kLaneScanChunk};
}

const RegisterMixerVariants kRegister({
    variant("neck", {}),
    variant("neck_M3", {.sub_state_dim = 3, .discretization = CentaurusDiscretization::Bilinear}),
    variant("neck_M1", {.d_state = 17, .sub_state_dim = 1}),
    variant("pointwise", {.sub_state_dim = 4, .mode = CentaurusMode::Pointwise}),
    variant("dws", {.mode = CentaurusMode::Dws}),
    variant("dws_M5", {.sub_state_dim = 5, .mode = CentaurusMode::Dws}),
    variant("full", {.sub_state_dim = 2, .mode = CentaurusMode::Full}),
});

}  // namespace
}  // namespace lrnn::testing
