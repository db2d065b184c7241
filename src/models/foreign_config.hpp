/// Configurations of other libraries' Mamba-1 checkpoints.
#pragma once

#include <nlohmann/json.hpp>

namespace lrnn::detail {

/// The field that only a config.json of this library has.
inline constexpr const char* kVersionKey = "lrnn_format_version";

/// Turns a config.json of mamba_ssm (ssm_cfg, attn_cfg) or of a Hugging Face `mamba` model
/// (hidden_size, state_size) into the arguments of lrnnx's constructor; returns others unchanged.
/// Hugging Face files carry many keys about other things, which are passed over; all that influence
/// the numbers are read.
/// @throws ConfigError naming a field that this library has no counterpart for
[[nodiscard]] nlohmann::ordered_json translate_foreign_config(nlohmann::ordered_json config);

}  // namespace lrnn::detail
