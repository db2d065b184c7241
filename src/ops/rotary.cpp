#include "lrnn/ops/rotary.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {

void rotary(Context& ctx, const Rotary& a) {
  constexpr const char* op = "rotary";
  detail::check_rank(op, "x", a.x, 3);
  const Shape& xs = a.x.shape();
  detail::check_rows(op, "x", ctx, a.x, xs, a.x.dtype());
  LRNN_CHECK(a.head_dim >= 1 && xs[2] % a.head_dim == 0, ShapeError, op, ": x: ", xs,
             " does not divide into heads of ", a.head_dim);
  LRNN_CHECK(a.dim >= 2 && a.dim % 2 == 0 && a.dim <= a.head_dim, InvalidArgument, op,
             ": dim: expected an even number of at most ", a.head_dim, ", got ", a.dim);
  LRNN_CHECK(a.base > 0, InvalidArgument, op, ": base: expected a positive number, got ", a.base);
  detail::check_optional(op, "positions", ctx, a.positions, {xs[0]}, DType::int32);
  detail::check_optional(op, "position_ids", ctx, a.position_ids, {xs[0], xs[1]}, DType::int32);
  if (a.x.numel() == 0) return;
  LRNN_DISPATCH(rotary, ctx, a);
}

}  // namespace lrnn
