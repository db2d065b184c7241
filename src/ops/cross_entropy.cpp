#include "lrnn/ops/cross_entropy.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_logits(const char* op, const Context& ctx, TensorView logits, TensorView targets,
                  std::int64_t vocab_size) {
  detail::check_rank(op, "logits", logits, 2);
  detail::check_rows(op, "logits", ctx, logits, logits.shape(), logits.dtype());
  detail::check_operand(op, "targets", ctx, targets, {logits.dim(0)}, DType::int32);
  LRNN_CHECK(vocab_size >= 1 && vocab_size <= logits.dim(1), ShapeError, op,
             ": vocab_size: expected 1 to ", logits.dim(1), ", got ", vocab_size);
}

}  // namespace

void prepare_targets(Context& ctx, const PrepareTargets& a) {
  constexpr const char* op = "prepare_targets";
  detail::check_rank(op, "targets", a.targets, 2);
  const Shape& shape = a.targets.shape();
  detail::check_operand(op, "targets", ctx, a.targets, shape, DType::int32);
  detail::check_lengths_operand(op, ctx, a.lengths, shape[0]);
  detail::check_operand(op, "counted", ctx, a.counted, shape, DType::int32);
  LRNN_CHECK(a.scale, ShapeError, op, ": scale is required");
  detail::check_operand(op, "scale", ctx, a.scale, {1}, accumulate_dtype(a.scale.dtype()));
  LRNN_DISPATCH(prepare_targets, ctx, a);
}

void cross_entropy_forward(Context& ctx, const CrossEntropyForward& a) {
  constexpr const char* op = "cross_entropy_forward";
  check_logits(op, ctx, a.logits, a.targets, a.vocab_size);
  const DType dtype = a.logits.dtype();
  const DType accumulate = accumulate_dtype(dtype);
  const Shape rows = {a.logits.dim(0)};
  detail::check_operand(op, "losses", ctx, a.losses, rows, accumulate);
  detail::check_optional(op, "lse", ctx, a.lse, rows, accumulate);
  detail::check_optional(op, "scale", ctx, a.scale, {1}, accumulate);
  if (a.dlogits) detail::check_rows(op, "dlogits", ctx, a.dlogits, a.logits.shape(), dtype);
  if (a.logits.dim(0) == 0) return;
  LRNN_DISPATCH(cross_entropy_forward, ctx, a);
}

void cross_entropy_backward(Context& ctx, const CrossEntropyBackward& a) {
  constexpr const char* op = "cross_entropy_backward";
  check_logits(op, ctx, a.logits, a.targets, a.vocab_size);
  const DType dtype = a.logits.dtype();
  const Shape rows = {a.logits.dim(0)};
  detail::check_operand(op, "dlosses", ctx, a.dlosses, rows, accumulate_dtype(dtype));
  detail::check_operand(op, "lse", ctx, a.lse, rows, accumulate_dtype(dtype));
  detail::check_rows(op, "dlogits", ctx, a.dlogits, a.logits.shape(), dtype);
  if (a.logits.dim(0) == 0) return;
  LRNN_DISPATCH(cross_entropy_backward, ctx, a);
}

void mean_loss(Context& ctx, const MeanLoss& a) {
  constexpr const char* op = "mean_loss";
  detail::check_rank(op, "losses", a.losses, 1);
  const DType dtype = accumulate_dtype(a.losses.dtype());
  detail::check_operand(op, "losses", ctx, a.losses, a.losses.shape(), dtype);
  detail::check_operand(op, "scale", ctx, a.scale, {1}, dtype);
  LRNN_CHECK(a.loss && a.loss.numel() == 1, ShapeError, op, ": loss: expected one element");
  detail::check_operand(op, "loss", ctx, a.loss, a.loss.shape(), dtype);
  LRNN_DISPATCH(mean_loss, ctx, a);
}

void check_targets(Context& ctx, TensorView targets, std::int64_t vocab_size) {
  const auto values = ctx.to_host<std::int32_t>(targets);
  for (std::size_t i = 0; i < values.size(); ++i)
    LRNN_CHECK(values[i] == kIgnoreIndex || (values[i] >= 0 && values[i] < vocab_size),
               InvalidArgument, "targets: expected values in [0, ", vocab_size, ") or ",
               kIgnoreIndex, ", got ", values[i], " at position ", i);
}

}  // namespace lrnn
