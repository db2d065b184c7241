#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

std::vector<MixerVariant>& registry() {
  static std::vector<MixerVariant> variants;
  return variants;
}

}  // namespace

const std::vector<MixerVariant>& all_mixer_variants() {
  return registry();
}
RegisterMixerVariants::RegisterMixerVariants(std::vector<MixerVariant> variants) {
  for (auto& v : variants) registry().push_back(std::move(v));
}

}  // namespace lrnn::testing
