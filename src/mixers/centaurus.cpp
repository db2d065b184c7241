#include "lrnn/mixers/centaurus.hpp"

#include <cmath>
#include <numbers>

#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/linear.hpp"

#include "mixers/diagonal_recurrence.hpp"
#include "mixers/lane_recurrence.hpp"

namespace lrnn {
namespace {

using detail::LaneState;

constexpr ParameterOptions kRecurrence{.weight_decay = false, .keep_float32 = true};
constexpr ParameterOptions kProjection{.keep_float32 = true};

// -1/2 + i pi m / M, the same for all lanes.
void init_A(std::span<double> values, const Shape& shape, Rng&) {
  const auto substates = static_cast<std::size_t>(shape[1]);
  for (std::size_t i = 0; 2 * i < values.size(); ++i) {
    values[2 * i] = -0.5;
    values[2 * i + 1] =
        std::numbers::pi * static_cast<double>(i % substates) / static_cast<double>(substates);
  }
}

// Logarithms of steps log-uniformly spaced from 1e-3 to 1e-1.
void init_log_delta(std::span<double> values, const Shape&, Rng&) {
  const double step =
      values.size() > 1 ? std::log(100.0) / static_cast<double>(values.size() - 1) : 0.0;
  for (std::size_t n = 0; n < values.size(); ++n)
    values[n] = std::log(1e-3) + step * static_cast<double>(n);
}

Initializer scaled_normal(std::int64_t fan) {
  return init::normal(std::sqrt(2.0 / static_cast<double>(fan)));
}
Initializer scaled_uniform(std::int64_t fan) {
  return init::uniform(1.0 / std::sqrt(static_cast<double>(fan)));
}

struct ProjectionInit {
  Shape shape;
  Initializer init;
};
ProjectionInit init_B(CentaurusMode mode, std::int64_t h, std::int64_t n, std::int64_t m) {
  switch (mode) {
    case CentaurusMode::Neck:
      return {{n, h}, scaled_uniform(h)};
    case CentaurusMode::Pointwise:
      return {{n * m, h}, init::constant(1.0 / std::sqrt(static_cast<double>(h)))};
    case CentaurusMode::Dws:
      return {{h}, init::constant(1.0)};
    case CentaurusMode::Full:
      return {{n}, scaled_normal(h)};
  }
  throw InternalError("unknown CentaurusMode");
}
ProjectionInit init_C(CentaurusMode mode, std::int64_t h, std::int64_t n, std::int64_t m) {
  switch (mode) {
    case CentaurusMode::Neck:
      return {{h, n}, scaled_uniform(n)};
    case CentaurusMode::Pointwise:
      return {{h, n * m}, scaled_normal(n * m)};
    case CentaurusMode::Dws:
      return {{h}, init::constant(1.0)};
    case CentaurusMode::Full:
      return {{n}, scaled_normal(n)};
  }
  throw InternalError("unknown CentaurusMode");
}

Parameter& add_projection(const ParameterScope& scope, const char* name,
                          const ProjectionInit& from) {
  return scope.add(name, from.shape, from.init, kProjection);
}

}  // namespace

struct Centaurus::Saved final : MixerSaved {
  TensorView x;      // [B, L, H] input, zero at padding
  Tensor x_storage;  // owner of x, if there are lengths
  TensorView B;      // matrices in the dtype of x; absent where B and C are part of the weights
  Tensor B_storage;
  TensorView C;
  Tensor C_storage;
  Tensor v;  // neck: [B, L, N] B u, and w before C; narrower than a second reading of x
  Tensor w;
  Tensor chunk_states;
  detail::LaneRecurrence lanes;         // all modes but pointwise
  detail::DiagonalRecurrence diagonal;  // pointwise
};

CentaurusConfig Centaurus::resolve(CentaurusConfig config, const MixerBuild& build) {
  constexpr const char* field = "mixer_kwargs.Centaurus.";
  const std::int64_t h = build.d_model;
  LRNN_CHECK(config.sub_state_dim >= 1, ConfigError, field,
             "sub_state_dim: expected at least 1, got ", config.sub_state_dim);
  const bool derived = config.mode == CentaurusMode::Dws || config.mode == CentaurusMode::Full;
  const std::int64_t size = config.mode == CentaurusMode::Full ? h * h : h;
  if (!config.d_state) config.d_state = derived ? size : build.d_state;
  LRNN_CHECK(!derived || *config.d_state == size, ConfigError, field, "d_state: expected ",
             config.mode == CentaurusMode::Full ? "d_model^2 = " : "d_model = ", size,
             " with mode \"", enum_name(config.mode), "\", got ", *config.d_state);
  LRNN_CHECK(*config.d_state >= 1, ConfigError, field, "d_state: expected at least 1, got ",
             *config.d_state);
  return config;
}

Centaurus::Centaurus(const CentaurusConfig& config, const MixerBuild& build,
                     const ParameterScope& scope)
    : Mixer(build.d_model),
      mode_(config.mode),
      dstate_(*config.d_state),
      substates_(config.sub_state_dim),
      A_(scope.add("A", {dstate_, substates_, 2}, init_A, kRecurrence)),
      log_delta_(scope.add("log_delta", {dstate_}, init_log_delta, kRecurrence)),
      B_(add_projection(scope, "B", init_B(mode_, d_model(), dstate_, substates_))),
      C_(add_projection(scope, "C", init_C(mode_, d_model(), dstate_, substates_))),
      E_(mode_ == CentaurusMode::Pointwise
             ? nullptr
             : &scope.add("E", {dstate_, substates_}, init::normal(std::numbers::sqrt2),
                          kProjection)) {}

std::unique_ptr<MixerState> Centaurus::make_state(Context& ctx, std::int64_t batch, std::int64_t,
                                                  DType dtype) const {
  if (mode_ == CentaurusMode::Pointwise) {
    auto state = std::make_unique<detail::DiagonalState>();
    state->lrnn_state = ctx.zeros({batch, 2, dstate_ * substates_}, accumulate_dtype(dtype));
    return state;
  }
  auto state = std::make_unique<LaneState>();
  state->lrnn_state = ctx.zeros({batch, 2, dstate_, substates_}, accumulate_dtype(dtype));
  tabulate(ctx, dtype, *state);
  return state;
}

void Centaurus::tabulate(Context& ctx, DType dtype, LaneState& state) const {
  detail::tabulate_recurrence(ctx, recurrence(), state.tables);
  if (!projects()) return;
  const auto keep = [&](const Parameter& parameter, Tensor& table) {
    if (!table) table = ctx.empty(parameter.shape, dtype);
    cast(ctx, {.src = parameter.value, .dst = table});
  };
  keep(B_, state.B);
  keep(C_, state.C);
}

bool Centaurus::projects() const {
  return mode_ == CentaurusMode::Neck || mode_ == CentaurusMode::Pointwise;
}

LaneParameters Centaurus::lanes() const {
  const TensorView A = A_.value.reshape({dstate_ * substates_, 2});
  return {.method = Discretization::Euler,
          .lanes = dstate_ * substates_,
          .A_re = {.value = A.slice(1, 0, 1)},
          .A_im = {.value = A.slice(1, 1, 1)},
          .dt = {.value = log_delta_.value, .transform = LaneTransform::Exp}};
}

// Where B and C are diagonal they scale the read-out: the state is that of the plain input.
detail::LaneRecurrenceParameters Centaurus::recurrence() const {
  detail::LaneRecurrenceParameters p{.lanes = lanes(), .factors = {.C = E_->value}};
  if (projects()) return p;
  p.factors.left = B_.value;
  p.factors.right = C_.value;
  return p;
}

detail::LaneRecurrenceGradients Centaurus::recurrence_gradients() const {
  const MutableTensorView A = A_.grad.reshape({dstate_ * substates_, 2});
  detail::LaneRecurrenceGradients g{
      .A_re = A.slice(1, 0, 1), .A_im = A.slice(1, 1, 1), .dt = log_delta_.grad, .C = E_->grad};
  if (projects()) return g;
  g.left = B_.grad;
  g.right = C_.grad;
  return g;
}

Tensor Centaurus::drive(Context& ctx, const Saved& saved) const {
  Tensor v = ctx.empty({saved.x.dim(0), saved.x.dim(1), saved.B.dim(0)}, saved.x.dtype());
  linear_forward(ctx, {.x = saved.x, .weight = saved.B, .y = v});
  return v;
}

void Centaurus::scan(Context& ctx, const MixerForward& args, Saved& saved) const {
  const bool neck = projects();
  saved.lanes = detail::make_lane_recurrence(ctx, recurrence());
  if (neck) {
    saved.v = drive(ctx, saved);
    saved.w = ctx.empty(saved.v.shape(), saved.v.dtype());
  }
  lane_scan_forward(ctx, {.a = saved.lanes.a,
                          .a_low = saved.lanes.a_low,
                          .W = saved.lanes.W,
                          .v = neck ? TensorView(saved.v) : saved.x,
                          .lengths = args.lengths,
                          .state_in = LaneState::of(args.state_in),
                          .y = neck ? MutableTensorView(saved.w) : args.y,
                          .state_out = LaneState::of(args.state_out),
                          .chunk_states = saved.chunk_states});
  if (neck) linear_forward(ctx, {.x = saved.w, .weight = saved.C, .y = args.y});
}

void Centaurus::scan_pointwise(Context& ctx, const MixerForward& args, Saved& saved) const {
  const std::int64_t lane_count = dstate_ * substates_;
  saved.diagonal = detail::make_recurrence(ctx, lanes(), {});
  Tensor states = ctx.empty({args.x.dim(0), args.x.dim(1), 2, lane_count}, args.x.dtype());
  diagonal_scan_forward(ctx, {.multiplier = saved.diagonal.multiplier(),
                              .gamma = saved.diagonal.gamma,
                              .v = drive(ctx, saved),
                              .lengths = args.lengths,
                              .state_in = detail::DiagonalState::of(args.state_in),
                              .x = states,
                              .state_out = detail::DiagonalState::of(args.state_out),
                              .chunk_states = saved.chunk_states});
  const MutableTensorView rows =
      states.view().reshape({args.x.dim(0), args.x.dim(1), 2 * lane_count});
  linear_forward(ctx, {.x = rows.slice(2, 0, lane_count), .weight = saved.C, .y = args.y});
}

std::unique_ptr<MixerSaved> Centaurus::do_forward(Context& ctx, const MixerForward& args,
                                                  bool keep_for_backward) const {
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t seqlen = args.x.dim(1);
  const DType dtype = args.x.dtype();
  const bool pointwise = mode_ == CentaurusMode::Pointwise;
  if (args.state_out != nullptr && !pointwise)
    tabulate(ctx, dtype, state_as<LaneState>(*args.state_out));
  auto saved = std::make_unique<Saved>();
  saved->x = detail::without_padding(ctx, args.x, args.lengths, saved->x_storage);
  if (projects()) {
    saved->B = detail::in_dtype(ctx, B_.value, dtype, saved->B_storage);
    saved->C = detail::in_dtype(ctx, C_.value, dtype, saved->C_storage);
  }
  if (keep_for_backward) {
    const Shape shape = pointwise
                            ? Shape{batch, diagonal_scan_chunks(seqlen), 2, dstate_ * substates_}
                            : Shape{batch, lane_scan_chunks(seqlen), 2, dstate_, substates_};
    saved->chunk_states = ctx.empty(shape, accumulate_dtype(dtype));
  }
  if (pointwise)
    scan_pointwise(ctx, args, *saved);
  else
    scan(ctx, args, *saved);
  if (!keep_for_backward) return nullptr;
  return saved;
}

void Centaurus::scan_backward(Context& ctx, const Saved& saved, const MixerBackward& args) const {
  const bool neck = projects();
  Tensor dw, dv;
  if (neck) {
    dw = ctx.empty(saved.v.shape(), saved.v.dtype());
    dv = ctx.empty(saved.v.shape(), saved.v.dtype());
    linear_backward(ctx,
                    {.dy = args.dy, .x = saved.w, .weight = saved.C, .dx = dw, .dweight = C_.grad});
  }
  detail::lane_recurrence_backward(ctx, saved.lanes, recurrence(),
                                   {.a = {},
                                    .W = {},
                                    .v = neck ? TensorView(saved.v) : saved.x,
                                    .lengths = saved.lengths,
                                    .dy = neck ? TensorView(dw) : args.dy,
                                    .chunk_states = saved.chunk_states,
                                    .dstate_out = LaneState::of(args.dstate_out),
                                    .dv = neck ? MutableTensorView(dv) : args.dx,
                                    .dstate_in = LaneState::of(args.dstate_in)},
                                   recurrence_gradients());
  if (neck)
    linear_backward(ctx,
                    {.dy = dv, .x = saved.x, .weight = saved.B, .dx = args.dx, .dweight = B_.grad});
}

void Centaurus::scan_pointwise_backward(Context& ctx, const Saved& saved,
                                        const MixerBackward& args) const {
  const std::int64_t batch = args.dy.dim(0);
  const std::int64_t seqlen = args.dy.dim(1);
  const std::int64_t lane_count = dstate_ * substates_;
  const DType dtype = args.dy.dtype();
  const MutableTensorView A = A_.grad.reshape({lane_count, 2});
  Tensor v = drive(ctx, saved);
  Tensor states = ctx.empty({batch, seqlen, 2, lane_count}, dtype);
  // The imaginary parts of the states are not read out: their gradient is 0.
  Tensor dstates = ctx.zeros({batch, seqlen, 2, lane_count}, dtype);
  const auto real_part = [&](Tensor& planes) {
    return planes.view().reshape({batch, seqlen, 2 * lane_count}).slice(2, 0, lane_count);
  };
  linear_backward(ctx, {.dy = args.dy, .weight = saved.C, .dx = real_part(dstates)});
  detail::recurrence_backward(
      ctx, saved.diagonal, lanes(),
      {.multiplier = {},
       .dx = dstates,
       .v = v,
       .chunk_states = saved.chunk_states,
       .lengths = saved.lengths,
       .dstate_out = detail::DiagonalState::of(args.dstate_out),
       .dv = v,
       .x = states,
       .dstate_in = detail::DiagonalState::of(args.dstate_in)},
      {.A_re = A.slice(1, 0, 1), .A_im = A.slice(1, 1, 1), .dt = log_delta_.grad});
  linear_backward(ctx, {.dy = args.dy, .x = real_part(states), .dweight = C_.grad});
  linear_backward(ctx,
                  {.dy = v, .x = saved.x, .weight = saved.B, .dx = args.dx, .dweight = B_.grad});
}

void Centaurus::do_backward(Context& ctx, MixerSaved& base, const MixerBackward& args) const {
  const auto& saved = saved_as<Saved>(base);
  if (mode_ == CentaurusMode::Pointwise)
    scan_pointwise_backward(ctx, saved, args);
  else
    scan_backward(ctx, saved, args);
}

void Centaurus::do_step(Context& ctx, const MixerStep& args) const {
  if (mode_ == CentaurusMode::Pointwise) {
    static_cast<void>(do_forward(
        ctx, {.x = args.x, .state_in = &args.state, .y = args.y, .state_out = &args.state}, false));
    return;
  }
  auto& state = state_as<LaneState>(args.state);
  LaneScanStep step{.a = state.tables.a,
                    .a_low = state.tables.a_low,
                    .W = state.tables.W,
                    .v = args.x,
                    .y = args.y,
                    .state = state.lrnn_state};
  if (!projects()) return lane_scan_step(ctx, step);
  const Shape lanes = {args.x.dim(0), 1, dstate_};
  Tensor v = ctx.empty(lanes, args.x.dtype());
  Tensor w = ctx.empty(lanes, args.x.dtype());
  linear_forward(ctx, {.x = args.x, .weight = state.B, .y = v, .stable_weight = true});
  step.v = v;
  step.y = w;
  lane_scan_step(ctx, step);
  linear_forward(ctx, {.x = w, .weight = state.C, .y = args.y, .stable_weight = true});
}

}  // namespace lrnn
