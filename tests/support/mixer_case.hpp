/// The list of mixer configurations that every mixer test runs through.
///
/// Adding `tests/mixers/<mixer>_variants.cpp` with a RegisterMixerVariants object is all it takes.
#pragma once

#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "lrnn/mixers/registry.hpp"

namespace lrnn::testing {

struct MixerVariant {
  MixerType type;
  std::string name;         ///< of the options, e.g. "bilinear_event"; letters, digits, '_'
  MixerKwargs kwargs = {};  ///< the options under test
  /// (d_model, d_state) of random cases; odd and even where the mixer allows it.
  std::vector<std::pair<std::int64_t, std::int64_t>> sizes = {{4, 4}, {5, 3}, {6, 8}, {1, 1}};
  bool event = false;                ///< pass integration_timesteps
  bool causal = true;                ///< false: forward and backward only, no state and no step
  std::int64_t conv_width = 4;       ///< edge lengths are conv_width - 1, +0, +1
  std::int64_t chunk = 0;            ///< edge lengths chunk - 1, +0, +1, 2 chunk + 1; 0: none
  double gradient_tolerance = 1e-6;  ///< relative, against the difference quotient in double
  double float32_nmse = 1e-12;       ///< CUDA float32 forward against the double reference
  double float32_gradient_nmse = 1e-10;
  double bfloat16_nmse = 1e-4;  ///< CUDA bfloat16, reference on the rounded inputs and weights
  double bfloat16_gradient_nmse = 1e-4;
};

inline std::ostream& operator<<(std::ostream& os, const MixerVariant& v) {
  return os << mixer_name(v.type) << '/' << v.name;
}

const std::vector<MixerVariant>& all_mixer_variants();

struct RegisterMixerVariants {
  explicit RegisterMixerVariants(std::vector<MixerVariant> variants);
};

}  // namespace lrnn::testing
