#include "mixers/s4_common.hpp"

#include <algorithm>
#include <cmath>

#include "lrnn/ops/gated_activation.hpp"
#include "lrnn/ops/projected_activation.hpp"

#include "mixers/hippo.hpp"

namespace lrnn::detail {
namespace {

constexpr ParameterOptions kStateSpace{.weight_decay = false, .keep_float32 = true};
constexpr ParameterOptions kSkip{.keep_float32 = true};

std::string prefix(const char* name) {
  return concat("mixer_kwargs.", name, ".");
}

// Options of lrnnx that do not work there, or would change what the mixer is.
template <bool diagonal>
void refuse_options(const std::string& field, const StateSpaceConfig<diagonal>& c) {
  LRNN_CHECK(!c.transposed, ConfigError, field,
             "transposed: expected false (sequences are always [B, L, H]), got true");
  LRNN_CHECK(!c.bottleneck, ConfigError, field, "bottleneck: expected null, got ",
             c.bottleneck.value_or(0));
  LRNN_CHECK(!c.is_real, ConfigError, field, "is_real: expected false, got true");
  LRNN_CHECK(!c.swap_channels, ConfigError, field, "swap_channels: expected false, got true");
  LRNN_CHECK(!c.lr, ConfigError, field, "lr: expected null, got ", c.lr.value_or(0.0));
  LRNN_CHECK(c.wd == 0.0, ConfigError, field, "wd: expected 0, got ", c.wd);
  LRNN_CHECK(c.dropout == 0.0, ConfigError, field, "dropout: expected 0, got ", c.dropout);
  LRNN_CHECK(diagonal || !c.disc, ConfigError, field, "disc: an option of S4D alone");
}

template <bool diagonal>
void check_steps(const std::string& field, const StateSpaceConfig<diagonal>& c) {
  LRNN_CHECK(c.dt_min > 0.0 && std::isfinite(c.dt_min), ConfigError, field,
             "dt_min: expected a positive number, got ", c.dt_min);
  LRNN_CHECK(c.dt_max >= c.dt_min && std::isfinite(c.dt_max), ConfigError, field,
             "dt_max: expected a number of at least dt_min = ", c.dt_min, ", got ", c.dt_max);
  LRNN_CHECK(c.dt_transform != LaneTransform::Sigmoid || c.dt_max < 1.0, ConfigError, field,
             "dt_max: expected less than 1 with dt_transform \"sigmoid\", got ", c.dt_max);
  LRNN_CHECK(!c.deterministic || (c.dt_tie && c.dt_transform == LaneTransform::Exp), ConfigError,
             field, "deterministic: expected false unless dt_tie is true and dt_transform \"exp\"");
}

template <bool diagonal>
HippoOptions hippo_options(const StateSpaceConfig<diagonal>& c) {
  return {.init = c.init,
          .d_state = *c.d_state,
          .copies = *c.n_ssm,
          .rank = c.rank,
          .B_clip = c.B_clip};
}

// The initial values of A, B, C and P, computed when the first of them is needed.
class Hippo {
 public:
  Hippo(std::string field, HippoOptions options)
      : field_(std::move(field)), options_(std::move(options)) {}
  const HippoInit& get() {
    if (!value_) value_ = make_hippo(field_, options_);
    return *value_;
  }
  [[nodiscard]] const std::string& field() const { return field_; }

 private:
  std::string field_;
  HippoOptions options_;
  std::optional<HippoInit> value_;
};
using SharedHippo = std::shared_ptr<Hippo>;

// The parameter whose transform is `value`.
double inverse_transform(LaneTransform transform, double value, const std::string& option) {
  const double v = std::max(value, 1e-4);
  switch (transform) {
    case LaneTransform::Identity:
    case LaneTransform::Relu:
      return v;
    case LaneTransform::Exp:
      return std::log(v);
    case LaneTransform::Sigmoid:
      LRNN_CHECK(v < 1.0, ConfigError, option, ": \"sigmoid\" cannot give the initial value ", v);
      return std::log(v) - std::log1p(-v);
    case LaneTransform::Softplus:
      return v + std::log(-std::expm1(-v));
  }
  throw InternalError("unknown LaneTransform");
}

Initializer transformed(const SharedHippo& hippo, std::vector<double> HippoInit::*values,
                        LaneTransform transform, const char* option) {
  return [=](std::span<double> out, const Shape&, Rng&) {
    const std::vector<double>& from = hippo->get().*values;
    for (std::size_t i = 0; i < out.size(); ++i)
      out[i] = inverse_transform(transform, from[i], hippo->field() + option);
  };
}

void write_pair(std::span<double> out, std::size_t i, HippoInit::Complex value) {
  out[2 * i] = value.real();
  out[2 * i + 1] = value.imag();
}
// A complex number whose parts have variance 1/2 each.
HippoInit::Complex complex_normal(Rng& rng) {
  const double re = rng.normal();
  return {re / std::sqrt(2.0), rng.normal() / std::sqrt(2.0)};
}

Initializer init_B(const SharedHippo& hippo) {
  return [=](std::span<double> out, const Shape&, Rng&) {
    const auto& B = hippo->get().B;
    for (std::size_t i = 0; i < B.size(); ++i) write_pair(out, i, B[i]);
  };
}
Initializer init_P(const SharedHippo& hippo) {
  return [=](std::span<double> out, const Shape&, Rng& rng) {
    const HippoInit& h = hippo->get();
    for (std::size_t i = 0; i < h.P.size(); ++i) {
      const auto copy = i / static_cast<std::size_t>(h.states) % h.random_P.size();
      write_pair(out, i, h.random_P[copy] ? complex_normal(rng) : h.P[i]);
    }
  };
}
Initializer init_C(const SharedHippo& hippo, bool deterministic) {
  return [=](std::span<double> out, const Shape&, Rng& rng) {
    const std::size_t count = out.size() / 2;
    for (std::size_t i = 0; i < count; ++i) {
      if (!deterministic) {
        write_pair(out, i, complex_normal(rng));
        continue;
      }
      // Copies repeat along the inputs, whose number they divide.
      const auto& unit = hippo->get().unit;
      write_pair(out, i, unit[i % unit.size()]);
    }
  };
}

template <bool diagonal>
Initializer init_dt(const StateSpaceConfig<diagonal>& c, const std::string& field) {
  const double low = std::log(c.dt_min);
  const double high = std::log(c.dt_max);
  return [=](std::span<double> out, const Shape&, Rng& rng) {
    const double gaps = std::max(1.0, static_cast<double>(out.size()) - 1);
    for (std::size_t i = 0; i < out.size(); ++i) {
      double v = c.deterministic ? low + (high - low) * static_cast<double>(i) / gaps
                                 : rng.uniform(low, high);
      if (c.dt_transform != LaneTransform::Exp)
        v = inverse_transform(c.dt_transform, std::exp(v), field + "dt_transform");
      out[i] = c.dt_fast ? std::asinh(v) : v;
    }
  };
}

}  // namespace

template <bool diagonal>
void resolve_state_space(const char* name, StateSpaceConfig<diagonal>& c, const MixerBuild& build) {
  const std::string field = prefix(name);
  if (!c.d_state) c.d_state = build.d_state;
  if (!c.n_ssm) c.n_ssm = build.d_model;
  refuse_options(field, c);
  check_steps(field, c);
  LRNN_CHECK(c.channels >= 1, ConfigError, field, "channels: expected at least 1, got ",
             c.channels);
  LRNN_CHECK(*c.n_ssm >= 1 && build.d_model % *c.n_ssm == 0, ConfigError, field,
             "n_ssm: expected a divisor of d_model = ", build.d_model, ", got ", *c.n_ssm);
  check_hippo(field, hippo_options(c));
  LRNN_CHECK(!c.gate || *c.gate >= 1, ConfigError, field, "gate: expected at least 1 or null, got ",
             c.gate.value_or(0));
  LRNN_CHECK(!c.final_act || !c.postact, ConfigError, field,
             "postact: expected null unless final_act is null, got \"",
             enum_name(c.postact.value_or(FinalActivation::Glu)), "\"");
  const std::int64_t width = c.gate ? *c.gate : c.channels;
  LRNN_CHECK(c.final_act || c.postact || width == 1, ConfigError, field,
             "final_act: expected a name, because without output_linear the output would be ",
             width, " times as wide as the input, got null");
}

template <bool diagonal>
StateSpaceParameters add_state_space_parameters(const char* name,
                                                const StateSpaceConfig<diagonal>& c,
                                                std::int64_t d_model, const ParameterScope& scope) {
  const std::string field = prefix(name);
  const std::int64_t states = *c.d_state / 2;
  const auto hippo = std::make_shared<Hippo>(field, hippo_options(c));
  StateSpaceParameters p{};
  p.inv_dt = &scope.add("inv_dt", {d_model, c.dt_tie ? 1 : states}, init_dt(c, field), kStateSpace);
  p.C = &scope.add("C", {c.channels, d_model, states, 2}, init_C(hippo, c.deterministic),
                   kStateSpace);
  p.B = &scope.add("B", {1, *c.n_ssm, states, 2}, init_B(hippo), kStateSpace);
  p.A_real = &scope.add("A_real", {*c.n_ssm, states},
                        transformed(hippo, &HippoInit::decay, c.real_transform, "real_transform"),
                        kStateSpace);
  p.A_imag = &scope.add(
      "A_imag", {*c.n_ssm, states},
      transformed(hippo, &HippoInit::frequency, c.imag_transform, "imag_transform"), kStateSpace);
  if constexpr (!diagonal)
    p.P = &scope.add("P", {c.rank, *c.n_ssm, states, 2}, init_P(hippo), kStateSpace);
  p.D = &scope.add("D", {c.channels, d_model}, init::normal(1.0), kSkip);
  return p;
}

template void resolve_state_space(const char*, StateSpaceConfig<false>&, const MixerBuild&);
template void resolve_state_space(const char*, StateSpaceConfig<true>&, const MixerBuild&);
template StateSpaceParameters add_state_space_parameters(const char*,
                                                         const StateSpaceConfig<false>&,
                                                         std::int64_t, const ParameterScope&);
template StateSpaceParameters add_state_space_parameters(const char*, const StateSpaceConfig<true>&,
                                                         std::int64_t, const ParameterScope&);

template <bool diagonal>
S4Head::S4Head(const StateSpaceConfig<diagonal>& c, std::int64_t d_model,
               const ParameterScope& scope) {
  const std::int64_t width = d_model * (c.gate ? *c.gate : c.channels);
  const LinearOptions options{.bias = true};
  if (c.gate) {
    input_gate_.emplace(scope / "input_gate" / "0", d_model, width, options);
    if (*c.gate != c.channels)
      output_gate_.emplace(scope / "output_gate", d_model * c.channels, width, options);
  }
  if (c.final_act || c.postact)
    output_linear_.emplace(scope / "output_linear" / "0", width, d_model, options);
}
template S4Head::S4Head(const StateSpaceConfig<false>&, std::int64_t, const ParameterScope&);
template S4Head::S4Head(const StateSpaceConfig<true>&, std::int64_t, const ParameterScope&);

// [B, L, width] each.
struct S4Head::Values {
  Tensor first;   // GELU(s), if there is a gate
  Tensor gated;   // what the gate multiplies, if there is an output_gate
  Tensor gate;    // input_gate(u)
  Tensor inner;   // v, if there is a gate
  Tensor second;  // GELU(v)

  [[nodiscard]] const Tensor& before_gate() const { return gated ? gated : first; }
};

S4Head::Values S4Head::values(Context& ctx, TensorView u, TensorView s) const {
  Values x;
  if (!input_gate_) {
    x.second = ctx.empty(s.shape(), s.dtype());
    activation_forward(ctx, {.kind = Activation::Gelu, .x = s, .y = x.second, .twice = true});
    return x;
  }
  x.first = ctx.empty(s.shape(), s.dtype());
  activation_forward(ctx, {.kind = Activation::Gelu, .x = s, .y = x.first});
  const Shape shape = {u.dim(0), u.dim(1), input_gate_->out_features()};
  if (output_gate_) {
    x.gated = ctx.empty(shape, s.dtype());
    output_gate_->forward(ctx, x.first, x.gated);
  }
  x.gate = ctx.empty(shape, s.dtype());
  x.inner = ctx.empty(shape, s.dtype());
  input_gate_->forward(ctx, u, x.gate);
  gated_activation_forward(
      ctx, {.kind = Activation::Gelu, .value = x.before_gate(), .gate = x.gate, .y = x.inner});
  x.second = ctx.empty(shape, s.dtype());
  activation_forward(ctx, {.kind = Activation::Gelu, .x = x.inner, .y = x.second});
  return x;
}

void S4Head::forward(Context& ctx, TensorView u, TensorView s, MutableTensorView y) const {
  project(ctx, values(ctx, u, s).second, y);
}

void S4Head::step(Context& ctx, TensorView u, TensorView s, MutableTensorView y) const {
  if (uses_input()) return forward(ctx, u, s, y);
  project(ctx, s, y);
}

void S4Head::project(Context& ctx, TensorView activated, MutableTensorView y) const {
  if (!output_linear_) return ctx.copy(y, activated);
  projected_activation(ctx, {.kind = Activation::Gelu,
                             .x = activated,
                             .weight = output_linear_->weight_value(),
                             .bias = output_linear_->bias_value(),
                             .y = y});
}

void S4Head::backward(Context& ctx, TensorView u, TensorView s, TensorView dy, MutableTensorView ds,
                      MutableTensorView du) const {
  const Values x = values(ctx, u, s);
  Tensor d = ctx.empty(x.second.shape(), s.dtype());
  if (output_linear_) {
    Tensor last = ctx.empty(dy.shape(), dy.dtype());
    output_linear_->forward(ctx, x.second, last);
    activation_backward(ctx, {.kind = Activation::Gelu, .dy = dy, .x = last, .dx = last});
    output_linear_->backward(ctx, last, x.second, d);
  } else {
    ctx.copy(d, dy);
  }
  if (!input_gate_)
    return activation_backward(
        ctx, {.kind = Activation::Gelu, .dy = d, .x = s, .dx = ds, .twice = true});
  activation_backward(ctx, {.kind = Activation::Gelu, .dy = d, .x = x.inner, .dx = d});
  Tensor dgated = ctx.empty(d.shape(), d.dtype());
  Tensor dgate = ctx.empty(d.shape(), d.dtype());
  gated_activation_backward(ctx, {.kind = Activation::Gelu,
                                  .dy = d,
                                  .value = x.before_gate(),
                                  .gate = x.gate,
                                  .dvalue = dgated,
                                  .dgate = dgate});
  input_gate_->backward(ctx, dgate, u, du);
  if (output_gate_)
    output_gate_->backward(ctx, dgated, x.first, ds);
  else
    ctx.copy(ds, dgated);
  activation_backward(ctx, {.kind = Activation::Gelu, .dy = ds, .x = s, .dx = ds});
}

}  // namespace lrnn::detail
