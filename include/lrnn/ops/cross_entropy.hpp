/// Cross-entropy of next-token prediction over the real columns of padded logits.
///
///   lse_t  = log sum_{v < V} exp(z_t[v])
///   loss_t = lse_t - z_t[target_t]                    0 where the target is ignored
///   mean loss = scale sum_t loss_t,  scale = 1 / (number of counted targets), 0 if there is none
///   dz_t[v] = scale dloss_t (exp(z_t[v] - lse_t) - [v = target_t]),  0 for v >= V or ignored
///
/// The work is cut so that logits may be formed and consumed a chunk of rows at a time: the scale
/// comes from the targets alone.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

/// A target that gets no loss.
inline constexpr std::int32_t kIgnoreIndex = -100;

/// Counts targets, and marks positions t >= lengths[b] as ignored.
struct PrepareTargets {
  TensorView targets;         ///< [B, L] int32, in [0, V) or kIgnoreIndex
  TensorView lengths = {};    ///< [B] int32
  MutableTensorView counted;  ///< [B, L] int32, targets with padding replaced by kIgnoreIndex
  MutableTensorView scale;    ///< [1], float32 or float64
};

struct CrossEntropyForward {
  TensorView logits;               ///< [T, Vp], rows may be column slices
  TensorView targets;              ///< [T] int32, in [0, V) or kIgnoreIndex
  std::int64_t vocab_size;         ///< V <= Vp
  MutableTensorView losses;        ///< [T], float32 (float64)
  MutableTensorView lse = {};      ///< [T], float32 (float64); saved for backward
  TensorView scale = {};           ///< [1]; factor on dlogits, absent: 1
  MutableTensorView dlogits = {};  ///< [T, Vp], the gradient of sum scale loss_t; may be logits
};

struct CrossEntropyBackward {
  TensorView dlosses;         ///< [T], float32 (float64)
  TensorView logits;          ///< [T, Vp]
  TensorView targets;         ///< [T] int32
  std::int64_t vocab_size;    ///< V <= Vp
  TensorView lse;             ///< [T]
  MutableTensorView dlogits;  ///< [T, Vp], overwritten; may be logits
};

/// loss = scale * sum of losses, in a fixed order.
struct MeanLoss {
  TensorView losses;       ///< [T]
  TensorView scale;        ///< [1]
  MutableTensorView loss;  ///< [] or [1], dtype of losses
};

/// Targets outside [0, V) other than kIgnoreIndex are the caller's duty: see check_targets.
/// @throws ShapeError, DTypeError, DeviceError
void prepare_targets(Context& ctx, const PrepareTargets& args);
void cross_entropy_forward(Context& ctx, const CrossEntropyForward& args);
void cross_entropy_backward(Context& ctx, const CrossEntropyBackward& args);
void mean_loss(Context& ctx, const MeanLoss& args);
/// Reads `targets` on the host, hence synchronises.
/// @throws InvalidArgument naming the first target outside [0, vocab_size) that is not kIgnoreIndex
void check_targets(Context& ctx, TensorView targets, std::int64_t vocab_size);

// Backends. Unchecked: call the functions above.
namespace cpu {
void prepare_targets(Context& ctx, const PrepareTargets& args);
void cross_entropy_forward(Context& ctx, const CrossEntropyForward& args);
void cross_entropy_backward(Context& ctx, const CrossEntropyBackward& args);
void mean_loss(Context& ctx, const MeanLoss& args);
}  // namespace cpu
namespace cuda {
void prepare_targets(Context& ctx, const PrepareTargets& args);
void cross_entropy_forward(Context& ctx, const CrossEntropyForward& args);
void cross_entropy_backward(Context& ctx, const CrossEntropyBackward& args);
void mean_loss(Context& ctx, const MeanLoss& args);
}  // namespace cuda

}  // namespace lrnn
