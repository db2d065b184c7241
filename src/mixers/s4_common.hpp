/// What S4 and S4D share: checks of options, parameters, and the position-wise map behind the
/// state-space model.
#pragma once

#include <memory>
#include <optional>

#include "lrnn/mixers/mixer.hpp"
#include "lrnn/mixers/state_space_config.hpp"
#include "lrnn/nn/linear.hpp"
#include "lrnn/ops/activation.hpp"

namespace lrnn::detail {

/// Fills d_state and n_ssm and checks every option; `name` is the mixer's. @throws ConfigError
template <bool diagonal>
void resolve_state_space(const char* name, StateSpaceConfig<diagonal>& config,
                         const MixerBuild& build);

struct StateSpaceParameters {
  Parameter* inv_dt;  // [H, 1] or [H, N2]
  Parameter* C;       // [channels, H, N2, 2]
  Parameter* B;       // [1, n_ssm, N2, 2]
  Parameter* A_real;  // [n_ssm, N2]
  Parameter* A_imag;  // [n_ssm, N2]
  Parameter* P;       // [rank, n_ssm, N2, 2]; null in S4D
  Parameter* D;       // [channels, H]
};
/// Of a resolved `config`.
template <bool diagonal>
[[nodiscard]] StateSpaceParameters add_state_space_parameters(
    const char* name, const StateSpaceConfig<diagonal>& config, std::int64_t d_model,
    const ParameterScope& scope);

/// y = GELU(output_linear(GELU(v))) with v = GELU(s), or with a gate
/// v = output_gate(GELU(s)) GELU(input_gate(u)). Everything but s is recomputed in backward.
class S4Head {
 public:
  template <bool diagonal>
  S4Head(const StateSpaceConfig<diagonal>& config, std::int64_t d_model,
         const ParameterScope& scope);

  /// u [B, L, H], s [B, L, channels H], y [B, L, H].
  void forward(Context& ctx, TensorView u, TensorView s, MutableTensorView y) const;
  /// The same for one token, to whose s step_activation(), twice, has been applied.
  void step(Context& ctx, TensorView u, TensorView s, MutableTensorView y) const;
  [[nodiscard]] Activation step_activation() const {
    return uses_input() ? Activation::Identity : Activation::Gelu;
  }
  /// Overwrites ds and, with a gate, du with the gradient through the gate; accumulates those of
  /// the parameters.
  void backward(Context& ctx, TensorView u, TensorView s, TensorView dy, MutableTensorView ds,
                MutableTensorView du) const;
  /// Whether backward writes du.
  [[nodiscard]] bool uses_input() const { return input_gate_.has_value(); }

 private:
  struct Values;
  [[nodiscard]] Values values(Context& ctx, TensorView u, TensorView s) const;
  /// y from GELU(v).
  void project(Context& ctx, TensorView activated, MutableTensorView y) const;

  std::optional<Linear> input_gate_;
  std::optional<Linear> output_gate_;
  std::optional<Linear> output_linear_;
};

}  // namespace lrnn::detail
