#include "lrnn/ops/discretize.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Options {
  std::string name;
  Discretization method = Discretization::Zoh;
  std::int64_t lanes = 1;
  std::int64_t rates = 1;
  std::int64_t steps = 1;  // 0: no dt
  LaneTransform real = LaneTransform::Softplus;
  LaneTransform imag = LaneTransform::Identity;
  LaneTransform dt = LaneTransform::Exp;
  bool of_sinh = false;
  double real_low = -1.0, real_high = 1.0;
  double imag_low = -3.0, imag_high = 3.0;
  double dt_low = -3.0, dt_high = 0.0;
};

LaneParameters parameters(const Options& o, Tensors& t) {
  LaneParameters p{
      .method = o.method,
      .lanes = o.lanes,
      .A_re = {.value = t["A_re"], .transform = o.real, .negate = true},
      .A_im = {.value = t["A_im"], .transform = o.imag},
  };
  if (o.steps > 0) p.dt = {.value = t["dt"], .transform = o.dt, .of_sinh = o.of_sinh};
  if (o.method == Discretization::Exponential) p.gamma_log = t["gamma_log"];
  return p;
}

OpCase discretize_case(const Options& o) {
  const auto operand = [](const char* name, Shape shape, double low, double high) {
    return Operand{
        .name = name, .shape = shape, .low = low, .high = high, .storage = Storage::Accumulate};
  };
  OpCase c{
      .name = detail::concat("discretize/", o.name, "/lanes:", o.lanes),
      .inputs = {},
      .params = {operand("A_re", {o.rates}, o.real_low, o.real_high),
                 operand("A_im", {o.rates}, o.imag_low, o.imag_high)},
      .outputs = {operand("a", {2, o.lanes}, -1, 1), operand("gamma", {2, o.lanes}, -1, 1)},
      .forward =
          [o](Context& ctx, Tensors& t) {
            discretize_forward(ctx,
                               {.parameters = parameters(o, t), .a = t["a"], .gamma = t["gamma"]});
          },
      .backward =
          [o](Context& ctx, Tensors& t) {
            const auto grad = [&](const char* name) {
              return t.contains(name) ? MutableTensorView(t[name]) : MutableTensorView();
            };
            discretize_backward(ctx, {.parameters = parameters(o, t),
                                      .da = t["da"],
                                      .dgamma = t["dgamma"],
                                      .dA_re = t["dA_re"],
                                      .dA_im = t["dA_im"],
                                      .ddt = grad("ddt"),
                                      .dgamma_log = grad("dgamma_log")});
          },
      .bfloat16 = false,
  };
  if (o.steps > 0) c.params.push_back(operand("dt", {o.steps}, o.dt_low, o.dt_high));
  if (o.method == Discretization::Exponential)
    c.params.push_back(operand("gamma_log", {o.lanes}, -3, 0));
  return c;
}

const RegisterOpCases kRegister({
    discretize_case(
        {.name = "zoh", .method = Discretization::Zoh, .lanes = 5, .rates = 5, .steps = 5}),
    // |z| < 1/2: the series of phi1 and its derivative
    discretize_case({.name = "zoh_small",
                     .method = Discretization::Zoh,
                     .lanes = 6,
                     .rates = 6,
                     .steps = 6,
                     .real = LaneTransform::Exp,
                     .real_low = -6,
                     .imag_low = -0.3,
                     .imag_high = 0.3}),
    // rates shared by three groups of four lanes, a step by two lanes
    discretize_case({.name = "bilinear_shared",
                     .method = Discretization::Bilinear,
                     .lanes = 12,
                     .rates = 4,
                     .steps = 6,
                     .real = LaneTransform::Exp,
                     .imag = LaneTransform::Exp}),
    discretize_case({.name = "dirac",
                     .method = Discretization::Dirac,
                     .lanes = 3,
                     .rates = 3,
                     .steps = 1,
                     .real = LaneTransform::Sigmoid,
                     .dt = LaneTransform::Softplus}),
    discretize_case({.name = "euler_sinh",
                     .method = Discretization::Euler,
                     .lanes = 4,
                     .rates = 4,
                     .steps = 2,
                     .real = LaneTransform::Relu,
                     .of_sinh = true,
                     .real_low = 0.5,
                     .dt_low = -2}),
    discretize_case({.name = "lru",
                     .method = Discretization::Exponential,
                     .lanes = 7,
                     .rates = 7,
                     .steps = 0,
                     .real = LaneTransform::Exp,
                     .imag = LaneTransform::Exp,
                     .real_low = -6,
                     .real_high = 3,
                     .imag_low = -2,
                     .imag_high = 1.8}),
    discretize_case(
        {.name = "none", .method = Discretization::None, .lanes = 130, .rates = 130, .steps = 0}),
});

const RegisterBenchCases kRegisterBench({
    discretize_case({.name = "lru",
                     .method = Discretization::Exponential,
                     .lanes = 64,
                     .rates = 64,
                     .steps = 0,
                     .real = LaneTransform::Exp,
                     .imag = LaneTransform::Exp}),
    discretize_case({.name = "s4d",
                     .method = Discretization::Zoh,
                     .lanes = 768 * 32,
                     .rates = 768 * 32,
                     .steps = 768,
                     .real = LaneTransform::Exp}),
});

}  // namespace
}  // namespace lrnn::testing
