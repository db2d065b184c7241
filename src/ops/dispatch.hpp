/// Checks shared by all ops and the one place that chooses a backend.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn::detail {

/// Checks a required operand: present, of this shape, dtype and device, contiguous.
/// @throws ShapeError, DTypeError, DeviceError naming op and operand.
void check_operand(const char* op, const char* operand, const Context& ctx, TensorView t,
                   const Shape& shape, DType dtype);
/// The same for an operand that may be absent.
void check_optional(const char* op, const char* operand, const Context& ctx, TensorView t,
                    const Shape& shape, DType dtype);
/// The same as check_operand for an operand whose rows may be a column slice of a wider tensor:
/// the last dimension is dense and all leading dimensions together have one row stride.
void check_rows(const char* op, const char* operand, const Context& ctx, TensorView t,
                const Shape& shape, DType dtype);
/// @throws ShapeError unless `t` has this rank.
void check_rank(const char* op, const char* operand, TensorView t, int rank);
/// @throws ShapeError unless `t`, of a step, has one token: [B, 1, ...].
void check_one_token(const char* op, const char* operand, TensorView t);
/// @throws InvalidArgument if the inputs of a step have what only a whole sequence has.
template <class Inputs>
void check_inputs_of_step(const char* op, const Inputs& in) {
  LRNN_CHECK(!in.state_in && !in.lengths, InvalidArgument, op,
             ": state_in and lengths have no meaning here");
}
/// The dtype that a matrix beside activations of `dtype` should have: theirs, or on the CPU that of
/// a bfloat16 matrix beside float32.
[[nodiscard]] DType weight_dtype(const Context& ctx, TensorView weight, DType dtype);
/// `lengths` [batch] int32, absent or present. Values are the caller's duty: see check_lengths.
void check_lengths_operand(const char* op, const Context& ctx, TensorView lengths,
                           std::int64_t batch);

/// Whether the leading dimensions can be walked with one row stride.
[[nodiscard]] bool has_uniform_rows(const TensorView& t);
/// Distance in elements between neighbouring rows (all leading dimensions collapsed).
[[nodiscard]] std::int64_t row_stride(const TensorView& t);
/// Product of the leading dimensions.
[[nodiscard]] std::int64_t row_count(const TensorView& t);

void make_current(const Context& ctx);
[[noreturn]] void throw_built_without_cuda(const char* op);

}  // namespace lrnn::detail

#if LRNN_WITH_CUDA
#define LRNN_DISPATCH(op, ctx, args)                                                       \
  ((ctx).device().is_cuda() ? (::lrnn::detail::make_current(ctx), cuda::op((ctx), (args))) \
                            : cpu::op((ctx), (args)))
#else
#define LRNN_DISPATCH(op, ctx, args)                                        \
  ((ctx).device().is_cuda() ? ::lrnn::detail::throw_built_without_cuda(#op) \
                            : cpu::op((ctx), (args)))
#endif
