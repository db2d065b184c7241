#include "lrnn/ops/complex_weight.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

// `pairs` [R, C, 2] holds both planes interleaved; otherwise re and im [R, C].
OpCase complex_weight_case(ComplexProduct product, bool interleaved, std::int64_t rows,
                           std::int64_t cols) {
  const auto plane = [=](Tensors& t, const std::string& prefix, int i) -> MutableTensorView {
    if (interleaved) return t[prefix + "pairs"].view().slice(2, i, 1);
    return t[prefix + (i == 0 ? "re" : "im")];
  };
  const auto operand = [](const char* name, Shape shape) {
    return Operand{.name = name, .shape = shape, .storage = Storage::Accumulate};
  };
  const bool drive = product == ComplexProduct::Drive;
  OpCase c{
      .name = detail::concat("complex_weight/", drive ? "drive" : "read_out",
                             interleaved ? "_interleaved" : "", "/R:", rows, "/C:", cols),
      .inputs = {},
      .params = {operand("re", {rows, cols}), operand("im", {rows, cols})},
      .outputs = {operand("weight", drive ? Shape{2, rows, cols} : Shape{rows, 2, cols})},
      .forward =
          [=](Context& ctx, Tensors& t) {
            complex_weight_forward(ctx, {.product = product,
                                         .re = plane(t, "", 0),
                                         .im = plane(t, "", 1),
                                         .weight = t["weight"]});
          },
      .backward =
          [=](Context& ctx, Tensors& t) {
            complex_weight_backward(ctx, {.product = product,
                                          .dweight = t["dweight"],
                                          .dre = plane(t, "d", 0),
                                          .dim = plane(t, "d", 1)});
          },
  };
  if (interleaved) c.params = {operand("pairs", {rows, cols, 2})};
  return c;
}

const RegisterOpCases kRegister({
    complex_weight_case(ComplexProduct::Drive, false, 3, 5),
    complex_weight_case(ComplexProduct::ReadOut, false, 4, 3),
    complex_weight_case(ComplexProduct::ReadOut, true, 5, 65),
    complex_weight_case(ComplexProduct::Drive, true, 1, 1),
});

// B and C of an LRU.
const RegisterBenchCases kRegisterBench({
    complex_weight_case(ComplexProduct::Drive, false, 64, 768),
    complex_weight_case(ComplexProduct::ReadOut, false, 768, 64),
});

}  // namespace
}  // namespace lrnn::testing
