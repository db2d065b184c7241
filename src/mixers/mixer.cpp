#include "lrnn/mixers/mixer.hpp"

#include "lrnn/ops/elementwise.hpp"

#include "ops/dispatch.hpp"
#include "ops/norm_in_front.hpp"

namespace lrnn {
namespace {

void check_sequence(const char* pass, const char* operand, const Context& ctx, TensorView t,
                    std::int64_t d_model) {
  detail::check_rank(pass, operand, t, 3);
  detail::check_operand(pass, operand, ctx, t, {t.dim(0), t.dim(1), d_model}, t.dtype());
}

}  // namespace

std::unique_ptr<MixerSaved> Mixer::forward(Context& ctx, const MixerForward& args,
                                           bool keep_for_backward) const {
  constexpr const char* op = "Mixer::forward";
  check_sequence(op, "x", ctx, args.x, d_model_);
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t seqlen = args.x.dim(1);
  const DType dtype = args.x.dtype();
  detail::check_operand(op, "y", ctx, args.y, args.x.shape(), dtype);
  detail::check_optional(op, "integration_timesteps", ctx, args.integration_timesteps,
                         {batch, seqlen}, accumulate_dtype(dtype));
  detail::check_optional(op, "position_ids", ctx, args.position_ids, {batch, seqlen}, DType::int32);
  detail::check_lengths_operand(op, ctx, args.lengths, batch);
  LRNN_CHECK(!keep_for_backward || args.state_in == nullptr || args.state_in != args.state_out,
             InvalidArgument, op, ": state_out may be state_in only when nothing is kept");
  auto saved = do_forward(ctx, args, keep_for_backward);
  if (args.lengths) mask_padding(ctx, {.x = args.y, .lengths = args.lengths});
  if (saved) saved->lengths = args.lengths;
  return saved;
}

void Mixer::backward(Context& ctx, MixerSaved& saved, const MixerBackward& args) const {
  constexpr const char* op = "Mixer::backward";
  check_sequence(op, "dy", ctx, args.dy, d_model_);
  detail::check_operand(op, "dx", ctx, args.dx, args.dy.shape(), args.dy.dtype());
  if (!saved.lengths) return do_backward(ctx, saved, args);
  Tensor dy = ctx.clone(args.dy);
  mask_padding(ctx, {.x = dy, .lengths = saved.lengths});
  MixerBackward masked = args;
  masked.dy = dy;
  do_backward(ctx, saved, masked);
}

void Mixer::step(Context& ctx, const MixerStep& args) const {
  constexpr const char* op = "Mixer::step";
  check_sequence(op, "x", ctx, args.x, d_model_);
  LRNN_CHECK(args.x.dim(1) == 1, ShapeError, op, ": x: expected one token, got ", args.x.shape());
  detail::check_operand(op, "y", ctx, args.y, args.x.shape(), args.x.dtype());
  detail::check_optional(op, "integration_timesteps", ctx, args.integration_timesteps,
                         {args.x.dim(0), 1}, accumulate_dtype(args.x.dtype()));
  detail::check_norm_in_front(op, ctx, args.norm, args.x);
  if (args.norm == nullptr || takes_norm()) return do_step(ctx, args);
  add_norm_forward(ctx, *args.norm);
  MixerStep rest = args;
  rest.norm = nullptr;
  do_step(ctx, rest);
}

}  // namespace lrnn
