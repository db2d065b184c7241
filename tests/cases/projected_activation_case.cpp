#include <tuple>

#include "lrnn/ops/projected_activation.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

OpCase projected_activation_case(std::int64_t rows, std::int64_t inputs, std::int64_t features,
                                 Activation kind, bool bias = true) {
  OpCase c{
      .name = detail::concat("projected_activation/T:", rows, "/I:", inputs, "/O:", features,
                             kind == Activation::Silu ? "/silu" : "/gelu", bias ? "" : "/no_bias"),
      .inputs = {{.name = "x", .shape = {rows, inputs}}},
      .params = {{.name = "weight", .shape = {features, inputs}, .low = -0.3, .high = 0.3}},
      .outputs = {{.name = "y", .shape = {rows, features}}},
      .forward =
          [kind](Context& ctx, Tensors& t) {
            projected_activation(
                ctx,
                {.kind = kind, .x = t["x"], .weight = t["weight"], .bias = t["bias"], .y = t["y"]});
          },
  };
  if (bias) c.params.push_back({.name = "bias", .shape = {features}});
  return c;
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  // 17 rows read the weight twice; 33 and 130 rows, and odd depth: other kernels, or the ops one by
  // one.
  for (const auto& [rows, inputs, features] :
       std::initializer_list<std::tuple<std::int64_t, std::int64_t, std::int64_t>>{{1, 64, 40},
                                                                                   {3, 136, 13},
                                                                                   {16, 512, 128},
                                                                                   {17, 32, 16},
                                                                                   {33, 64, 72},
                                                                                   {130, 32, 16},
                                                                                   {2, 7, 5}})
    for (const Activation kind : {Activation::Silu, Activation::Gelu})
      all.push_back(projected_activation_case(rows, inputs, features, kind));
  all.push_back(projected_activation_case(32, 768, 768, Activation::Gelu));
  all.push_back(projected_activation_case(5, 48, 24, Activation::Gelu, false));
  return all;
}
const RegisterOpCases kRegister(cases());
// Behind S4 and S4D.
const RegisterBenchCases kRegisterBench({projected_activation_case(1, 768, 768, Activation::Gelu),
                                         projected_activation_case(32, 768, 768, Activation::Gelu),
                                         projected_activation_case(128, 768, 768,
                                                                   Activation::Gelu)});

}  // namespace
}  // namespace lrnn::testing
