/// Cases of ops whose operand x may be the result of an add_norm that they are handed.
#pragma once

#include <utility>

#include "lrnn/ops/add_norm.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {

/// Calls the op. `norm` is null, or makes x.
using BehindNorm =
    std::function<void(Context&, Tensors&, TensorView x, const AddNormForward* norm)>;

enum class NormInFront {
  None,
  Rms,       ///< with a residual of activations
  RmsWide,   ///< with one of float32
  RmsFirst,  ///< without one, x kept in float32
  RmsAlone,  ///< without one, nothing kept
  Layer,     ///< with a residual of float32
};

/// `c`, whose first input is x, with `op` as its forward pass.
inline OpCase behind_norm(OpCase c, NormInFront kind, BehindNorm op) {
  if (kind == NormInFront::None) {
    c.forward = [op](Context& ctx, Tensors& t) { op(ctx, t, t["x"], nullptr); };
    return c;
  }
  const Shape rows = c.inputs.front().shape;
  const Shape width = {rows[-1]};
  const auto wide = kind == NormInFront::Rms ? Storage::Activation : Storage::Accumulate;
  const bool layer = kind == NormInFront::Layer;
  const char* const names[] = {"", "rms", "rms_float32", "rms_first", "rms_alone", "layer"};
  c.name += std::string("/") + names[static_cast<int>(kind)];
  const bool alone = kind == NormInFront::RmsAlone;
  if (kind != NormInFront::RmsFirst && !alone)
    c.inputs.push_back({.name = "residual", .shape = rows, .storage = wide});
  c.params.push_back({.name = "norm_weight",
                      .shape = width,
                      .low = 0.5,
                      .high = 1.5,
                      .storage = Storage::Accumulate});
  if (layer)
    c.params.push_back({.name = "norm_bias", .shape = width, .storage = Storage::Accumulate});
  if (!alone) c.outputs.push_back({.name = "residual_out", .shape = rows, .storage = wide});
  c.forward = [op, layer](Context& ctx, Tensors& t) {
    Tensor x = ctx.empty(t["x"].shape(), t["x"].dtype());
    const AddNormForward norm{.kind = layer ? NormKind::Layer : NormKind::Rms,
                              .x = t["x"],
                              .residual = t["residual"],
                              .weight = t["norm_weight"],
                              .bias = t["norm_bias"],
                              .y = x,
                              .residual_out = t["residual_out"]};
    op(ctx, t, x, &norm);
  };
  return c;
}

inline constexpr NormInFront kNormsInFront[] = {NormInFront::Rms, NormInFront::RmsWide,
                                                NormInFront::RmsFirst, NormInFront::RmsAlone,
                                                NormInFront::Layer};

}  // namespace lrnn::testing
