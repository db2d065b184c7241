#include "lrnn/ops/kv_cache.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_cache(const char* op, const Context& ctx, TensorView cache, TensorView rows,
                 const char* rows_name, TensorView positions, TensorView lengths) {
  detail::check_rank(op, rows_name, rows, 3);
  detail::check_rank(op, "cache", cache, 3);
  const Shape& rs = rows.shape();
  detail::check_rows(op, rows_name, ctx, rows, rs, rows.dtype());
  detail::check_operand(op, "cache", ctx, cache, {rs[0], cache.dim(1), rs[2]}, rows.dtype());
  detail::check_operand(op, "positions", ctx, positions, {rs[0]}, DType::int32);
  detail::check_lengths_operand(op, ctx, lengths, rs[0]);
}

}  // namespace

void kv_cache_append(Context& ctx, const KvCacheAppend& a) {
  check_cache("kv_cache_append", ctx, a.cache, a.src, "src", a.positions, a.lengths);
  if (a.src.numel() == 0) return;
  LRNN_DISPATCH(kv_cache_append, ctx, a);
}

void kv_cache_read(Context& ctx, const KvCacheRead& a) {
  check_cache("kv_cache_read", ctx, a.cache, a.dst, "dst", a.positions, a.lengths);
  if (a.dst.numel() == 0) return;
  LRNN_DISPATCH(kv_cache_read, ctx, a);
}

void advance_positions(Context& ctx, const AdvancePositions& a) {
  constexpr const char* op = "advance_positions";
  detail::check_rank(op, "positions", a.positions, 1);
  detail::check_operand(op, "positions", ctx, a.positions, a.positions.shape(), DType::int32);
  detail::check_lengths_operand(op, ctx, a.lengths, a.positions.dim(0));
  if (a.positions.numel() == 0) return;
  LRNN_DISPATCH(advance_positions, ctx, a);
}

}  // namespace lrnn
