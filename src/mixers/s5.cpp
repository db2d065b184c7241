#include "lrnn/mixers/s5.hpp"

#include <cmath>
#include <numbers>

#include "lrnn/ops/complex_weight.hpp"
#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/linear.hpp"

#include "mixers/diagonal_recurrence.hpp"

namespace lrnn {
namespace {

constexpr ParameterOptions kRecurrence{.weight_decay = false, .keep_float32 = true};
constexpr ParameterOptions kProjection{.keep_float32 = true};

// Column 0: the inverse softplus of 1/2; column 1: pi n.
void init_A(std::span<double> values, const Shape&, Rng&) {
  for (std::size_t n = 0; 2 * n < values.size(); ++n) {
    values[2 * n] = std::log(std::expm1(0.5));
    values[2 * n + 1] = std::numbers::pi * static_cast<double>(n);
  }
}

Initializer log_spaced(double low, double high) {
  return [low, high](std::span<double> values, const Shape&, Rng&) {
    const double step =
        values.size() > 1 ? std::log(high / low) / static_cast<double>(values.size() - 1) : 0.0;
    for (std::size_t n = 0; n < values.size(); ++n)
      values[n] = std::log(low) + step * static_cast<double>(n);
  };
}

Initializer scaled_normal(std::int64_t fan) {
  return init::normal(std::sqrt(2.0 / static_cast<double>(fan)));
}

Discretization method_of(S5Discretization d) {
  switch (d) {
    case S5Discretization::Zoh:
      return Discretization::Zoh;
    case S5Discretization::Bilinear:
      return Discretization::Bilinear;
    case S5Discretization::Dirac:
      return Discretization::Dirac;
    case S5Discretization::None:
      return Discretization::None;
  }
  throw InternalError("S5: unknown discretization");
}

}  // namespace

struct S5::Saved final : MixerSaved {
  TensorView x;      // [B, L, H] input, zero at padding
  Tensor x_storage;  // owner of x, if there are lengths
  TensorView B;      // [N, H] in the dtype of x
  Tensor B_storage;  // owner of B, if the parameter has another dtype
  TensorView D;      // [H, H] in the dtype of x
  Tensor D_storage;
  Tensor C;  // [H, 2, N] in the dtype of x
  Tensor v;  // [B, L, N] drive before gamma, unless it is larger than x: then computed again
  Tensor chunk_states;
  detail::DiagonalRecurrence recurrence;
};

S5Config S5::resolve(S5Config config, const MixerBuild& build) {
  if (!config.d_state) config.d_state = build.d_state;
  LRNN_CHECK(*config.d_state >= 1, ConfigError,
             "mixer_kwargs.S5.d_state: expected at least 1, got ", *config.d_state);
  LRNN_CHECK(config.dt_min > 0.0 && std::isfinite(config.dt_min), ConfigError,
             "mixer_kwargs.S5.dt_min: expected a positive number, got ", config.dt_min);
  LRNN_CHECK(config.dt_max >= config.dt_min && std::isfinite(config.dt_max), ConfigError,
             "mixer_kwargs.S5.dt_max: expected a number of at least dt_min = ", config.dt_min,
             ", got ", config.dt_max);
  LRNN_CHECK(!config.conj_sym, ConfigError,
             "mixer_kwargs.S5.conj_sym: expected false (all states are independent), got true");
  LRNN_CHECK(!config.event || config.discretization != S5Discretization::None, ConfigError,
             "mixer_kwargs.S5.event: expected false with discretization \"no_discretization\" "
             "(there is no step to scale), got true");
  return config;
}

S5::S5(const S5Config& config, const MixerBuild& build, const ParameterScope& scope)
    : Mixer(build.d_model),
      dstate_(*config.d_state),
      discretization_(config.discretization),
      event_(config.event),
      A_(scope.add("A", {dstate_, 2}, init_A, kRecurrence)),
      B_(scope.add("B", {dstate_, d_model()},
                   init::constant(1.0 / std::sqrt(static_cast<double>(d_model()))), kProjection)),
      log_dt_(
          scope.add("log_dt", {dstate_}, log_spaced(config.dt_min, config.dt_max), kRecurrence)),
      C_(scope.add("C", {d_model(), dstate_, 2}, scaled_normal(dstate_), kProjection)),
      D_(scope.add("D", {d_model(), d_model()}, scaled_normal(d_model()), kProjection)) {}

std::unique_ptr<MixerState> S5::make_state(Context& ctx, std::int64_t batch, std::int64_t,
                                           DType dtype) const {
  auto state = std::make_unique<detail::DiagonalState>();
  state->lrnn_state = ctx.zeros({batch, 2, dstate_}, accumulate_dtype(dtype));
  if (!event_) tabulate(ctx, dtype, state->tables);
  return state;
}

void S5::tabulate(Context& ctx, DType dtype, detail::DiagonalTables& tables) const {
  detail::tabulate_recurrence(ctx, lanes(), tables);
  if (!tables.B) tables.B = ctx.empty({dstate_, d_model()}, dtype);
  if (!tables.C) tables.C = ctx.empty({d_model(), 2, dstate_}, dtype);
  if (!tables.D) tables.D = ctx.empty({d_model(), d_model()}, dtype);
  cast(ctx, {.src = B_.value, .dst = tables.B});
  read_out(ctx, tables.C);
  transpose(ctx, {.src = D_.value, .dst = tables.D});
}

void S5::read_out(Context& ctx, MutableTensorView C) const {
  complex_weight_forward(ctx, {.product = ComplexProduct::ReadOut,
                               .re = C_.value.slice(2, 0, 1),
                               .im = C_.value.slice(2, 1, 1),
                               .weight = C});
}

LaneParameters S5::lanes() const {
  return {.method = method_of(discretization_),
          .lanes = dstate_,
          .A_re = {.value = A_.value.slice(1, 0, 1),
                   .transform = LaneTransform::Softplus,
                   .negate = true},
          .A_im = {.value = A_.value.slice(1, 1, 1)},
          .dt = {.value = log_dt_.value, .transform = LaneTransform::Exp}};
}

Tensor S5::drive(Context& ctx, const Saved& saved) const {
  Tensor v = ctx.empty({saved.x.dim(0), saved.x.dim(1), dstate_}, saved.x.dtype());
  linear_forward(ctx, {.x = saved.x, .weight = saved.B, .y = v});
  return v;
}

std::unique_ptr<MixerSaved> S5::do_forward(Context& ctx, const MixerForward& args,
                                           bool keep_for_backward) const {
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t seqlen = args.x.dim(1);
  const DType dtype = args.x.dtype();
  if (!event_ && args.state_out != nullptr)
    tabulate(ctx, dtype, state_as<detail::DiagonalState>(*args.state_out).tables);
  auto saved = std::make_unique<Saved>();
  saved->x = detail::without_padding(ctx, args.x, args.lengths, saved->x_storage);
  saved->recurrence =
      detail::make_recurrence(ctx, lanes(), event_ ? args.integration_timesteps : TensorView());
  saved->B = detail::in_dtype(ctx, B_.value, dtype, saved->B_storage);
  saved->D = detail::in_dtype(ctx, D_.value, dtype, saved->D_storage);
  saved->C = ctx.empty({d_model(), 2, dstate_}, dtype);
  read_out(ctx, saved->C);
  if (keep_for_backward)
    saved->chunk_states =
        ctx.empty({batch, diagonal_scan_chunks(seqlen), 2, dstate_}, accumulate_dtype(dtype));
  Tensor states = ctx.empty({batch, seqlen, 2, dstate_}, dtype);
  Tensor v = drive(ctx, *saved);
  diagonal_scan_forward(ctx, {.multiplier = saved->recurrence.multiplier(),
                              .gamma = saved->recurrence.gamma,
                              .v = v,
                              .lengths = args.lengths,
                              .state_in = detail::DiagonalState::of(args.state_in),
                              .x = states,
                              .state_out = detail::DiagonalState::of(args.state_out),
                              .chunk_states = saved->chunk_states});
  // The thin product first: the other one, bound by arithmetic, adds to y at little cost. D is
  // indexed [in, out]: u D is what the backward pass of a linear layer with weight D gives.
  linear_forward(ctx, {.x = states.view().reshape({batch, seqlen, 2 * dstate_}),
                       .weight = saved->C.view().reshape({d_model(), 2 * dstate_}),
                       .y = args.y});
  linear_backward(ctx, {.dy = saved->x, .weight = saved->D, .dx = args.y, .accumulate_dx = true});
  if (!keep_for_backward) return nullptr;
  if (v.view().numel() <= saved->x.numel()) saved->v = std::move(v);
  return saved;
}

void S5::do_backward(Context& ctx, MixerSaved& base, const MixerBackward& args) const {
  const auto& saved = saved_as<Saved>(base);
  const std::int64_t batch = args.dy.dim(0);
  const std::int64_t seqlen = args.dy.dim(1);
  const DType dtype = args.dy.dtype();
  const Shape rows = {batch, seqlen, 2 * dstate_};
  Tensor again;
  if (!saved.v) again = drive(ctx, saved);
  const TensorView v = saved.v ? saved.v : again;
  Tensor dv = ctx.empty(v.shape(), dtype);
  Tensor states = ctx.empty({batch, seqlen, 2, dstate_}, dtype);
  Tensor dstates = ctx.empty({batch, seqlen, 2, dstate_}, dtype);
  linear_backward(ctx, {.dy = args.dy,
                        .weight = saved.C.view().reshape({d_model(), 2 * dstate_}),
                        .dx = dstates.view().reshape(rows)});
  Tensor dtau;
  if (saved.recurrence.tau && args.dintegration_timesteps)
    dtau = ctx.empty({batch, seqlen}, accumulate_dtype(dtype));
  detail::recurrence_backward(
      ctx, saved.recurrence, lanes(),
      {.multiplier = {},
       .dx = dstates,
       .v = v,
       .chunk_states = saved.chunk_states,
       .lengths = saved.lengths,
       .dstate_out = detail::DiagonalState::of(args.dstate_out),
       .dv = dv,
       .x = states,
       .dtau = dtau,
       .dstate_in = detail::DiagonalState::of(args.dstate_in)},
      {.A_re = A_.grad.slice(1, 0, 1), .A_im = A_.grad.slice(1, 1, 1), .dt = log_dt_.grad});
  if (dtau) add_to(ctx, {.src = dtau, .dst = args.dintegration_timesteps});

  Tensor dC = ctx.zeros({d_model(), 2, dstate_}, accumulate_dtype(dtype));
  linear_backward(ctx, {.dy = args.dy,
                        .x = states.view().reshape(rows),
                        .dweight = dC.view().reshape({d_model(), 2 * dstate_})});
  complex_weight_backward(ctx, {.product = ComplexProduct::ReadOut,
                                .dweight = dC,
                                .dre = C_.grad.slice(2, 0, 1),
                                .dim = C_.grad.slice(2, 1, 1)});

  linear_backward(ctx,
                  {.dy = dv, .x = saved.x, .weight = saved.B, .dx = args.dx, .dweight = B_.grad});
  // The roles of u D above, exchanged: dy D^T, and dD = u^T dy.
  linear_forward(ctx, {.x = args.dy, .weight = saved.D, .y = args.dx, .accumulate = true});
  linear_backward(ctx, {.dy = saved.x, .x = args.dy, .dweight = D_.grad});
}

void S5::do_step(Context& ctx, const MixerStep& args) const {
  if (!event_) {
    const auto& tables = state_as<detail::DiagonalState>(args.state).tables;
    return detail::diagonal_step(ctx, args, tables.D);
  }
  static_cast<void>(do_forward(ctx,
                               {.x = args.x,
                                .integration_timesteps = args.integration_timesteps,
                                .state_in = &args.state,
                                .y = args.y,
                                .state_out = &args.state},
                               false));
}

}  // namespace lrnn
