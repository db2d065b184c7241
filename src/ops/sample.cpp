#include "lrnn/ops/sample.hpp"

#include <cmath>

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

void check_options(const char* op, const SampleOptions& o) {
  LRNN_CHECK(std::isfinite(o.temperature) && o.temperature >= 0.0, ConfigError, op,
             ": temperature: expected >= 0, got ", o.temperature);
  LRNN_CHECK(o.top_k >= 0, ConfigError, op, ": top_k: expected >= 0, got ", o.top_k);
  LRNN_CHECK(o.top_p > 0.0 && o.top_p <= 1.0, ConfigError, op, ": top_p: expected (0, 1], got ",
             o.top_p);
  LRNN_CHECK(o.min_p >= 0.0 && o.min_p < 1.0, ConfigError, op, ": min_p: expected [0, 1), got ",
             o.min_p);
  LRNN_CHECK(std::isfinite(o.repetition_penalty) && o.repetition_penalty > 0.0, ConfigError, op,
             ": repetition_penalty: expected > 0, got ", o.repetition_penalty);
}

Shape drop_last(const Shape& shape) {
  Shape out;
  for (int i = 0; i + 1 < shape.rank(); ++i) out.set(i, shape[i]);
  return out;
}

}  // namespace

void sample_forward(Context& ctx, const SampleForward& args) {
  constexpr const char* op = "sample_forward";
  const SampleOptions& o = args.options;
  check_options(op, o);
  LRNN_CHECK(args.logits && args.logits.rank() > 0 && args.logits.dim(-1) > 0, ShapeError, op,
             ": logits: expected [..., V] with V > 0, got ", args.logits.shape());
  const std::int64_t vocab_size = args.logits.dim(-1);
  const std::int64_t rows = args.logits.numel() / vocab_size;
  LRNN_CHECK(vocab_size <= (std::int64_t{1} << 22), ShapeError, op,
             ": logits: expected V <= 2^22, got ", vocab_size);
  detail::check_rows(op, "logits", ctx, args.logits, args.logits.shape(), args.logits.dtype());
  LRNN_CHECK(args.counters || o.temperature == 0.0 || o.top_k == 1, ShapeError, op,
             ": counters are required unless greedy");
  detail::check_optional(op, "counters", ctx, args.counters, {rows}, DType::int64);
  LRNN_CHECK(args.seen || o.repetition_penalty == 1.0, ShapeError, op,
             ": seen is required with a repetition penalty");
  detail::check_optional(op, "seen", ctx, args.seen, {rows, seen_words(vocab_size)}, DType::int32);
  detail::check_operand(op, "ids", ctx, args.ids, drop_last(args.logits.shape()), DType::int32);
  LRNN_DISPATCH(sample_forward, ctx, args);
}

void mark_seen(Context& ctx, const MarkSeen& args) {
  constexpr const char* op = "mark_seen";
  detail::check_rank(op, "ids", args.ids, 2);
  const std::int64_t rows = args.ids.dim(0);
  detail::check_operand(op, "ids", ctx, args.ids, args.ids.shape(), DType::int32);
  LRNN_CHECK(args.vocab_size > 0, ShapeError, op, ": vocab_size: expected > 0, got ",
             args.vocab_size);
  detail::check_operand(op, "seen", ctx, args.seen, {rows, seen_words(args.vocab_size)},
                        DType::int32);
  detail::check_lengths_operand(op, ctx, args.lengths, rows);
  LRNN_DISPATCH(mark_seen, ctx, args);
}

}  // namespace lrnn
