#include "lrnn/mixers/s4.hpp"

#include <cmath>
#include <optional>
#include <vector>

#include "lrnn/ops/dplr_discretize.hpp"
#include "lrnn/ops/dplr_scan.hpp"
#include "lrnn/ops/elementwise.hpp"

#include "mixers/diagonal_recurrence.hpp"
#include "mixers/s4_common.hpp"
#include "mixers/s4_read_out.hpp"

namespace lrnn {
namespace {

// Operands of the scan that the parameters determine, or their gradients.
struct Transition {
  Tensor e;      // [2, H, N/2]
  Tensor e_low;  // of values alone
  Tensor w;      // [R, 2, H, N/2]
  Tensor k;      // [R, 2, H, N/2]
  Tensor b;      // [2, H, N/2]

  Transition(Context& ctx, const DplrParameters& p, bool zero) {
    const Shape plane = {2, p.heads, p.P.dim(2)};
    const Shape planes = {p.P.dim(0), 2, p.heads, p.P.dim(2)};
    const auto make = [&](const Shape& shape) {
      return zero ? ctx.zeros(shape, p.P.dtype()) : ctx.empty(shape, p.P.dtype());
    };
    e = make(plane);
    w = make(planes);
    k = make(planes);
    b = make(plane);
  }
};
void tabulate(Context& ctx, const DplrParameters& p, Transition& t) {
  dplr_discretize_forward(
      ctx, {.parameters = p, .e = t.e, .e_low = t.e_low, .w = t.w, .k = t.k, .b = t.b});
}
Transition make_transition(Context& ctx, const DplrParameters& p) {
  Transition t(ctx, p, false);
  t.e_low = ctx.empty(t.e.shape(), p.P.dtype());
  tabulate(ctx, p, t);
  return t;
}

struct S4State final : MixerState {
  Tensor lrnn_state;                     // [B, 2, H, N/2], planes
  std::optional<Transition> transition;  // as DiagonalTables are kept

  void visit(const Visitor& visitor) override { visitor("lrnn_state", lrnn_state); }

  static TensorView of(const MixerState* state) {
    return state == nullptr ? TensorView() : TensorView(state_as<S4State>(*state).lrnn_state);
  }
  static MutableTensorView of(MixerState* state) {
    return state == nullptr ? MutableTensorView()
                            : MutableTensorView(state_as<S4State>(*state).lrnn_state);
  }
};

// Takes l_kernel out of `tensors`; 0 if it is not there.
std::int64_t take_kernel_length(HostTensors& tensors) {
  const auto it = tensors.find("l_kernel");
  if (it == tensors.end()) return 0;
  const std::vector<double> values = it->second.values;
  tensors.erase(it);
  LRNN_CHECK(values.size() == 1 && values[0] >= 0 && values[0] < 0x1p53 &&
                 values[0] == std::floor(values[0]),
             ConfigError, "l_kernel: expected one integer of at least 0");
  return static_cast<std::int64_t>(values[0]);
}

}  // namespace

struct S4::Saved final : MixerSaved {
  TensorView x;      // [B, L, H] input, zero at padding
  Tensor x_storage;  // owner of x, if there are lengths
  Tensor s;          // [B, L, channels H] output of the state-space models
  Tensor chunk_states;
  Transition transition;

  Saved(Context& ctx, const DplrParameters& p) : transition(make_transition(ctx, p)) {}
};

S4Config S4::resolve(S4Config config, const MixerBuild& build) {
  LRNN_CHECK(config.rank <= kMaxDplrRank, ConfigError, "mixer_kwargs.S4.rank: expected at most ",
             kMaxDplrRank, ", got ", config.rank);
  detail::resolve_state_space("S4", config, build);
  return config;
}

S4::S4(const S4Config& config, const MixerBuild& build, const ParameterScope& scope)
    : Mixer(build.d_model),
      config_(config),
      p_(std::make_unique<detail::StateSpaceParameters>(
          detail::add_state_space_parameters("S4", config, build.d_model, scope))),
      head_(std::make_unique<detail::S4Head>(config, build.d_model, scope)) {}

S4::~S4() = default;

std::unique_ptr<MixerState> S4::make_state(Context& ctx, std::int64_t batch, std::int64_t,
                                           DType dtype) const {
  auto state = std::make_unique<S4State>();
  state->lrnn_state =
      ctx.zeros({batch, 2, d_model(), *config_.d_state / 2}, accumulate_dtype(dtype));
  state->transition.emplace(make_transition(ctx, transition()));
  return state;
}

DplrParameters S4::transition(const Values& v) const {
  return {.heads = d_model(),
          .A_re = {.value = v.A_real, .transform = config_.real_transform, .negate = true},
          .A_im = {.value = v.A_imag, .transform = config_.imag_transform, .negate = true},
          .dt = {.value = v.inv_dt, .transform = config_.dt_transform, .of_sinh = config_.dt_fast},
          .P = v.P,
          .B = v.B.reshape({*config_.n_ssm, *config_.d_state / 2, 2})};
}

DplrParameters S4::transition() const {
  return transition({.A_real = p_->A_real->value,
                     .A_imag = p_->A_imag->value,
                     .inv_dt = p_->inv_dt->value,
                     .P = p_->P->value,
                     .B = p_->B->value});
}

std::unique_ptr<MixerSaved> S4::do_forward(Context& ctx, const MixerForward& args,
                                           bool keep_for_backward) const {
  const std::int64_t batch = args.x.dim(0);
  const std::int64_t seqlen = args.x.dim(1);
  const DType dtype = args.x.dtype();
  if (args.state_out != nullptr)
    tabulate(ctx, transition(), *state_as<S4State>(*args.state_out).transition);
  auto saved = std::make_unique<Saved>(ctx, transition());
  saved->x = detail::without_padding(ctx, args.x, args.lengths, saved->x_storage);
  saved->s = ctx.empty({batch, seqlen, config_.channels * d_model()}, dtype);
  if (keep_for_backward)
    saved->chunk_states =
        ctx.empty({batch, dplr_scan_chunks(seqlen), 2, d_model(), *config_.d_state / 2},
                  accumulate_dtype(dtype));
  dplr_scan_forward(ctx, {.e = saved->transition.e,
                          .e_low = saved->transition.e_low,
                          .w = saved->transition.w,
                          .k = saved->transition.k,
                          .b = saved->transition.b,
                          .C = p_->C->value,
                          .D = p_->D->value,
                          .u = saved->x,
                          .lengths = args.lengths,
                          .state_in = S4State::of(args.state_in),
                          .y = saved->s,
                          .state_out = S4State::of(args.state_out),
                          .chunk_states = saved->chunk_states});
  head_->forward(ctx, saved->x, saved->s, args.y);
  if (!keep_for_backward) return nullptr;
  return saved;
}

void S4::do_backward(Context& ctx, MixerSaved& base, const MixerBackward& args) const {
  const auto& saved = saved_as<Saved>(base);
  Tensor ds = ctx.empty(saved.s.shape(), saved.s.dtype());
  Tensor dgate;
  if (head_->uses_input()) dgate = ctx.empty(args.dx.shape(), args.dx.dtype());
  head_->backward(ctx, saved.x, saved.s, args.dy, ds, dgate);
  const DplrParameters parameters = transition();
  Transition d(ctx, parameters, true);
  dplr_scan_backward(ctx, {.e = saved.transition.e,
                           .w = saved.transition.w,
                           .k = saved.transition.k,
                           .b = saved.transition.b,
                           .C = p_->C->value,
                           .D = p_->D->value,
                           .u = saved.x,
                           .lengths = saved.lengths,
                           .dy = ds,
                           .chunk_states = saved.chunk_states,
                           .dstate_out = S4State::of(args.dstate_out),
                           .du = args.dx,
                           .de = d.e,
                           .dw = d.w,
                           .dk = d.k,
                           .db = d.b,
                           .dC = p_->C->grad,
                           .dD = p_->D->grad,
                           .dstate_in = S4State::of(args.dstate_in)});
  dplr_discretize_backward(ctx,
                           {.parameters = parameters,
                            .de = d.e,
                            .dw = d.w,
                            .dk = d.k,
                            .db = d.b,
                            .dA_re = p_->A_real->grad,
                            .dA_im = p_->A_imag->grad,
                            .ddt = p_->inv_dt->grad,
                            .dP = p_->P->grad,
                            .dB = p_->B->grad.reshape({*config_.n_ssm, *config_.d_state / 2, 2})});
  if (dgate) add_to(ctx, {.src = dgate, .dst = args.dx});
}

void S4::do_step(Context& ctx, const MixerStep& args) const {
  auto& state = state_as<S4State>(args.state);
  const Transition& t = *state.transition;
  Tensor s = ctx.empty({args.x.dim(0), 1, config_.channels * d_model()}, args.x.dtype());
  dplr_scan_step(ctx, {.e = t.e,
                       .w = t.w,
                       .k = t.k,
                       .b = t.b,
                       .C = p_->C->value,
                       .D = p_->D->value,
                       .u = args.x,
                       .y = s,
                       .state = state.lrnn_state,
                       .activation = head_->step_activation(),
                       .twice = true});
  head_->step(ctx, args.x, s, args.y);
}

void S4::import_tensors(HostTensors& tensors) const {
  const std::int64_t length = take_kernel_length(tensors);
  if (length == 0) return;
  Context cpu = Context::cpu();
  const auto tensor = [&](const char* name, const Parameter& parameter) {
    const auto it = tensors.find(name);
    LRNN_CHECK(it != tensors.end(), ConfigError, name, ": expected beside l_kernel, got none");
    LRNN_CHECK(it->second.shape == parameter.shape, ConfigError, name, ": expected ",
               parameter.shape, ", got ", it->second.shape);
    return cpu.from_host_as(it->second.shape, DType::float64, it->second.values);
  };
  const Tensor A_real = tensor("A_real", *p_->A_real);
  const Tensor A_imag = tensor("A_imag", *p_->A_imag);
  const Tensor inv_dt = tensor("inv_dt", *p_->inv_dt);
  const Tensor P = tensor("P", *p_->P);
  const Tensor B = tensor("B", *p_->B);
  static_cast<void>(tensor("C", *p_->C));
  const DplrParameters parameters =
      transition({.A_real = A_real, .A_imag = A_imag, .inv_dt = inv_dt, .P = P, .B = B});
  const Transition t = make_transition(cpu, parameters);
  detail::restore_read_out(tensors.at("C").values, config_.channels,
                           {.heads = d_model(),
                            .states = *config_.d_state / 2,
                            .rank = config_.rank,
                            .e = cpu.to_host_as_double(t.e),
                            .w = cpu.to_host_as_double(t.w),
                            .k = cpu.to_host_as_double(t.k)},
                           length);
}

}  // namespace lrnn
