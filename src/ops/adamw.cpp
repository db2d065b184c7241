#include "lrnn/ops/adamw.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_betas(const char* op, double beta1, double beta2) {
  LRNN_CHECK(beta1 >= 0.0 && beta1 < 1.0, ConfigError, op, ": beta1: expected [0, 1), got ", beta1);
  LRNN_CHECK(beta2 >= 0.0 && beta2 < 1.0, ConfigError, op, ": beta2: expected [0, 1), got ", beta2);
}

void check_accumulate(const char* op, const char* operand, DType dtype) {
  LRNN_CHECK(dtype == DType::float32 || dtype == DType::float64, DTypeError, op, ": ", operand,
             ": expected float32 or float64, got ", dtype);
}

}  // namespace

void adamw_begin(Context& ctx, const AdamwBegin& args) {
  constexpr const char* op = "adamw_begin";
  const DType dtype = args.grad_norm.dtype();
  check_accumulate(op, "grad_norm", dtype);
  detail::check_operand(op, "grad_norm", ctx, args.grad_norm, {}, dtype);
  detail::check_operand(op, "lr", ctx, args.lr, {}, dtype);
  detail::check_operand(op, "counters", ctx, args.counters, {2}, DType::int64);
  detail::check_operand(op, "factors", ctx, args.factors, {5}, dtype);
  check_betas(op, args.beta1, args.beta2);
  LRNN_CHECK(args.max_grad_norm >= 0.0, ConfigError, op, ": max_grad_norm: expected >= 0, got ",
             args.max_grad_norm);
  LRNN_DISPATCH(adamw_begin, ctx, args);
}

void adamw_update(Context& ctx, const AdamwUpdate& args) {
  constexpr const char* op = "adamw_update";
  detail::check_rank(op, "grad", args.grad, 1);
  const DType dtype = args.grad.dtype();
  const std::int64_t n = args.grad.dim(0);
  check_accumulate(op, "grad", dtype);
  LRNN_CHECK(n % kAdamwGroup == 0, ShapeError, op, ": grad: expected a multiple of ", kAdamwGroup,
             " elements, got ", n);
  detail::check_operand(op, "grad", ctx, args.grad, {n}, dtype);
  detail::check_operand(op, "factors", ctx, args.factors, {5}, dtype);
  detail::check_operand(op, "group_options", ctx, args.group_options, {n / kAdamwGroup},
                        DType::int32);
  detail::check_rank(op, "options", args.options, 2);
  detail::check_operand(op, "options", ctx, args.options, {args.options.dim(0), 2}, dtype);
  detail::check_operand(op, "m", ctx, args.m, {n}, dtype);
  detail::check_operand(op, "v", ctx, args.v, {n}, dtype);
  const bool mixed = args.values.dtype() == DType::bfloat16;
  detail::check_operand(op, "values", ctx, args.values, {n}, mixed ? DType::bfloat16 : dtype);
  LRNN_CHECK(static_cast<bool>(args.masters) == mixed, ShapeError, op,
             ": masters belong to bfloat16 values, and to them alone");
  detail::check_optional(op, "masters", ctx, args.masters, {n}, DType::float32);
  check_betas(op, args.beta1, args.beta2);
  LRNN_DISPATCH(adamw_update, ctx, args);
}

}  // namespace lrnn
