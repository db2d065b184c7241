#include "lrnn/ops/global_norm.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {

void global_norm(Context& ctx, const GlobalNorm& args) {
  constexpr const char* op = "global_norm";
  LRNN_CHECK(!args.grads.empty(), ShapeError, op, ": grads: expected at least one block");
  const DType dtype = args.grads.front().dtype();
  LRNN_CHECK(dtype == DType::float32 || dtype == DType::float64, DTypeError, op,
             ": grads: expected float32 or float64, got ", dtype);
  for (const TensorView& grad : args.grads)
    detail::check_operand(op, "grads", ctx, grad, grad.shape(), dtype);
  detail::check_operand(op, "norm", ctx, args.norm, {}, dtype);
  LRNN_DISPATCH(global_norm, ctx, args);
}

}  // namespace lrnn
