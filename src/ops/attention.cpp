#include "lrnn/ops/attention.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_inputs(const char* op, const Context& ctx, const AttentionInputs& in) {
  detail::check_rank(op, "q", in.q, 3);
  detail::check_rank(op, "k", in.k, 3);
  const Shape& qs = in.q.shape();
  const DType dtype = in.q.dtype();
  LRNN_CHECK(in.num_heads >= 1 && in.num_heads_kv >= 1 && in.num_heads % in.num_heads_kv == 0,
             InvalidArgument, op, ": num_heads ", in.num_heads,
             " must be a multiple of num_heads_kv ", in.num_heads_kv);
  LRNN_CHECK(qs[2] % in.num_heads == 0, ShapeError, op, ": q: ", qs, " does not divide into ",
             in.num_heads, " heads");
  const Shape keys = {qs[0], in.positions ? in.k.dim(1) : qs[1],
                      qs[2] / in.num_heads * in.num_heads_kv};
  detail::check_rows(op, "q", ctx, in.q, qs, dtype);
  detail::check_rows(op, "k", ctx, in.k, keys, dtype);
  detail::check_rows(op, "v", ctx, in.v, keys, dtype);
  detail::check_lengths_operand(op, ctx, in.lengths, qs[0]);
  detail::check_optional(op, "positions", ctx, in.positions, {qs[0]}, DType::int32);
}

}  // namespace

void attention_forward(Context& ctx, const AttentionForward& a) {
  constexpr const char* op = "attention_forward";
  check_inputs(op, ctx, a.in);
  const Shape& qs = a.in.q.shape();
  const DType dtype = a.in.q.dtype();
  detail::check_rows(op, "o", ctx, a.o, qs, dtype);
  detail::check_optional(op, "lse", ctx, a.lse, {qs[0], a.in.num_heads, qs[1]},
                         accumulate_dtype(dtype));
  if (a.o.numel() == 0) return;
  LRNN_DISPATCH(attention_forward, ctx, a);
}

void attention_backward(Context& ctx, const AttentionBackward& a) {
  constexpr const char* op = "attention_backward";
  check_inputs(op, ctx, a.in);
  const Shape& qs = a.in.q.shape();
  const DType dtype = a.in.q.dtype();
  detail::check_rows(op, "o", ctx, a.o, qs, dtype);
  detail::check_operand(op, "lse", ctx, a.lse, {qs[0], a.in.num_heads, qs[1]},
                        accumulate_dtype(dtype));
  detail::check_rows(op, "d_o", ctx, a.d_o, qs, dtype);
  detail::check_rows(op, "dq", ctx, a.dq, qs, dtype);
  detail::check_rows(op, "dk", ctx, a.dk, a.in.k.shape(), dtype);
  detail::check_rows(op, "dv", ctx, a.dv, a.in.k.shape(), dtype);
  if (a.o.numel() == 0) return;
  LRNN_DISPATCH(attention_backward, ctx, a);
}

}  // namespace lrnn
