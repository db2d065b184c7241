#include "lrnn/ops/diagonal_scan.hpp"

#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

MixerVariant variant(const char* name, const S5Config& config, bool event = false) {
  return {.type = MixerType::S5,
          .name = name,
          .kwargs = {.s5 = config},
          .event = event,
          .chunk = kDiagonalScanChunk};
}

// Without a discretization a = A grows by up to pi (N - 1) per step: short runs of few states.
MixerVariant undiscretized() {
  MixerVariant v = variant("no_discretization", {.discretization = S5Discretization::None});
  v.sizes = {{4, 1}, {3, 1}};
  return v;
}

const RegisterMixerVariants kRegister({
    variant("defaults", {}),
    variant("bilinear", {.discretization = S5Discretization::Bilinear}),
    variant("dirac", {.discretization = S5Discretization::Dirac}),
    undiscretized(),
    variant("wide_dt", {.d_state = 5, .dt_min = 0.05, .dt_max = 0.9}),
    variant("event", {.event = true}, true),
    variant("event_bilinear",
            {.discretization = S5Discretization::Bilinear, .dt_max = 0.5, .event = true}, true),
    variant("event_dirac", {.discretization = S5Discretization::Dirac, .event = true}, true),
    variant("event_without_timesteps", {.event = true}),
});

}  // namespace
}  // namespace lrnn::testing
