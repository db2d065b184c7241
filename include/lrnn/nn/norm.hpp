/// Residual addition followed by RMSNorm or LayerNorm, with its parameters.
#pragma once

#include <optional>

#include "lrnn/nn/parameter.hpp"
#include "lrnn/ops/add_norm.hpp"

namespace lrnn {

/// What an add-and-norm leaves behind.
struct AddNormOutput {
  Tensor y;         ///< [..., H]  the normalised sum, dtype of x
  Tensor residual;  ///< [..., H]  the sum; x itself where there was nothing to add or convert
  Tensor rstd;      ///< [...]     kept for backward
  Tensor mean;      ///< [...]     kept for backward, LayerNorm
};

/// An add-and-norm that is left to the op that reads `out.y`: see its operand `norm`. Keeps what
/// that op needs, until it has been called.
struct PendingAddNorm {
  AddNormOutput out;
  std::optional<AddNormForward> args;  ///< empty if it has been run
  Tensor x = {};

  [[nodiscard]] const AddNormForward* norm() const { return args ? &*args : nullptr; }
};

/// Gradients of x and of the incoming residual. They are the same numbers; `dresidual` is empty
/// where the dtype is the same too.
struct AddNormGradients {
  Tensor dx;         ///< [..., H]
  Tensor dresidual;  ///< [..., H], dtype of the stored sum, or empty

  [[nodiscard]] TensorView residual() const { return dresidual ? dresidual.view() : dx.view(); }
};

/// Parameters "weight" [H] = 1 and, for LayerNorm, "bias" [H] = 0, both float32. See
/// ops/add_norm.hpp.
class AddNorm {
 public:
  struct Options {
    NormKind kind = NormKind::Rms;
    double eps = 1e-5;
    bool fused = true;  ///< false: the sum, rounded as it is stored, by an operation of its own
  };

  AddNorm(const ParameterScope& scope, std::int64_t d_model, const Options& options);

  /// `residual` may be absent; `residual_dtype` is that of the stored sum.
  [[nodiscard]] AddNormOutput forward(Context& ctx, Tensor x, TensorView residual,
                                      DType residual_dtype, bool keep_for_backward) const;
  /// The same, keeping nothing for backward, where the op that reads y may be who runs it.
  [[nodiscard]] PendingAddNorm prepare(Context& ctx, Tensor x, TensorView residual,
                                       DType residual_dtype) const;
  /// Only the normalised sum.
  [[nodiscard]] Tensor normalize(Context& ctx, TensorView x, TensorView residual) const;
  /// `dresidual_out` is the gradient of the sum where it went on (absent: zero). Accumulates the
  /// gradients of the parameters.
  [[nodiscard]] AddNormGradients backward(Context& ctx, const AddNormOutput& saved, TensorView dy,
                                          TensorView dresidual_out) const;

  [[nodiscard]] const Options& options() const noexcept { return options_; }
  /// For ops that normalise by themselves.
  [[nodiscard]] TensorView weight_value() const { return weight_->value; }

 private:
  /// Whether `fused` is false and there is something to add or convert.
  [[nodiscard]] bool adds_by_itself(const Tensor& x, TensorView residual,
                                    DType residual_dtype) const;
  [[nodiscard]] AddNormOutput add_then_norm(Context& ctx, Tensor x, TensorView residual,
                                            DType residual_dtype, bool keep_for_backward) const;
  /// Memory for them.
  void keep_statistics(Context& ctx, AddNormOutput& out) const;

  Options options_;
  Parameter* weight_;
  Parameter* bias_ = nullptr;
};

}  // namespace lrnn
