#include <tuple>

#include "lrnn/ops/dplr_discretize.hpp"
#include "lrnn/ops/dplr_scan.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Options {
  std::string name;
  std::int64_t batch = 2;
  std::int64_t seqlen = 5;
  std::int64_t heads = 3;
  std::int64_t states = 2;
  std::int64_t rank = 1;
  std::int64_t channels = 1;
  bool skip = true;
  bool lengths = false;
  // The transition: drawn itself, or made by dplr_discretize from rates, angles and steps.
  bool discretized = false;
  double angle = 3.0;
  double dt_low = -2.0, dt_high = 0.0;  // log dt
  bool gradcheck = true;
  double gradient_step = 3e-4;
};

DplrParameters parameters(const Options& o, Tensors& t) {
  return {.heads = o.heads,
          .A_re = {.value = t["A_re"], .transform = LaneTransform::Exp, .negate = true},
          .A_im = {.value = t["A_im"]},
          .dt = {.value = t["dt"], .transform = LaneTransform::Exp},
          .P = t["P"],
          .B = t["B"]};
}

TensorView optional(Tensors& t, const char* name) {
  return t.contains(name) ? TensorView(t[name]) : TensorView();
}

void make_transition(const Options& o, Context& ctx, Tensors& t) {
  if (o.discretized)
    dplr_discretize_forward(ctx, {.parameters = parameters(o, t),
                                  .e = t["e"],
                                  .e_low = t["e_low"],
                                  .w = t["w"],
                                  .k = t["k"],
                                  .b = t["b"]});
}

void run_forward(const Options& o, Context& ctx, Tensors& t, TensorView state_in,
                 MutableTensorView state_out) {
  make_transition(o, ctx, t);
  dplr_scan_forward(ctx, {.e = t["e"],
                          .e_low = optional(t, "e_low"),
                          .w = t["w"],
                          .k = t["k"],
                          .b = t["b"],
                          .C = t["C"],
                          .D = optional(t, "D"),
                          .u = t["u"],
                          .lengths = optional(t, "lengths"),
                          .state_in = state_in,
                          .y = t["y"],
                          .state_out = state_out,
                          .chunk_states = t["chunk_states"]});
}

void run_step(const Options& o, Context& ctx, Tensors& t, MutableTensorView state,
              Activation activation = Activation::Identity, bool twice = false) {
  make_transition(o, ctx, t);
  dplr_scan_step(ctx, {.e = t["e"],
                       .w = t["w"],
                       .k = t["k"],
                       .b = t["b"],
                       .C = t["C"],
                       .D = optional(t, "D"),
                       .u = t["u"],
                       .y = t["y"],
                       .state = state,
                       .activation = activation,
                       .twice = twice});
}

void run_backward(const Options& o, Context& ctx, Tensors& t) {
  Tensors own;
  if (o.discretized)
    for (const char* name : {"e", "w", "k", "b"})
      own[name] = ctx.zeros(t[name].shape(), t[name].dtype());
  const auto grad = [&](const std::string& name) -> Tensor& {
    return o.discretized ? own[name] : t["d" + name];
  };
  dplr_scan_backward(ctx, {.e = t["e"],
                           .w = t["w"],
                           .k = t["k"],
                           .b = t["b"],
                           .C = t["C"],
                           .D = optional(t, "D"),
                           .u = t["u"],
                           .lengths = optional(t, "lengths"),
                           .dy = t["dy"],
                           .chunk_states = t["chunk_states"],
                           .dstate_out = t["dstate_out"],
                           .du = t["du"],
                           .de = grad("e"),
                           .dw = grad("w"),
                           .dk = grad("k"),
                           .db = grad("b"),
                           .dC = t["dC"],
                           .dD = o.skip ? MutableTensorView(t["dD"]) : MutableTensorView(),
                           .dstate_in = t["dstate_in"]});
  if (!o.discretized) return;
  dplr_discretize_backward(ctx, {.parameters = parameters(o, t),
                                 .de = own["e"],
                                 .dw = own["w"],
                                 .dk = own["k"],
                                 .db = own["b"],
                                 .dA_re = t["dA_re"],
                                 .dA_im = t["dA_im"],
                                 .ddt = t["ddt"],
                                 .dP = t["dP"],
                                 .dB = t["dB"]});
}

OpCase dplr_scan_case(const Options& o) {
  const auto accumulated = [](const char* name, Shape shape, double low, double high) {
    return Operand{
        .name = name, .shape = shape, .low = low, .high = high, .storage = Storage::Accumulate};
  };
  const std::int64_t b = o.batch;
  const std::int64_t h = o.heads;
  const std::int64_t n = o.states;
  const Shape states = {b, 2, h, n};
  const Shape plane = {2, h, n};
  const Shape planes = {o.rank, 2, h, n};
  const auto tokens = static_cast<double>(b * o.seqlen);
  const double work = tokens * static_cast<double>(h * n);
  OpCase c{
      .name = detail::concat("dplr_scan/", o.name, "/B:", b, "/L:", o.seqlen, "/H:", h, "/N:", n,
                             "/R:", o.rank, "/C:", o.channels),
      .inputs = {{.name = "u", .shape = {b, o.seqlen, h}, .time = 1},
                 accumulated("state_in", states, -1, 1)},
      .params = {accumulated("C", {o.channels, h, n, 2}, -1, 1)},
      .outputs = {{.name = "y", .shape = {b, o.seqlen, o.channels * h}, .time = 1},
                  accumulated("state_out", states, -1, 1)},
      .saved = {accumulated("chunk_states", {b, dplr_scan_chunks(o.seqlen), 2, h, n}, 0, 0)},
      .forward = [o](Context& ctx,
                     Tensors& t) { run_forward(o, ctx, t, t["state_in"], t["state_out"]); },
      .backward = [o](Context& ctx, Tensors& t) { run_backward(o, ctx, t); },
      .step = [o](Context& ctx, Tensors& t) { run_step(o, ctx, t, t["state"]); },
      .gradcheck = o.gradcheck,
      .bytes_forward = 4.0 * tokens * static_cast<double>(h * (1 + o.channels)),
      .bytes_backward = 4.0 * tokens * static_cast<double>(h * (2 + o.channels)),
      .flops_forward = 2.0 * 12.0 * work,
      .flops_backward = 2.0 * 36.0 * work,
      .gradient_step = o.gradient_step,
  };
  c.at_length = [o](std::int64_t seqlen) {
    Options other = o;
    other.seqlen = seqlen;
    return dplr_scan_case(other);
  };
  if (o.lengths)
    c.indices = {
        {.name = "lengths", .shape = {b}, .low = 1, .high = static_cast<double>(o.seqlen) + 1}};
  if (o.skip) c.params.push_back(accumulated("D", {o.channels, h}, -1, 1));
  if (!o.discretized) {
    // |1 + e| is at most 0.99, and the correction is small beside it.
    const double size = 0.1 / static_cast<double>(o.rank * n);
    c.params.push_back(accumulated("e", plane, -0.7, -0.3));
    c.params.push_back(accumulated("w", planes, -size, size));
    c.params.push_back(accumulated("k", planes, -1, 1));
    c.params.push_back(accumulated("b", plane, -1, 1));
    return c;
  }
  c.params.push_back(accumulated("A_re", {h, n}, -1, 0));
  c.params.push_back(accumulated("A_im", {h, n}, -o.angle, o.angle));
  c.params.push_back(accumulated("dt", {h, 1}, o.dt_low, o.dt_high));
  c.params.push_back(accumulated("P", {o.rank, h, n, 2}, -1, 1));
  c.params.push_back(accumulated("B", {h, n, 2}, -1, 1));
  for (const auto& [name, shape] :
       {std::pair{"e", plane}, {"e_low", plane}, {"w", planes}, {"k", planes}, {"b", plane}})
    c.saved.push_back(accumulated(name, shape, 0, 0));
  return c;
}

// One token, whose outputs go through an activation.
OpCase dplr_scan_step_case(Options o, Activation activation, bool twice) {
  o.seqlen = 1;
  OpCase c = dplr_scan_case(o);
  c.name = detail::concat("dplr_scan_step/", o.name, "/B:", o.batch, "/H:", o.heads,
                          "/N:", o.states, activation == Activation::Gelu ? "/gelu" : "",
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
  // Every number of threads of a head, sequences in part, and heads that do not fill a block.
  for (const std::int64_t n : {4, 8, 16, 32, 64})
    for (const std::int64_t batch : {1, 5, 17})
      all.push_back(dplr_scan_step_case({.name = "width", .batch = batch, .heads = 37, .states = n},
                                        batch == 5 ? kIdentity : kGelu, true));
  const auto add = [&](const Options& o, Activation activation, bool twice) {
    all.push_back(dplr_scan_step_case(o, activation, twice));
  };
  add({.name = "s4", .batch = 32, .heads = 768, .states = 32, .discretized = true}, kGelu, true);
  add({.name = "no_skip", .batch = 3, .heads = 9, .states = 8, .skip = false}, kIdentity, false);
  // The ops one by one.
  add({.name = "odd", .heads = 6, .states = 6}, kGelu, true);
  add({.name = "wide", .heads = 3, .states = 100}, kIdentity, false);
  add({.name = "once", .heads = 5, .states = 8}, kGelu, false);
  add({.name = "silu", .heads = 5, .states = 8}, Activation::Silu, true);
  add({.name = "channels", .heads = 5, .states = 8, .channels = 3}, kGelu, true);
  add({.name = "rank", .heads = 4, .states = 8, .rank = 2}, kGelu, true);
  return all;
}

std::vector<OpCase> cases() {
  constexpr std::int64_t kQ = kDplrScanChunk;
  std::vector<OpCase> all;
  for (const std::int64_t seqlen :
       {std::int64_t{1}, std::int64_t{2}, kQ - 1, kQ, kQ + 1, 2 * kQ + 1})
    all.push_back(dplr_scan_case({.name = "plain", .seqlen = seqlen}));
  const auto add = [&](const Options& o) { all.push_back(dplr_scan_case(o)); };
  add({.name = "one", .batch = 1, .seqlen = 7, .heads = 1, .states = 1, .skip = false});
  add({.name = "blocks", .seqlen = kQ + 3, .heads = 17});
  add({.name = "rank", .seqlen = kQ + 2, .states = 3, .rank = 2});
  add({.name = "channels", .seqlen = kQ + 2, .states = 3, .channels = 3});
  add({.name = "lengths", .batch = 3, .seqlen = 2 * kQ + 5, .lengths = true});
  add({.name = "all_lengths",
       .batch = 3,
       .seqlen = kQ + 5,
       .rank = 3,
       .channels = 2,
       .lengths = true});
  add({.name = "s4", .seqlen = kQ + 2, .discretized = true});
  add({.name = "s4_rank", .seqlen = kQ + 2, .rank = 2, .channels = 2, .discretized = true});
  // Every width of a group of states and one past it, and groups that are not full.
  for (const std::int64_t states : {1, 7, 8, 9, 16, 31, 32, 33, 64, 65, 128, 129, 256, 257})
    add({.name = "width", .seqlen = 2 * kQ + 7, .heads = 11, .states = states, .gradcheck = false});
  add({.name = "everything",
       .batch = 3,
       .seqlen = 2 * kQ + 7,
       .heads = 9,
       .states = 40,
       .rank = 3,
       .channels = 3,
       .lengths = true,
       .gradcheck = false});
  // Segments of several chunks with and without padding, whose number depends on the sizes.
  for (const std::int64_t states : {8, 32, 48})
    add({.name = "long_lengths",
         .batch = 3,
         .seqlen = 1777,
         .heads = 5,
         .states = states,
         .lengths = true,
         .gradcheck = false});
  // Enough tokens for whole chunks at once: with and without tokens that are left, columns and
  // states that are not full, and tokens of several groups of chunks.
  add({.name = "chunks",
       .batch = 5,
       .seqlen = 4 * kQ,
       .heads = 3,
       .states = 5,
       .gradcheck = false});
  add({.name = "chunks",
       .batch = 11,
       .seqlen = 6 * kQ + 11,
       .heads = 2,
       .states = 20,
       .lengths = true,
       .gradcheck = false});
  add({.name = "chunks",
       .batch = 9,
       .seqlen = 2 * kQ,
       .heads = 5,
       .states = 32,
       .gradcheck = false});
  add({.name = "chunks",
       .batch = 1,
       .seqlen = 41 * kQ,
       .heads = 2,
       .states = 9,
       .gradcheck = false});
  // Slow states with large angles: what rounding the transition itself would get wrong.
  add({.name = "long_s4",
       .batch = 1,
       .seqlen = 4099,
       .heads = 6,
       .states = 32,
       .discretized = true,
       .angle = 100,
       .dt_low = -7,
       .dt_high = -2,
       .gradcheck = false});
  add({.name = "long_s4_rank",
       .batch = 2,
       .seqlen = 1025,
       .heads = 5,
       .states = 16,
       .rank = 2,
       .channels = 2,
       .discretized = true,
       .angle = 100,
       .dt_low = -7,
       .dt_high = -2,
       .gradcheck = false});
  return all;
}

const RegisterOpCases kRegister(cases());
const RegisterOpCases kRegisterSteps(step_cases());

// One layer of S4 at the sizes of the published comparison.
std::vector<OpCase> bench_cases() {
  std::vector<OpCase> all;
  for (const auto& [batch, seqlen, width, state] :
       {std::tuple{8, 2048, 768, 64}, std::tuple{1, 65536, 768, 64}, std::tuple{32, 512, 128, 16},
        std::tuple{32, 2048, 128, 16}})
    all.push_back(dplr_scan_case({.name = "s4",
                                  .batch = batch,
                                  .seqlen = seqlen,
                                  .heads = width,
                                  .states = state / 2,
                                  .discretized = true,
                                  .angle = 100,
                                  .dt_low = -7,
                                  .dt_high = -2}));
  for (const std::int64_t batch : {1, 32})
    all.push_back(dplr_scan_step_case({.name = "s4", .batch = batch, .heads = 768, .states = 32},
                                      Activation::Gelu, true));
  return all;
}

const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
