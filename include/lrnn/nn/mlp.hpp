/// The feed-forward half of a residual block, and the registry of its types.
///
///   GatedMLP:  [p | q] = x W1^T,  y = (p silu(q)) W2^T     W1 [2 F, H], W2 [H, F], F =
///   d_intermediate
///              rounded up to a multiple of 128
///   MLP:       y = gelu(x W1^T) W2^T                       W1 [F, H], W2 [H, F], exact erf GELU
///
/// State dict: fc1.weight, fc2.weight. No biases.
/// Paper: arXiv:2002.05202 (gated linear units). Matches: lrnnx/layers/mlp.py (GatedMLP).
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lrnn/nn/linear.hpp"
#include "lrnn/ops/add_norm.hpp"

namespace lrnn {

/// What forward() keeps for backward().
struct MlpSaved {
  Tensor hidden;  ///< [..., 2 F] or [..., F]  output of fc1
};

class Mlp {
 public:
  Mlp() = default;
  Mlp(const Mlp&) = delete;
  Mlp& operator=(const Mlp&) = delete;
  virtual ~Mlp() = default;

  /// x [..., H] -> y [..., H].
  virtual void forward(Context& ctx, TensorView x, MutableTensorView y, MlpSaved& saved) const = 0;
  /// The same, keeping nothing. `norm`, if there is one, makes x, as ops/add_norm.hpp says.
  virtual void forward(Context& ctx, TensorView x, MutableTensorView y,
                       const AddNormForward* norm) const = 0;
  /// `x` is the input of forward(). Overwrites dx, accumulates the gradients of the parameters.
  virtual void backward(Context& ctx, const MlpSaved& saved, TensorView x, TensorView dy,
                        MutableTensorView dx) const = 0;
};

struct MlpBuild {
  std::int64_t d_model;
  std::int64_t d_intermediate;
  double residual_scale = 1.0;  ///< factor on the initial fc2.weight
};

[[nodiscard]] std::vector<std::string> mlp_names();
/// @throws ConfigError listing the known names
void check_mlp_name(std::string_view name);
/// Parameters are added to `scope`. @throws ConfigError
[[nodiscard]] std::unique_ptr<Mlp> make_mlp(std::string_view name, const MlpBuild& build,
                                            const ParameterScope& scope);

}  // namespace lrnn
