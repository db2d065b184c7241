#include "lrnn/ops/argmax.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

Shape drop_last(const Shape& shape) {
  Shape out;
  for (int i = 0; i + 1 < shape.rank(); ++i) out.set(i, shape[i]);
  return out;
}

}  // namespace

void argmax_forward(Context& ctx, const ArgmaxForward& args) {
  constexpr const char* op = "argmax_forward";
  LRNN_CHECK(args.logits && args.logits.rank() > 0 && args.logits.dim(-1) > 0, ShapeError, op,
             ": logits: expected [..., V] with V > 0, got ", args.logits.shape());
  LRNN_CHECK(args.logits.dim(-1) < (std::int64_t{1} << 31), ShapeError, op,
             ": logits: expected V < 2^31, got ", args.logits.dim(-1));
  detail::check_rows(op, "logits", ctx, args.logits, args.logits.shape(), args.logits.dtype());
  detail::check_operand(op, "ids", ctx, args.ids, drop_last(args.logits.shape()), DType::int32);
  LRNN_DISPATCH(argmax_forward, ctx, args);
}

Tensor argmax(Context& ctx, TensorView logits) {
  LRNN_CHECK(logits && logits.rank() > 0, ShapeError, "argmax: logits: expected [..., V], got ",
             logits.shape());
  Tensor ids = ctx.empty(drop_last(logits.shape()), DType::int32);
  argmax_forward(ctx, {.logits = logits, .ids = ids});
  return ids;
}

}  // namespace lrnn
