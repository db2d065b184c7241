#include "lrnn/ops/dplr_discretize.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Options {
  std::string name;
  std::int64_t heads = 1;
  std::int64_t states = 1;
  std::int64_t rank = 1;
  std::int64_t copies = 1;
  bool dt_tied = true;
  LaneTransform real = LaneTransform::Exp;
  LaneTransform imag = LaneTransform::Identity;
  LaneTransform dt = LaneTransform::Exp;
  bool of_sinh = false;
  double angle = 3.0;
};

DplrParameters parameters(const Options& o, Tensors& t) {
  return {.heads = o.heads,
          .A_re = {.value = t["A_re"], .transform = o.real, .negate = true},
          .A_im = {.value = t["A_im"], .transform = o.imag, .negate = true},
          .dt = {.value = t["dt"], .transform = o.dt, .of_sinh = o.of_sinh},
          .P = t["P"],
          .B = t["B"]};
}

OpCase dplr_discretize_case(const Options& o) {
  const auto operand = [](const char* name, Shape shape, double low = -1, double high = 1) {
    return Operand{
        .name = name, .shape = shape, .low = low, .high = high, .storage = Storage::Accumulate};
  };
  const Shape plane = {2, o.heads, o.states};
  const Shape planes = {o.rank, 2, o.heads, o.states};
  const Shape rates = {o.copies, o.states};
  return {
      .name = detail::concat("dplr_discretize/", o.name, "/H:", o.heads, "/N:", o.states,
                             "/R:", o.rank, "/K:", o.copies),
      .inputs = {},
      .params = {operand("A_re", rates), operand("A_im", rates, -o.angle, o.angle),
                 operand("dt", {o.heads, o.dt_tied ? 1 : o.states}),
                 operand("P", {o.rank, o.copies, o.states, 2}),
                 operand("B", {o.copies, o.states, 2})},
      .outputs = {operand("e", plane), operand("w", planes), operand("k", planes),
                  operand("b", plane)},
      .forward =
          [o](Context& ctx, Tensors& t) {
            dplr_discretize_forward(ctx, {.parameters = parameters(o, t),
                                          .e = t["e"],
                                          .w = t["w"],
                                          .k = t["k"],
                                          .b = t["b"]});
          },
      .backward =
          [o](Context& ctx, Tensors& t) {
            dplr_discretize_backward(ctx, {.parameters = parameters(o, t),
                                           .de = t["de"],
                                           .dw = t["dw"],
                                           .dk = t["dk"],
                                           .db = t["db"],
                                           .dA_re = t["dA_re"],
                                           .dA_im = t["dA_im"],
                                           .ddt = t["ddt"],
                                           .dP = t["dP"],
                                           .dB = t["dB"]});
          },
      .bfloat16 = false,
  };
}

const RegisterOpCases kRegister({
    dplr_discretize_case({.name = "plain", .heads = 3, .states = 5, .copies = 3}),
    dplr_discretize_case({.name = "one"}),
    dplr_discretize_case({.name = "shared", .heads = 6, .states = 3, .rank = 2, .copies = 2}),
    dplr_discretize_case(
        {.name = "dt_of_states", .heads = 4, .states = 3, .rank = 3, .dt_tied = false}),
    dplr_discretize_case({.name = "transforms",
                          .heads = 2,
                          .states = 4,
                          .copies = 2,
                          .real = LaneTransform::Softplus,
                          .imag = LaneTransform::Exp,
                          .dt = LaneTransform::Softplus,
                          .of_sinh = true,
                          .angle = 1.0}),
    // More states than a warp has lanes, and more heads than a block has warps.
    dplr_discretize_case(
        {.name = "wide", .heads = 10, .states = 37, .rank = 2, .copies = 5, .angle = 50}),
});

const RegisterBenchCases kRegisterBench({
    dplr_discretize_case({.name = "s4", .heads = 768, .states = 32, .copies = 768, .angle = 50}),
});

}  // namespace
}  // namespace lrnn::testing
