#include "lrnn/ops/embedding.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

Shape with_last(TensorView ids, std::int64_t last) {
  Shape shape = ids.shape();
  shape.set(ids.rank(), last);
  return shape;
}

}  // namespace

void embedding_forward(Context& ctx, const EmbeddingForward& a) {
  constexpr const char* op = "embedding_forward";
  LRNN_CHECK(a.ids, ShapeError, op, ": ids is required");
  detail::check_operand(op, "ids", ctx, a.ids, a.ids.shape(), DType::int32);
  detail::check_rank(op, "weight", a.weight, 2);
  LRNN_CHECK(a.y, ShapeError, op, ": y is required");
  const DType dtype = a.y.dtype();
  detail::check_operand(op, "weight", ctx, a.weight, a.weight.shape(),
                        detail::weight_dtype(ctx, a.weight, dtype));
  detail::check_operand(op, "y", ctx, a.y, with_last(a.ids, a.weight.dim(1)), dtype);
  if (a.y.numel() == 0) return;
  LRNN_DISPATCH(embedding_forward, ctx, a);
}

void embedding_backward(Context& ctx, const EmbeddingBackward& a) {
  constexpr const char* op = "embedding_backward";
  LRNN_CHECK(a.ids, ShapeError, op, ": ids is required");
  detail::check_operand(op, "ids", ctx, a.ids, a.ids.shape(), DType::int32);
  detail::check_rank(op, "dweight", a.dweight, 2);
  LRNN_CHECK(a.dy, ShapeError, op, ": dy is required");
  const DType dtype = a.dy.dtype();
  detail::check_operand(op, "dy", ctx, a.dy, with_last(a.ids, a.dweight.dim(1)), dtype);
  detail::check_operand(op, "dweight", ctx, a.dweight, a.dweight.shape(), accumulate_dtype(dtype));
  if (a.dy.numel() == 0) return;
  LRNN_DISPATCH(embedding_backward, ctx, a);
}

void check_token_ids(Context& ctx, TensorView ids, std::int64_t vocab_size) {
  const auto values = ctx.to_host<std::int32_t>(ids);
  for (std::size_t i = 0; i < values.size(); ++i)
    LRNN_CHECK(values[i] >= 0 && values[i] < vocab_size, InvalidArgument,
               "input_ids: expected values in [0, ", vocab_size, "), got ", values[i],
               " at position ", i);
}

}  // namespace lrnn
