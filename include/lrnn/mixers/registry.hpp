/// Mixer types, their names, and how to make one.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "lrnn/mixers/mixer.hpp"
#include "lrnn/mixers/mixer_kwargs.hpp"

namespace lrnn {

enum class MixerType { LRU, S4, S4D, S5, Centaurus, Mamba, RGLRU, S7, Attn };

/// lrnnx's name, e.g. "RGLRU" or "attn". @throws ConfigError
[[nodiscard]] std::string_view mixer_name(MixerType type);
/// @throws ConfigError listing the known names
[[nodiscard]] MixerType mixer_type(std::string_view name);
/// Every registered type, in the order of the enumeration.
[[nodiscard]] std::vector<MixerType> all_mixer_types();

/// Fills in defaults that depend on the model (d_state, dt_rank, ...) and validates the options of
/// `type` in `kwargs`; the options of other types are left alone.
/// @throws ConfigError naming mixer, option, what was expected and what came
[[nodiscard]] MixerKwargs resolve_mixer_kwargs(MixerType type, MixerKwargs kwargs,
                                               const MixerBuild& build);
/// Makes a mixer whose parameters are added to `scope`. Resolves `kwargs` first.
[[nodiscard]] std::unique_ptr<Mixer> make_mixer(MixerType type, const MixerKwargs& kwargs,
                                                const MixerBuild& build,
                                                const ParameterScope& scope);

}  // namespace lrnn
