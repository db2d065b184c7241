#include "lrnn/ops/lane_weight.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Options {
  std::string name;
  std::int64_t lanes = 3;
  std::int64_t substates = 2;
  std::int64_t channels = 1;
  std::int64_t copies = 0;  // 0: no B
  bool real = false;
  bool gamma = true;
  bool sides = false;
};

LaneWeightFactors factors(Tensors& t) {
  const auto view = [&](const char* name) {
    return t.contains(name) ? TensorView(t[name]) : TensorView();
  };
  return {.scale = 2.0,
          .gamma = view("gamma"),
          .B = view("B"),
          .C = view("C"),
          .left = view("left"),
          .right = view("right")};
}

OpCase lane_weight_case(const Options& o) {
  const auto operand = [](const char* name, Shape shape) {
    return Operand{.name = name, .shape = shape, .storage = Storage::Accumulate};
  };
  const std::int64_t n = o.lanes;
  const std::int64_t m = o.substates;
  OpCase c{
      .name = detail::concat("lane_weight/", o.name, "/N:", n, "/M:", m, "/C:", o.channels),
      .inputs = {},
      .params = {operand("C", o.real ? Shape{n, m} : Shape{o.channels, n, m, 2})},
      .outputs = {operand("W", o.real ? Shape{1, n, m} : Shape{o.channels, 2, n, m})},
      .forward = [](Context& ctx,
                    Tensors& t) { lane_weight_forward(ctx, {.factors = factors(t), .W = t["W"]}); },
      .backward =
          [](Context& ctx, Tensors& t) {
            const auto grad = [&](const char* name) {
              return t.contains(name) ? MutableTensorView(t[name]) : MutableTensorView();
            };
            lane_weight_backward(ctx, {.factors = factors(t),
                                       .dW = t["dW"],
                                       .dgamma = grad("dgamma"),
                                       .dB = grad("dB"),
                                       .dC = t["dC"],
                                       .dleft = grad("dleft"),
                                       .dright = grad("dright")});
          },
      .bfloat16 = false,
  };
  if (o.gamma) c.inputs.push_back(operand("gamma", {2, n * m}));
  if (o.copies > 0) c.params.push_back(operand("B", {o.copies, m, 2}));
  if (o.sides)
    for (const char* side : {"left", "right"}) c.params.push_back(operand(side, {n}));
  return c;
}

const RegisterOpCases kRegister({
    lane_weight_case({.name = "one", .lanes = 1, .substates = 1, .gamma = false}),
    lane_weight_case({.name = "s4d", .lanes = 6, .channels = 2, .copies = 6}),
    lane_weight_case({.name = "shared_B", .lanes = 6, .substates = 3, .copies = 2}),
    lane_weight_case({.name = "one_B", .lanes = 70, .substates = 5, .copies = 1}),
    lane_weight_case({.name = "s4", .lanes = 5, .substates = 4, .channels = 3, .gamma = false}),
    lane_weight_case({.name = "neck", .lanes = 5, .substates = 8, .real = true}),
    lane_weight_case({.name = "dws", .lanes = 37, .substates = 4, .real = true, .sides = true}),
});

const RegisterBenchCases kRegisterBench({
    lane_weight_case({.name = "s4d", .lanes = 768, .substates = 32, .copies = 768}),
    lane_weight_case({.name = "neck", .lanes = 64, .substates = 8, .real = true}),
});

}  // namespace
}  // namespace lrnn::testing
