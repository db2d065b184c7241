#include "lrnn/mixers/lru.hpp"

#include <algorithm>
#include <cmath>

#include "lrnn/ops/complex_weight.hpp"
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/linear_skip.hpp"

#include "mixers/diagonal_recurrence.hpp"

namespace lrnn {
namespace {

constexpr ParameterOptions kRecurrence{.weight_decay = false, .keep_float32 = true};
constexpr ParameterOptions kProjection{.keep_float32 = true};

// A uniform draw away from 0, whose logarithm is taken.
double positive_uniform(Rng& rng) {
  return std::max(rng.uniform(), 0x1p-24);
}

// -log |lambda| for |lambda|^2 uniform in [r_min^2, r_max^2], without cancellation at |lambda| = 1.
double random_decay(double r_min, double r_max, Rng& rng) {
  const double u = positive_uniform(rng);
  const double spread = r_max * r_max - r_min * r_min;
  const double square = u * spread + r_min * r_min;
  const double rest = (1.0 - u) * spread + (1.0 - r_max * r_max);  // 1 - square
  return -0.5 * (square < 0.5 ? std::log(square) : std::log1p(-rest));
}

// gamma_log starts at log sqrt(1 - |lambda|^2), so it shares the draws of nu_log, which is
// initialised before it.
Initializer nu_init(const LruConfig& config, std::shared_ptr<std::vector<double>> decay) {
  return [config, decay](std::span<double> values, const Shape&, Rng& rng) {
    decay->clear();
    for (double& v : values) {
      decay->push_back(random_decay(config.r_min, config.r_max, rng));
      v = std::log(decay->back());
    }
  };
}
Initializer gamma_init(std::shared_ptr<std::vector<double>> decay) {
  return [decay](std::span<double> values, const Shape&, Rng&) {
    LRNN_CHECK(decay->size() == values.size(), InternalError,
               "LRU: gamma_log initialised before nu_log");
    for (std::size_t n = 0; n < values.size(); ++n)
      values[n] = 0.5 * std::log(-std::expm1(-2.0 * (*decay)[n]));
  };
}
Initializer theta_init(double max_phase) {
  return [max_phase](std::span<double> values, const Shape&, Rng& rng) {
    for (double& v : values) v = std::log(max_phase * positive_uniform(rng));
  };
}

Initializer scaled_normal(std::int64_t fan) {
  return init::normal(1.0 / std::sqrt(static_cast<double>(fan)));
}

}  // namespace

struct Lru::Saved final : MixerSaved {
  TensorView x;      // [B, L, H] input, zero at padding
  Tensor x_storage;  // owner of x, if there are lengths
  Tensor B;          // [2, N, H] in the dtype of x
  Tensor C;          // [H, 2, N] in the dtype of x
  Tensor v;  // [B, L, 2, N] drive before gamma, unless it is larger than x: then computed again
  Tensor chunk_states;
  detail::DiagonalRecurrence recurrence;
};

LruConfig Lru::resolve(LruConfig config, const MixerBuild& build) {
  if (!config.d_state) config.d_state = build.d_state;
  LRNN_CHECK(*config.d_state >= 1, ConfigError,
             "mixer_kwargs.LRU.d_state: expected at least 1, got ", *config.d_state);
  LRNN_CHECK(config.r_max > 0.0 && config.r_max <= 1.0, ConfigError,
             "mixer_kwargs.LRU.r_max: expected a number in (0, 1], got ", config.r_max);
  LRNN_CHECK(config.r_min >= 0.0 && config.r_min < 1.0 && config.r_min <= config.r_max, ConfigError,
             "mixer_kwargs.LRU.r_min: expected a number in [0, 1) up to r_max = ", config.r_max,
             ", got ", config.r_min);
  LRNN_CHECK(config.max_phase > 0.0 && std::isfinite(config.max_phase), ConfigError,
             "mixer_kwargs.LRU.max_phase: expected a positive number, got ", config.max_phase);
  return config;
}

Lru::Lru(const LruConfig& config, const MixerBuild& build, const ParameterScope& scope)
    : Lru(config, build, scope, std::make_shared<std::vector<double>>()) {}

Lru::Lru(const LruConfig& config, const MixerBuild& build, const ParameterScope& scope,
         const std::shared_ptr<std::vector<double>>& decay)
    : Mixer(build.d_model),
      dstate_(*config.d_state),
      nu_log_(scope.add("nu_log", {dstate_}, nu_init(config, decay), kRecurrence)),
      theta_log_(scope.add("theta_log", {dstate_}, theta_init(config.max_phase), kRecurrence)),
      B_re_(scope.add("B_re", {dstate_, d_model()}, scaled_normal(2 * d_model()), kProjection)),
      B_im_(scope.add("B_im", {dstate_, d_model()}, scaled_normal(2 * d_model()), kProjection)),
      C_re_(scope.add("C_re", {d_model(), dstate_}, scaled_normal(dstate_), kProjection)),
      C_im_(scope.add("C_im", {d_model(), dstate_}, scaled_normal(dstate_), kProjection)),
      D_(scope.add("D", {d_model()}, init::normal(1.0), kRecurrence)),
      gamma_log_(scope.add("gamma_log", {dstate_}, gamma_init(decay), kRecurrence)) {}

std::unique_ptr<MixerState> Lru::make_state(Context& ctx, std::int64_t batch, std::int64_t,
                                            DType dtype) const {
  auto state = std::make_unique<detail::DiagonalState>();
  state->lrnn_state = ctx.zeros({batch, 2, dstate_}, accumulate_dtype(dtype));
  tabulate(ctx, dtype, state->tables);
  return state;
}

void Lru::tabulate(Context& ctx, DType dtype, detail::DiagonalTables& tables) const {
  detail::tabulate_recurrence(ctx, lanes(), tables);
  if (!tables.B) tables.B = ctx.empty({2, dstate_, d_model()}, dtype);
  if (!tables.C) tables.C = ctx.empty({d_model(), 2, dstate_}, dtype);
  project_weights(ctx, tables.B, tables.C);
}

void Lru::project_weights(Context& ctx, MutableTensorView B, MutableTensorView C) const {
  complex_weight_forward(
      ctx, {.product = ComplexProduct::Drive, .re = B_re_.value, .im = B_im_.value, .weight = B});
  complex_weight_forward(
      ctx, {.product = ComplexProduct::ReadOut, .re = C_re_.value, .im = C_im_.value, .weight = C});
}

LaneParameters Lru::lanes() const {
  return {.method = Discretization::Exponential,
          .lanes = dstate_,
          .A_re = {.value = nu_log_.value, .transform = LaneTransform::Exp, .negate = true},
          .A_im = {.value = theta_log_.value, .transform = LaneTransform::Exp},
          .gamma_log = gamma_log_.value};
}

Tensor Lru::drive(Context& ctx, const Saved& saved) const {
  const std::int64_t width = 2 * dstate_;
  Tensor v = ctx.empty({saved.x.dim(0), saved.x.dim(1), 2, dstate_}, saved.x.dtype());
  linear_forward(ctx, {.x = saved.x,
                       .weight = saved.B.view().reshape({width, d_model()}),
                       .y = v.view().reshape({saved.x.dim(0), saved.x.dim(1), width})});
  return v;
}

std::unique_ptr<MixerSaved> Lru::do_forward(Context& ctx, const MixerForward& args,
                                            bool keep_for_backward) const {
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t seqlen = args.x.dim(1);
  const DType dtype = args.x.dtype();
  if (args.state_out != nullptr)
    tabulate(ctx, dtype, state_as<detail::DiagonalState>(*args.state_out).tables);
  auto saved = std::make_unique<Saved>();
  saved->x = detail::without_padding(ctx, args.x, args.lengths, saved->x_storage);
  saved->recurrence = detail::make_recurrence(ctx, lanes(), {});
  saved->B = ctx.empty({2, dstate_, d_model()}, dtype);
  saved->C = ctx.empty({d_model(), 2, dstate_}, dtype);
  project_weights(ctx, saved->B, saved->C);
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
  linear_skip_forward(ctx, {.x = states.view().reshape({batch, seqlen, 2 * dstate_}),
                            .weight = saved->C.view().reshape({d_model(), 2 * dstate_}),
                            .skip = saved->x,
                            .scale = D_.value,
                            .y = args.y});
  if (!keep_for_backward) return nullptr;
  if (v.view().numel() <= saved->x.numel()) saved->v = std::move(v);
  return saved;
}

void Lru::do_backward(Context& ctx, MixerSaved& base, const MixerBackward& args) const {
  const auto& saved = saved_as<Saved>(base);
  const std::int64_t batch = args.dy.dim(0);
  const std::int64_t seqlen = args.dy.dim(1);
  const std::int64_t width = 2 * dstate_;
  const DType dtype = args.dy.dtype();
  const Shape rows = {batch, seqlen, width};
  Tensor again;
  if (!saved.v) again = drive(ctx, saved);
  const TensorView v = saved.v ? saved.v : again;
  Tensor dv = ctx.empty(v.shape(), dtype);
  Tensor states = ctx.empty(v.shape(), dtype);
  Tensor dstates = ctx.empty(v.shape(), dtype);
  const TensorView C = saved.C.view().reshape({d_model(), width});
  linear_backward(ctx, {.dy = args.dy, .weight = C, .dx = dstates.view().reshape(rows)});
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
       .dstate_in = detail::DiagonalState::of(args.dstate_in)},
      {.A_re = nu_log_.grad, .A_im = theta_log_.grad, .gamma_log = gamma_log_.grad});

  // Zeroed at once: every launch costs time.
  Tensor sums = ctx.zeros({2, d_model() * width}, accumulate_dtype(dtype));
  const MutableTensorView dC = sums.view().slice(0, 0, 1).reshape({d_model(), 2, dstate_});
  const MutableTensorView dB = sums.view().slice(0, 1, 1).reshape({2, dstate_, d_model()});
  linear_backward(
      ctx,
      {.dy = args.dy, .x = states.view().reshape(rows), .dweight = dC.reshape({d_model(), width})});
  complex_weight_backward(
      ctx,
      {.product = ComplexProduct::ReadOut, .dweight = dC, .dre = C_re_.grad, .dim = C_im_.grad});

  linear_skip_backward(ctx, {.dv = dv.view().reshape(rows),
                             .weight = saved.B.view().reshape({width, d_model()}),
                             .dy = args.dy,
                             .x = saved.x,
                             .scale = D_.value,
                             .dx = args.dx,
                             .dscale = D_.grad});
  linear_backward(
      ctx,
      {.dy = dv.view().reshape(rows), .x = saved.x, .dweight = dB.reshape({width, d_model()})});
  complex_weight_backward(
      ctx, {.product = ComplexProduct::Drive, .dweight = dB, .dre = B_re_.grad, .dim = B_im_.grad});
}

void Lru::do_step(Context& ctx, const MixerStep& args) const {
  detail::diagonal_step(ctx, args, D_.value);
}

}  // namespace lrnn
