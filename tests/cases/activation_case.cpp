#include "lrnn/ops/activation.hpp"

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

// Columns [margin, margin + width) of x and y; the rest of y and of dx is 0.
OpCase activation_case(Activation kind, std::int64_t rows, std::int64_t width,
                       std::int64_t margin = 0, bool twice = false) {
  const Shape shape = {rows, width + margin};
  const auto columns = [=](Tensor& t) { return t.view().slice(1, margin, width); };
  return {
      .name = detail::concat("activation/", name_of(kind), twice ? "_twice" : "", "/T:", rows,
                             "/C:", width, margin > 0 ? detail::concat("/margin:", margin) : ""),
      .inputs = {{.name = "x", .shape = shape, .low = -6, .high = 6}},
      .outputs = {{.name = "y", .shape = shape}},
      .forward =
          [=](Context& ctx, Tensors& t) {
            if (margin > 0) ctx.zero(t["y"]);
            activation_forward(
                ctx, {.kind = kind, .x = columns(t["x"]), .y = columns(t["y"]), .twice = twice});
          },
      .backward =
          [=](Context& ctx, Tensors& t) {
            if (margin > 0) ctx.zero(t["dx"]);
            activation_backward(ctx, {.kind = kind,
                                      .dy = columns(t["dy"]),
                                      .x = columns(t["x"]),
                                      .dx = columns(t["dx"]),
                                      .twice = twice});
          },
  };
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const Activation kind : {Activation::Identity, Activation::Silu, Activation::Gelu,
                                Activation::Sigmoid, Activation::Softplus}) {
    all.push_back(activation_case(kind, 1, 1));
    all.push_back(activation_case(kind, 3, 7));
    all.push_back(activation_case(kind, 5, 16));
    all.push_back(activation_case(kind, 3, 8, 8));  // aligned column slices
    all.push_back(activation_case(kind, 3, 8, 3));  // unaligned column slices
    all.push_back(activation_case(kind, 3, 7, 0, true));
    all.push_back(activation_case(kind, 3, 8, 8, true));
  }
  return all;
}

OpCase bench_case(Activation kind, std::int64_t width, bool twice) {
  OpCase c = activation_case(kind, 16384, width, 0, twice);
  c.gradcheck = false;
  c.bytes_backward = 3.0 * 4.0 * static_cast<double>(16384 * width);  // dy, x; dx
  return c;
}

const RegisterOpCases kRegister(cases());
const RegisterBenchCases kRegisterBench({bench_case(Activation::Silu, 1536, false),
                                         bench_case(Activation::Gelu, 768, true)});

}  // namespace
}  // namespace lrnn::testing
