#include <tuple>

#include "lrnn/ops/discretize.hpp"
#include "lrnn/ops/lane_scan.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Options {
  std::string name;
  std::int64_t batch = 2;
  std::int64_t seqlen = 5;
  std::int64_t inputs = 3;
  std::int64_t substates = 2;
  std::int64_t groups = 1;
  std::int64_t channels = 1;
  bool real_weight = false;
  bool skip = true;
  bool lengths = false;
  // Multipliers: drawn themselves, or made by discretize from rates, angles and steps.
  bool discretized = false;
  bool two_floats = false;  // multipliers that are drawn
  Discretization method = Discretization::Zoh;
  double a_low = -0.7, a_high = 0.7;
  double angle = 3.0;
  double rate_low = -1.0, rate_high = 1.0;  // softplus^-1 of -Re A
  double dt_low = -2.0, dt_high = 0.0;      // log dt
  bool gradcheck = true;
  double gradient_step = 1e-3;

  [[nodiscard]] std::int64_t lanes() const { return inputs * groups; }
  [[nodiscard]] std::int64_t outputs() const { return groups > 1 ? groups : channels * inputs; }
};

LaneParameters parameters(const Options& o, Tensors& t) {
  return {.method = o.method,
          .lanes = o.lanes() * o.substates,
          .A_re = {.value = t["A_re"], .transform = LaneTransform::Softplus, .negate = true},
          .A_im = {.value = t["A_im"]},
          .dt = {.value = t["dt"], .transform = LaneTransform::Exp}};
}

MutableTensorView flat(const Options& o, Tensor& planes) {
  return planes.view().reshape({2, o.lanes() * o.substates});
}

TensorView optional(Tensors& t, const char* name) {
  return t.contains(name) ? TensorView(t[name]) : TensorView();
}

void make_multipliers(const Options& o, Context& ctx, Tensors& t) {
  if (o.discretized)
    discretize_forward(
        ctx, {.parameters = parameters(o, t), .a = flat(o, t["a"]), .a_low = flat(o, t["a_low"])});
}

void run_forward(const Options& o, Context& ctx, Tensors& t, TensorView state_in,
                 MutableTensorView state_out) {
  make_multipliers(o, ctx, t);
  lane_scan_forward(ctx, {.a = t["a"],
                          .a_low = optional(t, "a_low"),
                          .W = t["W"],
                          .skip = optional(t, "skip"),
                          .v = t["v"],
                          .lengths = optional(t, "lengths"),
                          .state_in = state_in,
                          .y = t["y"],
                          .state_out = state_out,
                          .chunk_states = t["chunk_states"]});
}

void run_step(const Options& o, Context& ctx, Tensors& t, MutableTensorView state,
              Activation activation = Activation::Identity, bool twice = false) {
  make_multipliers(o, ctx, t);
  lane_scan_step(ctx, {.a = t["a"],
                       .a_low = optional(t, "a_low"),
                       .W = t["W"],
                       .skip = optional(t, "skip"),
                       .v = t["v"],
                       .y = t["y"],
                       .state = state,
                       .activation = activation,
                       .twice = twice});
}

void run_backward(const Options& o, Context& ctx, Tensors& t) {
  // Both gradients of a multiplier are used: of log a where a = exp(z), of a itself elsewhere.
  const bool log = o.discretized && o.method != Discretization::Bilinear;
  Tensor dmultiplier = ctx.zeros(t["a"].shape(), t["a"].dtype());
  const MutableTensorView da = o.discretized ? dmultiplier.view() : t["da"].view();
  lane_scan_backward(ctx, {.a = t["a"],
                           .a_low = optional(t, "a_low"),
                           .W = t["W"],
                           .skip = optional(t, "skip"),
                           .v = t["v"],
                           .lengths = optional(t, "lengths"),
                           .dy = t["dy"],
                           .chunk_states = t["chunk_states"],
                           .dstate_out = t["dstate_out"],
                           .dv = t["dv"],
                           .da = log ? MutableTensorView() : da,
                           .dlog_a = log ? da : MutableTensorView(),
                           .dW = t["dW"],
                           .dskip = o.skip ? MutableTensorView(t["dskip"]) : MutableTensorView(),
                           .dstate_in = t["dstate_in"]});
  if (!o.discretized) return;
  const TensorView gradient = dmultiplier.view().reshape({2, o.lanes() * o.substates});
  discretize_backward(ctx, {.parameters = parameters(o, t),
                            .da = log ? TensorView() : gradient,
                            .dz = log ? gradient : TensorView(),
                            .dA_re = t["dA_re"],
                            .dA_im = t["dA_im"],
                            .ddt = t["ddt"]});
}

OpCase lane_scan_case(const Options& o) {
  const auto accumulated = [](const char* name, Shape shape, double low, double high) {
    return Operand{
        .name = name, .shape = shape, .low = low, .high = high, .storage = Storage::Accumulate};
  };
  const std::int64_t b = o.batch;
  const std::int64_t n = o.lanes();
  const std::int64_t m = o.substates;
  const Shape states = {b, 2, n, m};
  const auto tokens = static_cast<double>(b * o.seqlen);
  const double substates = tokens * static_cast<double>(n * m);
  OpCase c{
      .name = detail::concat("lane_scan/", o.name, "/B:", b, "/L:", o.seqlen, "/N:", n, "/M:", m,
                             "/C:", o.channels),
      .inputs = {{.name = "v", .shape = {b, o.seqlen, o.inputs}, .time = 1},
                 accumulated("state_in", states, -1, 1)},
      .params = {accumulated(
          "W", o.real_weight ? Shape{o.channels, n, m} : Shape{o.channels, 2, n, m}, -1, 1)},
      .outputs = {{.name = "y", .shape = {b, o.seqlen, o.outputs()}, .time = 1},
                  accumulated("state_out", states, -1, 1)},
      .saved = {accumulated("chunk_states", {b, lane_scan_chunks(o.seqlen), 2, n, m}, 0, 0)},
      .forward = [o](Context& ctx,
                     Tensors& t) { run_forward(o, ctx, t, t["state_in"], t["state_out"]); },
      .backward = [o](Context& ctx, Tensors& t) { run_backward(o, ctx, t); },
      .step = [o](Context& ctx, Tensors& t) { run_step(o, ctx, t, t["state"]); },
      .gradcheck = o.gradcheck,
      .bytes_forward = 4.0 * tokens * static_cast<double>(o.inputs + o.outputs()),
      .bytes_backward = 4.0 * tokens * static_cast<double>(2 * o.inputs + o.outputs()),
      .flops_forward = 2.0 * 6.0 * substates,
      .flops_backward = 2.0 * 20.0 * substates,
      .gradient_step = o.gradient_step,
  };
  c.at_length = [o](std::int64_t seqlen) {
    Options other = o;
    other.seqlen = seqlen;
    return lane_scan_case(other);
  };
  if (o.lengths)
    c.indices = {
        {.name = "lengths", .shape = {b}, .low = 1, .high = static_cast<double>(o.seqlen) + 1}};
  if (o.skip) c.params.push_back(accumulated("skip", {o.channels, n}, -1, 1));
  if (!o.discretized) {
    c.params.push_back(accumulated("a", {2, n, m}, o.a_low, o.a_high));
    if (o.two_floats) c.params.push_back(accumulated("a_low", {2, n, m}, -1e-8, 1e-8));
    return c;
  }
  c.params.push_back(accumulated("A_re", {n * m}, o.rate_low, o.rate_high));
  c.params.push_back(accumulated("A_im", {n * m}, -o.angle, o.angle));
  c.params.push_back(accumulated("dt", {n}, o.dt_low, o.dt_high));
  c.saved.push_back(accumulated("a", {2, n, m}, 0, 0));
  c.saved.push_back(accumulated("a_low", {2, n, m}, 0, 0));
  return c;
}

// One token, whose outputs go through an activation.
OpCase lane_scan_step_case(Options o, Activation activation, bool twice) {
  o.seqlen = 1;
  OpCase c = lane_scan_case(o);
  c.name = detail::concat("lane_scan_step/", o.name, "/B:", o.batch, "/N:", o.lanes(),
                          "/M:", o.substates, activation == Activation::Gelu ? "/gelu" : "",
                          activation == Activation::Silu ? "/silu" : "", twice ? "/twice" : "");
  c.forward = [=](Context& ctx, Tensors& t) {
    run_step(o, ctx, t, t["state_out"], activation, twice);
  };
  return step_case(std::move(c));
}

std::vector<OpCase> step_cases() {
  constexpr auto kIdentity = Activation::Identity;
  constexpr auto kGelu = Activation::Gelu;
  std::vector<OpCase> all;
  // Every number of threads of a lane, sequences in part, and lanes that do not fill a block.
  for (const std::int64_t m : {4, 8, 16, 32, 64})
    for (const std::int64_t batch : {1, 5, 17})
      all.push_back(
          lane_scan_step_case({.name = "width", .batch = batch, .inputs = 37, .substates = m},
                              batch == 5 ? kIdentity : kGelu, true));
  const auto add = [&](const Options& o, Activation activation, bool twice) {
    all.push_back(lane_scan_step_case(o, activation, twice));
  };
  add({.name = "s4d", .batch = 32, .inputs = 768, .substates = 32, .discretized = true}, kGelu,
      true);
  add({.name = "real", .batch = 3, .inputs = 9, .substates = 8, .real_weight = true, .skip = false},
      kIdentity, false);
  // The ops one by one.
  add({.name = "odd", .inputs = 6, .substates = 6}, kGelu, true);
  add({.name = "wide", .inputs = 3, .substates = 100}, kIdentity, false);
  add({.name = "once", .inputs = 5, .substates = 8}, kGelu, false);
  add({.name = "silu", .inputs = 5, .substates = 8}, Activation::Silu, true);
  add({.name = "channels", .inputs = 5, .substates = 8, .channels = 3}, kGelu, true);
  add({.name = "sums", .inputs = 4, .substates = 8, .groups = 3, .skip = false}, kGelu, true);
  return all;
}

std::vector<OpCase> cases() {
  constexpr std::int64_t kQ = kLaneScanChunk;
  std::vector<OpCase> all;
  for (const std::int64_t seqlen :
       {std::int64_t{1}, std::int64_t{2}, kQ - 1, kQ, kQ + 1, 2 * kQ + 1})
    all.push_back(lane_scan_case({.name = "plain", .seqlen = seqlen}));
  const auto add = [&](const Options& o) { all.push_back(lane_scan_case(o)); };
  add({.name = "one", .batch = 1, .seqlen = 7, .inputs = 1, .substates = 1, .skip = false});
  add({.name = "real", .seqlen = kQ + 3, .inputs = 17, .real_weight = true, .gradient_step = 3e-4});
  add({.name = "channels", .seqlen = kQ + 2, .substates = 3, .channels = 3});
  add({.name = "lengths", .batch = 3, .seqlen = 2 * kQ + 5, .inputs = 5, .lengths = true});
  add({.name = "channels_lengths", .batch = 3, .seqlen = kQ + 5, .channels = 2, .lengths = true});
  add({.name = "sums", .seqlen = kQ + 2, .groups = 4, .skip = false});
  add({.name = "sums_lengths",
       .batch = 3,
       .seqlen = kQ + 2,
       .inputs = 2,
       .groups = 2,
       .real_weight = true,
       .skip = false,
       .lengths = true});
  // |a| up to 0.9999, whose powers leave the fourth order only with a small step; and exactly 0
  add({.name = "slow", .seqlen = 3 * kQ, .a_low = 0.70, .a_high = 0.707, .gradient_step = 1e-4});
  add({.name = "zero", .seqlen = 4, .a_low = 0.0, .a_high = 0.0});
  add({.name = "zoh", .seqlen = kQ + 2, .discretized = true, .gradient_step = 3e-4});
  add({.name = "bilinear",
       .seqlen = kQ + 2,
       .discretized = true,
       .method = Discretization::Bilinear});
  add({.name = "euler_real",
       .seqlen = kQ + 2,
       .real_weight = true,
       .discretized = true,
       .method = Discretization::Euler});
  // Every width of a group of sub-states, one past it, and blocks of lanes that are not full.
  for (const std::int64_t m : {4, 8, 9, 16, 24, 32, 33, 64, 100})
    add({.name = "width", .seqlen = 2 * kQ + 7, .inputs = 37, .substates = m, .gradcheck = false});
  add({.name = "many_channels",
       .batch = 3,
       .seqlen = 2 * kQ + 7,
       .inputs = 20,
       .substates = 40,
       .channels = 3,
       .lengths = true,
       .gradcheck = false});
  add({.name = "full",
       .batch = 3,
       .seqlen = 2 * kQ + 7,
       .inputs = 19,
       .substates = 8,
       .groups = 21,
       .real_weight = true,
       .skip = false,
       .lengths = true,
       .gradcheck = false});
  add({.name = "full_wide",
       .seqlen = 2 * kQ + 7,
       .inputs = 5,
       .substates = 35,
       .groups = 3,
       .skip = false,
       .gradcheck = false});
  // Segments of several chunks with and without padding, whose number depends on the sizes.
  add({.name = "long_lengths",
       .batch = 3,
       .seqlen = 333,
       .inputs = 40,
       .substates = 8,
       .lengths = true,
       .gradcheck = false});
  // Slow lanes with angles of many turns: what float32 multipliers alone would get wrong.
  add({.name = "long",
       .batch = 1,
       .seqlen = 2049,
       .inputs = 6,
       .substates = 32,
       .discretized = true,
       .angle = 300,
       .rate_low = -1,
       .rate_high = 0,
       .dt_low = -7,
       .dt_high = -2,
       .gradcheck = false});
  add({.name = "long_bilinear",
       .batch = 2,
       .seqlen = 1025,
       .inputs = 9,
       .substates = 16,
       .channels = 2,
       .discretized = true,
       .method = Discretization::Bilinear,
       .angle = 300,
       .rate_low = -1,
       .rate_high = 0,
       .dt_low = -7,
       .dt_high = -2,
       .gradcheck = false});
  return all;
}

const RegisterOpCases kRegister(cases());
const RegisterOpCases kRegisterSteps(step_cases());

// One layer of S4D, one of Centaurus neck, both at the sizes of the published comparison.
std::vector<OpCase> bench_cases() {
  std::vector<OpCase> all;
  for (const auto& [batch, seqlen, width, state] :
       {std::tuple{8, 2048, 768, 64}, std::tuple{1, 65536, 768, 64}, std::tuple{32, 512, 128, 16},
        std::tuple{32, 2048, 128, 16}}) {
    Options o{.name = "s4d",
              .batch = batch,
              .seqlen = seqlen,
              .inputs = width,
              .substates = state / 2,
              .discretized = true,
              .angle = 100,
              .rate_low = -1,
              .rate_high = 0,
              .dt_low = -7,
              .dt_high = -2};
    all.push_back(lane_scan_case(o));
    o.name = "centaurus";
    o.inputs = state;
    o.substates = 8;
    o.real_weight = true;
    o.skip = false;
    o.method = Discretization::Euler;
    all.push_back(lane_scan_case(o));
  }
  for (const std::int64_t batch : {1, 32})
    all.push_back(lane_scan_step_case(
        {.name = "s4d", .batch = batch, .inputs = 768, .substates = 32, .two_floats = true},
        Activation::Gelu, true));
  return all;
}

const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
