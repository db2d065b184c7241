#include "lrnn/ops/gated_activation.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

const char* name_of(Activation kind) {
  switch (kind) {
    case Activation::Identity:
      return "identity";
    case Activation::Silu:
      return "silu";
    case Activation::Gelu:
      return "gelu";
    case Activation::Sigmoid:
      return "sigmoid";
    case Activation::Softplus:
      return "softplus";
  }
  return "";
}

// value and gate are the halves of one operand, as a projection leaves them.
OpCase gated_activation_case(Activation kind, std::int64_t rows, std::int64_t width) {
  const auto value = [=](Tensor& t) { return t.view().slice(1, 0, width); };
  const auto gate = [=](Tensor& t) { return t.view().slice(1, width, width); };
  const auto elements = static_cast<double>(rows * width);
  return {
      .name = detail::concat("gated_activation/", name_of(kind), "/T:", rows, "/C:", width),
      .inputs = {{.name = "x", .shape = {rows, 2 * width}, .low = -4, .high = 4}},
      .outputs = {{.name = "y", .shape = {rows, width}}},
      .forward =
          [=](Context& ctx, Tensors& t) {
            gated_activation_forward(
                ctx, {.kind = kind, .value = value(t["x"]), .gate = gate(t["x"]), .y = t["y"]});
          },
      .backward =
          [=](Context& ctx, Tensors& t) {
            gated_activation_backward(ctx, {.kind = kind,
                                            .dy = t["dy"],
                                            .value = value(t["x"]),
                                            .gate = gate(t["x"]),
                                            .dvalue = value(t["dx"]),
                                            .dgate = gate(t["dx"])});
          },
      .bytes_forward = 12.0 * elements,
      .bytes_backward = 20.0 * elements,
  };
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const Activation kind : {Activation::Identity, Activation::Silu, Activation::Gelu,
                                Activation::Sigmoid, Activation::Softplus})
    for (const std::int64_t width : {1, 7, 8, 20})
      all.push_back(gated_activation_case(kind, 3, width));
  return all;
}

OpCase bench_case() {
  OpCase c = gated_activation_case(Activation::Silu, 16384, 1536);
  c.gradcheck = false;
  return c;
}

const RegisterOpCases kRegister(cases());
const RegisterBenchCases kRegisterBench({bench_case()});

}  // namespace
}  // namespace lrnn::testing
