#include <tuple>

#include "lrnn/ops/diagonal_scan.hpp"
#include "lrnn/ops/discretize.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

// How the case makes its multipliers. Parameters and Event run discretize too, so that the
// gradients they check are those of rates and steps.
enum class Form { Direct, Parameters, Event };

struct Options {
  std::string name;
  std::int64_t batch = 2;
  std::int64_t seqlen = 5;
  std::int64_t lanes = 3;
  Form form = Form::Direct;
  Discretization method = Discretization::Zoh;
  bool complex_drive = true;
  bool gamma = false;  // an operand of its own; Parameters and Event have that of the method
  bool lengths = false;
  double a_low = -0.7, a_high = 0.7;          // Direct
  double rate_low = -0.5, rate_high = 1.0;    // softplus^-1 of -Re A
  double angle_low = -3.0, angle_high = 3.0;  // Im A
  double dt_low = -1.5, dt_high = 0.5;        // log dt
  bool gradcheck = true;
  double gradient_step = 1e-3;
  double forward_nmse = 1e-12;
  double gradient_nmse = 1e-10;
};

LaneParameters parameters(const Options& o, Tensors& t) {
  LaneParameters p{
      .method = o.method,
      .lanes = o.lanes,
      .A_re = {.value = t["A_re"], .transform = LaneTransform::Softplus, .negate = true},
      .A_im = {.value = t["A_im"]},
      .dt = {.value = t["dt"], .transform = LaneTransform::Exp},
  };
  if (o.method == Discretization::Exponential) p.gamma_log = t["gamma_log"];
  return p;
}

bool has_gamma(const Options& o) {
  return o.form != Form::Direct || o.gamma;
}

TensorView gamma_of(const Options& o, Tensors& t) {
  return has_gamma(o) ? TensorView(t["gamma"]) : TensorView();
}

ScanMultiplier multiplier_of(const Options& o, Tensors& t) {
  if (o.form == Form::Direct) return {.a = t["a"]};
  if (o.form == Form::Parameters) return {.a = t["a"], .a_low = t["a_low"]};
  return {.z = t["z"], .tau = t["tau"], .event_bilinear = o.method == Discretization::Bilinear};
}

void run_forward(const Options& o, Context& ctx, Tensors& t, TensorView state_in,
                 MutableTensorView state_out) {
  if (o.form == Form::Parameters)
    discretize_forward(
        ctx,
        {.parameters = parameters(o, t), .a = t["a"], .a_low = t["a_low"], .gamma = t["gamma"]});
  if (o.form == Form::Event)
    discretize_forward(ctx, {.parameters = parameters(o, t), .gamma = t["gamma"], .z = t["z"]});
  diagonal_scan_forward(ctx, {.multiplier = multiplier_of(o, t),
                              .gamma = gamma_of(o, t),
                              .v = t["v"],
                              .lengths = o.lengths ? TensorView(t["lengths"]) : TensorView(),
                              .state_in = state_in,
                              .x = t["x"],
                              .state_out = state_out,
                              .chunk_states = t["chunk_states"]});
}

void run_backward(const Options& o, Context& ctx, Tensors& t) {
  const DType dtype = t["state_in"].dtype();
  // Of exp(z), log a = z: both gradients of a multiplier are used, each by some method.
  const bool exponential = o.method != Discretization::Bilinear && o.method != Discretization::None;
  const bool direct = o.form == Form::Direct;
  const bool log = o.form == Form::Parameters && exponential;
  const bool event = o.form == Form::Event;
  Tensor dmultiplier = ctx.zeros({2, o.lanes}, dtype);
  Tensor dgamma = ctx.zeros({2, o.lanes}, dtype);
  const MutableTensorView absent;
  Tensor states = ctx.empty(t["x"].shape(), t["x"].dtype());
  diagonal_scan_backward(ctx,
                         {.multiplier = multiplier_of(o, t),
                          .gamma = gamma_of(o, t),
                          .dx = t["dx"],
                          .v = t["v"],
                          .chunk_states = t["chunk_states"],
                          .lengths = o.lengths ? TensorView(t["lengths"]) : TensorView(),
                          .dstate_out = t["dstate_out"],
                          .dv = t["dv"],
                          .x = states,
                          .da = direct ? MutableTensorView(t["da"])
                                       : (!event && !log ? MutableTensorView(dmultiplier) : absent),
                          .dlog_a = log ? MutableTensorView(dmultiplier) : absent,
                          .dz = event ? MutableTensorView(dmultiplier) : absent,
                          .dgamma = direct ? (o.gamma ? MutableTensorView(t["dgamma"]) : absent)
                                           : MutableTensorView(dgamma),
                          .dtau = event ? MutableTensorView(t["dtau"]) : absent,
                          .dstate_in = t["dstate_in"]});
  if (direct) return;
  discretize_backward(ctx, {.parameters = parameters(o, t),
                            .da = !event && !log ? TensorView(dmultiplier) : TensorView(),
                            .dz = event || log ? TensorView(dmultiplier) : TensorView(),
                            .dgamma = dgamma,
                            .dA_re = t["dA_re"],
                            .dA_im = t["dA_im"],
                            .ddt = t["ddt"],
                            .dgamma_log = o.method == Discretization::Exponential
                                              ? MutableTensorView(t["dgamma_log"])
                                              : absent});
}

OpCase diagonal_scan_case(const Options& o) {
  const auto accumulated = [](const char* name, Shape shape, double low, double high) {
    return Operand{
        .name = name, .shape = shape, .low = low, .high = high, .storage = Storage::Accumulate};
  };
  const std::int64_t b = o.batch;
  const std::int64_t n = o.lanes;
  const auto states = static_cast<double>(b * o.seqlen * 2 * n);
  OpCase c{
      .name = detail::concat("diagonal_scan/", o.name, "/B:", b, "/L:", o.seqlen, "/N:", n),
      .inputs = {{.name = "v",
                  .shape = o.complex_drive ? Shape{b, o.seqlen, 2, n} : Shape{b, o.seqlen, n},
                  .time = 1},
                 accumulated("state_in", {b, 2, n}, -1, 1)},
      .outputs = {{.name = "x", .shape = {b, o.seqlen, 2, n}, .time = 1},
                  accumulated("state_out", {b, 2, n}, -1, 1)},
      .saved = {accumulated("chunk_states", {b, diagonal_scan_chunks(o.seqlen), 2, n}, 0, 0)},
      .forward = [o](Context& ctx,
                     Tensors& t) { run_forward(o, ctx, t, t["state_in"], t["state_out"]); },
      .backward = [o](Context& ctx, Tensors& t) { run_backward(o, ctx, t); },
      .step = [o](Context& ctx, Tensors& t) { run_forward(o, ctx, t, t["state"], t["state"]); },
      .gradcheck = o.gradcheck,
      .bytes_forward = (o.complex_drive ? 2.0 : 1.5) * 4.0 * states,
      .bytes_backward = (o.complex_drive ? 4.0 : 3.0) * 4.0 * states,
      .gradient_step = o.gradient_step,
      .forward_nmse = o.forward_nmse,
      .gradient_nmse = o.gradient_nmse,
  };
  c.at_length = [o](std::int64_t seqlen) {
    Options other = o;
    other.seqlen = seqlen;
    return diagonal_scan_case(other);
  };
  if (o.lengths)
    c.indices = {
        {.name = "lengths", .shape = {b}, .low = 1, .high = static_cast<double>(o.seqlen) + 1}};
  if (o.form == Form::Direct) {
    c.params.push_back(accumulated("a", {2, n}, o.a_low, o.a_high));
    if (o.gamma) c.params.push_back(accumulated("gamma", {2, n}, -1, 1));
    return c;
  }
  c.params = {accumulated("A_re", {n}, o.rate_low, o.rate_high),
              accumulated("A_im", {n}, o.angle_low, o.angle_high),
              accumulated("dt", {n}, o.dt_low, o.dt_high)};
  if (o.method == Discretization::Exponential)
    c.params.push_back(accumulated("gamma_log", {n}, -2, 0));
  c.saved.push_back(accumulated("gamma", {2, n}, 0, 0));
  if (o.form == Form::Parameters) {
    c.saved.push_back(accumulated("a", {2, n}, 0, 0));
    c.saved.push_back(accumulated("a_low", {2, n}, 0, 0));
    return c;
  }
  c.saved.push_back(accumulated("z", {4, n}, 0, 0));
  Operand tau = accumulated("tau", {b, o.seqlen}, 0.25, 2.0);
  tau.time = 1;
  c.inputs.push_back(tau);
  return c;
}

std::vector<OpCase> cases() {
  constexpr std::int64_t kQ = kDiagonalScanChunk;
  std::vector<OpCase> all;
  for (const std::int64_t seqlen :
       {std::int64_t{1}, std::int64_t{2}, kQ - 1, kQ, kQ + 1, 2 * kQ + 1})
    all.push_back(diagonal_scan_case({.name = "complex", .seqlen = seqlen, .gamma = true}));
  all.push_back(diagonal_scan_case({.name = "real",
                                    .seqlen = kQ + 3,
                                    .lanes = 17,
                                    .complex_drive = false,
                                    .gamma = true,
                                    .gradient_step = 3e-4}));
  all.push_back(diagonal_scan_case({.name = "no_gamma", .batch = 3, .lanes = 1}));
  all.push_back(diagonal_scan_case({.name = "lengths",
                                    .batch = 3,
                                    .seqlen = 2 * kQ + 5,
                                    .complex_drive = false,
                                    .gamma = true,
                                    .lengths = true}));
  // |a| up to 0.9999, whose powers leave the fourth order only with a small step; and exactly 0
  all.push_back(diagonal_scan_case(
      {.name = "slow", .seqlen = 3 * kQ, .a_low = 0.70, .a_high = 0.707, .gradient_step = 1e-4}));
  all.push_back(diagonal_scan_case({.name = "zero", .seqlen = 4, .a_low = 0.0, .a_high = 0.0}));
  const auto add_form = [&](Form form, const char* name, Discretization method,
                            bool complex_drive) {
    all.push_back(diagonal_scan_case({.name = name,
                                      .seqlen = kQ + 2,
                                      .lanes = 3,
                                      .form = form,
                                      .method = method,
                                      .complex_drive = complex_drive}));
  };
  add_form(Form::Parameters, "zoh", Discretization::Zoh, false);
  add_form(Form::Parameters, "bilinear", Discretization::Bilinear, false);
  add_form(Form::Parameters, "dirac", Discretization::Dirac, false);
  add_form(Form::Parameters, "euler", Discretization::Euler, false);
  add_form(Form::Parameters, "exponential", Discretization::Exponential, true);
  add_form(Form::Event, "event_zoh", Discretization::Zoh, false);
  add_form(Form::Event, "event_bilinear", Discretization::Bilinear, true);
  add_form(Form::Event, "event_dirac", Discretization::Dirac, false);
  all.push_back(diagonal_scan_case({.name = "event_lengths",
                                    .batch = 3,
                                    .seqlen = kQ + 5,
                                    .lanes = 18,
                                    .form = Form::Event,
                                    .complex_drive = false,
                                    .lengths = true}));
  // Segments of several chunks with and without padding, tiles of 8, 16 and 32 lanes.
  all.push_back(diagonal_scan_case({.name = "long_lengths",
                                    .batch = 3,
                                    .seqlen = 333,
                                    .lanes = 40,
                                    .gamma = true,
                                    .lengths = true,
                                    .gradcheck = false}));
  all.push_back(diagonal_scan_case({.name = "long_event_lengths",
                                    .batch = 5,
                                    .seqlen = 300,
                                    .lanes = 12,
                                    .form = Form::Event,
                                    .method = Discretization::Bilinear,
                                    .complex_drive = false,
                                    .lengths = true,
                                    .gradcheck = false}));
  all.push_back(diagonal_scan_case({.name = "sequences",
                                    .batch = 10,
                                    .seqlen = 515,
                                    .lanes = 20,
                                    .form = Form::Parameters,
                                    .method = Discretization::Exponential,
                                    .gradcheck = false}));
  // Slow lanes with angles of many turns: what float32 multipliers alone would get wrong.
  all.push_back(diagonal_scan_case({.name = "long",
                                    .batch = 1,
                                    .seqlen = 2049,
                                    .lanes = 33,
                                    .form = Form::Parameters,
                                    .complex_drive = false,
                                    .rate_low = -6,
                                    .rate_high = -4,
                                    .angle_low = -150,
                                    .angle_high = 150,
                                    .gradcheck = false}));
  all.push_back(diagonal_scan_case({.name = "long_event",
                                    .batch = 2,
                                    .seqlen = 700,
                                    .lanes = 65,
                                    .form = Form::Event,
                                    .complex_drive = false,
                                    .angle_low = -150,
                                    .angle_high = 150,
                                    .gradcheck = false}));
  all.push_back(diagonal_scan_case({.name = "wide",
                                    .batch = 3,
                                    .seqlen = 129,
                                    .lanes = 256,
                                    .gamma = true,
                                    .gradcheck = false}));
  return all;
}

const RegisterOpCases kRegister(cases());

// One layer of LRU (complex drive), S5 (real) and S5 with time steps.
std::vector<OpCase> bench_cases() {
  std::vector<OpCase> all;
  for (const auto& [batch, seqlen, lanes] :
       {std::tuple{8, 2048, 64}, std::tuple{8, 2048, 256}, std::tuple{1, 65536, 64}}) {
    Options o{.name = "lru",
              .batch = batch,
              .seqlen = seqlen,
              .lanes = lanes,
              .form = Form::Parameters,
              .method = Discretization::Exponential};
    all.push_back(diagonal_scan_case(o));
    o.name = "s5";
    o.method = Discretization::Zoh;
    o.complex_drive = false;
    all.push_back(diagonal_scan_case(o));
    o.name = "s5_event";
    o.form = Form::Event;
    all.push_back(diagonal_scan_case(o));
  }
  return all;
}

const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
