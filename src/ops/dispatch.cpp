#include "ops/dispatch.hpp"

#include "core/runtime.hpp"

namespace lrnn::detail {
namespace {

void check_common(const char* op, const char* operand, const Context& ctx, const TensorView& t,
                  const Shape& shape, DType dtype) {
  LRNN_CHECK(t, ShapeError, op, ": ", operand, " is required");
  LRNN_CHECK(t.shape() == shape, ShapeError, op, ": ", operand, ": expected ", shape, ", got ",
             t.shape());
  LRNN_CHECK(t.dtype() == dtype, DTypeError, op, ": ", operand, ": expected ", dtype, ", got ",
             t.dtype());
  LRNN_CHECK(t.device() == ctx.device(), DeviceError, op, ": ", operand, " is on ", t.device(),
             ", context is on ", ctx.device());
}

}  // namespace

void make_current(const Context& ctx) {
  ctx.runtime().make_current();
}
void check_operand(const char* op, const char* operand, const Context& ctx, TensorView t,
                   const Shape& shape, DType dtype) {
  check_common(op, operand, ctx, t, shape, dtype);
  LRNN_CHECK(t.is_contiguous(), ShapeError, op, ": ", operand, " must be contiguous");
}
void check_optional(const char* op, const char* operand, const Context& ctx, TensorView t,
                    const Shape& shape, DType dtype) {
  if (t) check_operand(op, operand, ctx, t, shape, dtype);
}
void check_rows(const char* op, const char* operand, const Context& ctx, TensorView t,
                const Shape& shape, DType dtype) {
  check_common(op, operand, ctx, t, shape, dtype);
  LRNN_CHECK(has_uniform_rows(t), ShapeError, op, ": ", operand,
             " must have dense rows at one distance");
}
void check_rank(const char* op, const char* operand, TensorView t, int rank) {
  LRNN_CHECK(t, ShapeError, op, ": ", operand, " is required");
  LRNN_CHECK(t.rank() == rank, ShapeError, op, ": ", operand, ": expected rank ", rank, ", got ",
             t.shape());
}
void check_one_token(const char* op, const char* operand, TensorView t) {
  LRNN_CHECK(t.dim(1) == 1, ShapeError, op, ": ", operand, ": expected one token, got ", t.shape());
}
DType weight_dtype(const Context& ctx, TensorView weight, DType dtype) {
  const bool narrow =
      ctx.device().is_cpu() && dtype == DType::float32 && weight.dtype() == DType::bfloat16;
  return narrow ? DType::bfloat16 : dtype;
}
void check_lengths_operand(const char* op, const Context& ctx, TensorView lengths,
                           std::int64_t batch) {
  check_optional(op, "lengths", ctx, lengths, {batch}, DType::int32);
}

bool has_uniform_rows(const TensorView& t) {
  const int last = t.rank() - 1;
  if (last < 0 || (t.dim(last) != 1 && t.stride(last) != 1)) return false;
  std::int64_t expected = -1;  // stride that the next outer dimension must have
  for (int i = last - 1; i >= 0; --i) {
    if (t.dim(i) == 1) continue;
    if (expected >= 0 && t.stride(i) != expected) return false;
    if (t.stride(i) < t.dim(last)) return false;
    expected = t.stride(i) * t.dim(i);
  }
  return true;
}
std::int64_t row_stride(const TensorView& t) {
  for (int i = t.rank() - 2; i >= 0; --i)
    if (t.dim(i) != 1) return t.stride(i);
  return t.dim(-1);
}
std::int64_t row_count(const TensorView& t) {
  return t.dim(-1) == 0 ? 0 : t.numel() / t.dim(-1);
}

void throw_built_without_cuda(const char* op) {
  throw DeviceError(concat(op, ": this build has no CUDA backend (configure with -Dcuda=enabled)"));
}

}  // namespace lrnn::detail
